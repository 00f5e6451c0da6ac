"""Seed, pixels and processor: what is trained is what is deployed."""

import numpy as np
import pytest
import torch
from PIL import Image

import art
from conftest import ROOT, SEED
from eval import InputError, open_picture, png_bytes

LEVELS = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)


def moved(seed, rounding="straight-through", scale=1.0):
    pixels = art.PixelLogits(seed, rounding)
    with torch.no_grad():
        pixels.logits += scale * torch.randn_like(pixels.logits)
    return pixels


def test_every_seed_value_survives():
    pixels = art.PixelLogits(LEVELS)
    assert torch.equal(pixels().detach(), LEVELS.float())
    assert np.array_equal(np.asarray(pixels.to_image()), LEVELS.permute(1, 2, 0).numpy())


def test_the_value_is_rounded_and_the_gradient_is_the_sigmoids(seed):
    pixels = moved(seed, scale=0.3)
    image = pixels()
    image.sum().backward()
    slope = torch.sigmoid(pixels.logits.detach().double())
    expected = 255 * slope * (1 - slope)
    assert torch.equal(image.detach(), image.detach().round())
    assert torch.allclose(pixels.logits.grad.double(), expected, rtol=1e-3, atol=1e-5)
    assert (pixels.logits.grad > 0).all()


def test_without_rounding_the_image_is_continuous_and_its_png_still_rounded(seed):
    pixels = moved(seed, "none")
    image = pixels().detach()
    assert torch.equal(image, 255 * torch.sigmoid(pixels.logits.detach()))
    assert (image != image.round()).float().mean() > 0.9
    levels = torch.from_numpy(np.array(pixels.to_image())).permute(2, 0, 1)
    assert torch.equal(levels, image.round().to(torch.uint8))


@pytest.mark.parametrize("size", [256, 288, 512])
def test_png_is_the_policy(processor, tmp_path, size):
    """The processor gives the PNG file's values for the trained tensor, element for element."""
    pixels = moved(torch.randint(0, 256, (3, size, size), dtype=torch.uint8))
    (tmp_path / "a.png").write_bytes(png_bytes(pixels.to_image(), {"step": 7}))
    from_png, from_tensor = (
        processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        for image in (Image.open(tmp_path / "a.png"), pixels()))
    assert (from_png - from_tensor).abs().max().item() == 0.0


@pytest.mark.parametrize("bound", [1, 8, 254])
def test_max_change_bounds_every_pixels_distance_from_the_seed(bound):
    pixels = art.PixelLogits(LEVELS)
    pixels.bound(LEVELS, bound)
    assert torch.equal(pixels().detach(), LEVELS.float())               # the seed itself is inside
    with torch.no_grad():
        pixels.logits += torch.tensor([20.0, -20.0, 0.0])[:, None, None]
    pixels.bound(LEVELS, bound)
    up, down, still = pixels().detach()
    assert torch.equal(up, (LEVELS[0].float() + bound).clamp(max=255))
    assert torch.equal(down, (LEVELS[1].float() - bound).clamp(min=0))
    assert torch.equal(still, LEVELS[2].float())


def test_noise_without_a_seed_is_grey_and_faint():
    noise = art.load_seed(None, 256).float()
    assert noise.shape == (3, 256, 256)
    assert abs(noise.mean() - 127.5) < 1 and 5 < noise.std() < 8        # 255 * 0.25 * 0.1 = 6.4


GRADIENT = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "png"), ("RGB", "jpg"), ("RGBA", "png"), ("P", "png"), ("P", "gif"), ("L", "png"),
    ("LA", "png"), ("CMYK", "tif"), ("1", "png"), ("I;16", "png")])
def test_any_picture_is_a_seed(tmp_path, mode, suffix):
    """Every colour mode arrives as the same picture, up to what the mode itself can hold."""
    rgb = Image.fromarray(GRADIENT)
    grey = rgb.convert("L")
    is_16_bit = mode == "I;16"
    picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if is_16_bit else \
        rgb.convert(mode)
    picture.save(tmp_path / f"a.{suffix}")
    seed = art.load_seed(str(tmp_path / f"a.{suffix}"), 64)
    expected = grey.convert("RGB") if mode in ("L", "LA", "I;16") else rgb
    error = seed.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int)
    assert seed.dtype == torch.uint8 and seed.shape == (3, 64, 64)
    if mode == "1":
        assert set(seed.unique().tolist()) <= {0, 255}
    else:
        allowed = {"jpg": 12, "gif": 30}.get(suffix, 30 if mode == "P" else 2)
        assert np.abs(error).mean() < allowed


def test_transparency_is_laid_on_grey(tmp_path):
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert set(art.load_seed(str(tmp_path / "clear.png"), 64).unique().tolist()) == {128}


@pytest.mark.parametrize("kind, factor", [(np.uint8, 1), (np.uint16, 257)])
def test_a_transparent_colour_of_grey_reads_128_in_8_and_in_16_bits(tmp_path, kind, factor):
    values = np.full((64, 64), 200, kind) * kind(factor)
    values[:, 32:] = 50 * factor
    Image.fromarray(values).save(tmp_path / "a.png", transparency=50 * factor)
    picture = np.asarray(open_picture(str(tmp_path / "a.png")))
    assert (picture[:, :32] == 200).all() and (picture[:, 32:] == 128).all()


def test_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (0, 0, 64, 32))                      # white above
    exif = Image.Exif()
    exif[0x0112] = 6                                # the camera was turned: rotate by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    seed = art.load_seed(str(tmp_path / "turned.png"), 64)
    assert seed[:, :, 40:].min() == 255 and seed[:, :, :24].max() == 0  # white on the right


def test_a_seed_is_cropped_not_squeezed(tmp_path):
    picture = Image.new("RGB", (192, 64), (255, 0, 0))
    picture.paste((0, 0, 255), (64, 0, 128, 64))                        # blue in the middle third
    picture.save(tmp_path / "wide.png")
    seed = art.load_seed(str(tmp_path / "wide.png"), 64)
    assert seed.shape == (3, 64, 64) and seed[2].min() == 255 and seed[0].max() == 0


@pytest.mark.parametrize("size", [128, 250, 270])
def test_a_size_that_the_processor_would_resize_is_refused(processor, size):
    with pytest.raises(InputError, match=rf"--size {size}: .*sizes that work near it: .*256"):
        art.check_size(processor, size)
    art.check_size(processor, 256)


def test_panel_shows_seed_image_and_difference(seed):
    before = art.PixelLogits(seed).to_image()
    after = Image.fromarray(np.asarray(before) ^ 1)
    left, middle, right = np.split(np.asarray(art.panel(before, after)), 3, axis=1)
    assert np.array_equal(left, np.asarray(before)) and np.array_equal(middle, np.asarray(after))
    assert set(np.unique(right)) == {127, 129}


def test_the_default_seed_is_a_picture_of_the_default_size():
    assert Image.open(SEED).size == (256, 256) and (ROOT / "seed.png").stat().st_size < 500_000
