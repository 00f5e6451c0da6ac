"""Seed, pixels and processor: what is trained is what is deployed."""

import numpy as np
import pytest
import torch
from PIL import Image

import art
from conftest import ROOT
from eval import InputError, png_bytes


def test_every_seed_value_survives():
    seed = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    pixels = art.PixelLogits(seed)
    assert torch.equal(pixels().detach(), seed.float())
    assert np.array_equal(np.asarray(pixels.to_image()), seed.permute(1, 2, 0).numpy())


def test_the_value_is_rounded_and_the_gradient_is_the_sigmoids(seed):
    pixels = art.PixelLogits(seed)
    with torch.no_grad():
        pixels.logits += 0.3 * torch.randn_like(pixels.logits)
    image = pixels()
    image.sum().backward()
    slope = torch.sigmoid(pixels.logits.detach().double())
    assert torch.equal(image.detach(), image.detach().round())
    assert torch.allclose(pixels.logits.grad.double(), 255 * slope * (1 - slope), rtol=1e-3, atol=1e-5)
    assert (pixels.logits.grad > 0).all()


@pytest.mark.parametrize("size", [256, 288, 512])
def test_png_is_the_policy(processor, tmp_path, size):
    """The processor gives the same values for the PNG file as for the trained tensor, element for element."""
    pixels = art.PixelLogits(torch.randint(0, 256, (3, size, size), dtype=torch.uint8))
    with torch.no_grad():
        pixels.logits += torch.randn_like(pixels.logits)
    (tmp_path / "a.png").write_bytes(png_bytes(pixels.to_image()))
    from_png = processor.image_processor(images=Image.open(tmp_path / "a.png"), return_tensors="pt")["pixel_values"]
    from_tensor = processor.image_processor(images=pixels(), return_tensors="pt")["pixel_values"]
    assert (from_png - from_tensor).abs().max().item() == 0.0


@pytest.mark.parametrize("bound", [1, 8, 300])
def test_max_change_bounds_every_pixels_distance_from_the_seed(bound):
    seed = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    pixels = art.PixelLogits(seed, bound)
    pixels.project()
    assert torch.equal(pixels().detach(), seed.float())                             # the seed itself is inside
    with torch.no_grad():
        pixels.logits += torch.tensor([20.0, -20.0, 0.0])[:, None, None]
    pixels.project()
    up, down, still = pixels().detach()
    assert torch.equal(up, (seed[0].float() + bound).clamp(max=255)) and torch.equal(down, (seed[1].float() - bound).clamp(min=0))
    assert torch.equal(still, seed[2].float())


def test_noise_without_a_seed_is_grey_and_faint():
    noise = art.load_seed(None, 256).float()
    assert noise.shape == (3, 256, 256)
    assert abs(noise.mean() - 127.5) < 1 and 5 < noise.std() < 8        # 255 * 0.25 * 0.1 = 6.4


GRADIENT = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("RGB", "jpg"), ("RGBA", "png"), ("P", "png"), ("P", "gif"),
                                          ("L", "png"), ("LA", "png"), ("CMYK", "tif"), ("1", "png"), ("I;16", "png")])
def test_any_picture_is_a_seed(tmp_path, mode, suffix):
    """Every colour mode arrives as the same picture, up to what the mode itself can hold."""
    rgb = Image.fromarray(GRADIENT)
    picture = Image.fromarray((np.asarray(rgb.convert("L")).astype(np.uint16) * 257)) if mode == "I;16" else rgb.convert(mode)
    picture.save(tmp_path / f"a.{suffix}")
    seed = art.load_seed(str(tmp_path / f"a.{suffix}"), 64)
    expected = rgb.convert("L").convert("RGB") if mode in ("L", "LA", "I;16") else rgb
    error = (seed.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int))
    assert seed.dtype == torch.uint8 and seed.shape == (3, 64, 64)
    if mode == "1":
        assert set(seed.unique().tolist()) <= {0, 255}
    else:
        assert np.abs(error).mean() < {"jpg": 12, "gif": 30}.get(suffix, 30 if mode == "P" else 2)


def test_transparency_is_laid_on_grey_and_rotation_applied(tmp_path):
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(art.load_seed(str(tmp_path / "clear.png"), 64), torch.full((3, 64, 64), 128, dtype=torch.uint8))
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (0, 0, 64, 32))                      # white above
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # the camera was turned: rotate by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    seed = art.load_seed(str(tmp_path / "turned.png"), 64)
    assert seed[:, :, 40:].min() == 255 and seed[:, :, :24].max() == 0  # white on the right


def test_a_seed_is_cropped_not_squeezed():
    assert art.load_seed(str(ROOT / "seed.png"), (128, 64)).shape == (3, 128, 64)


@pytest.mark.parametrize("size", [128, 250, 270])
def test_a_size_that_the_processor_would_resize_is_refused(processor, size):
    with pytest.raises(InputError, match=rf"--size {size}: .*sizes that work near it: .*256"):
        art.check_size(processor, size)


def test_panel_shows_seed_image_and_difference(seed):
    before = art.PixelLogits(seed).to_image()
    after = Image.fromarray(np.asarray(before) ^ 1)
    sheet = np.asarray(art.panel(before, after))
    left, middle, right = (sheet[28:284, 10 + 266 * i:266 + 266 * i] for i in range(3))
    assert np.array_equal(left, np.asarray(before)) and np.array_equal(middle, np.asarray(after))
    assert set(np.unique(right)) == {128 - 16, 128 + 16}               # differences of 1, amplified 16 times
