"""Seed, pixels and processor: what is trained is what is deployed."""

import numpy as np
import pytest
import torch
from PIL import Image

import art
from conftest import prompt
from eval import InputError, open_picture, png_bytes

def moved(seed, rounding=True, scale=1.0):
    pixels = art.PixelLogits(seed, rounding)
    with torch.no_grad():
        pixels.logits += scale * torch.randn_like(pixels.logits)
    return pixels


def test_every_seed_value_survives():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    pixels = art.PixelLogits(levels)
    assert torch.equal(pixels().detach(), levels.float())
    assert np.array_equal(np.asarray(pixels.to_image()), levels.permute(1, 2, 0).numpy())


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
    pixels = moved(seed, rounding=False)
    image = pixels().detach()
    assert torch.equal(image, 255 * torch.sigmoid(pixels.logits.detach()))
    assert (image != image.round()).float().mean() > 0.9
    levels = torch.from_numpy(np.array(pixels.to_image())).permute(2, 0, 1)
    assert torch.equal(levels, image.round().to(torch.uint8))


@pytest.mark.parametrize("size", [256, 288, 512])
def test_png_is_the_policy(processor, tmp_path, size):
    """The file holds the picture in memory; the processor gives its values for the tensor, too."""
    pixels = moved(torch.randint(0, 256, (3, size, size), dtype=torch.uint8))
    (tmp_path / "a.png").write_bytes(png_bytes(pixels.to_image(), {"step": 7}))
    picture = open_picture(tmp_path / "a.png")
    assert picture.tobytes() == pixels.to_image().tobytes()
    from_png, from_tensor = (
        processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        for image in (picture, pixels()))
    assert (from_png - from_tensor).abs().max().item() == 0.0


def test_noise_without_a_seed_is_grey_and_faint():
    noise = art.load_seed(None, 256).float()
    assert noise.shape == (3, 256, 256)
    assert abs(noise.mean() - 127.5) < 1 and 5 < noise.std() < 8        # 255 * 0.25 * 0.1 = 6.4


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "png"), ("RGB", "jpg"), ("RGBA", "png"), ("P", "png"), ("P", "gif"), ("L", "png"),
    ("LA", "png"), ("CMYK", "tif"), ("I;16", "png")])
def test_any_picture_is_a_seed(tmp_path, mode, suffix):
    """Every colour mode arrives as the same picture: here a grey one, which each can hold."""
    grey = Image.linear_gradient("L").resize((64, 64))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        picture = grey.convert("RGB").convert(mode)
    picture.save(tmp_path / f"a.{suffix}")
    seed = art.load_seed(str(tmp_path / f"a.{suffix}"), 64)
    assert seed.dtype == torch.uint8 and seed.shape == (3, 64, 64)
    error = np.abs(seed.numpy().astype(int) - np.asarray(grey)).mean()
    assert error < (20 if mode == "P" else 3)                          # a palette is dithered


def test_transparency_is_laid_on_grey(tmp_path):
    """An alpha channel's, and a colour's that stands for it."""
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (64, 64), 50).save(tmp_path / "colour.png", transparency=50)
    for name in ("clear.png", "colour.png"):
        assert set(art.load_seed(str(tmp_path / name), 64).unique().tolist()) == {128}


def test_a_seed_is_turned_as_the_camera_was_and_cropped_not_squeezed(tmp_path):
    picture = Image.new("RGB", (64, 192), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 64, 64, 128))                        # blue in the middle third,
    picture.paste((0, 255, 0), (0, 64, 64, 96))                         # green above it
    exif = Image.Exif()
    exif[0x0112] = 6                                # the camera was turned: rotate by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    red, green, blue = art.load_seed(str(tmp_path / "turned.png"), 64)
    assert red.max() == 0
    assert blue[:, :24].min() == 255 and green[:, 40:].min() == 255     # green on the right


@pytest.mark.parametrize("size", [128, 250, 270])
def test_a_size_that_the_processor_would_resize_is_refused(processor, model, questions, size):
    """By the backward pass itself, too; in every family the command line's check names others."""
    pixels = art.PixelLogits(torch.zeros(3, size, size, dtype=torch.uint8))
    with pytest.raises(InputError, match=rf"^--size {size}: .* found to work: .*\b256\b.*\.$"):
        pixels.features(model, processor, prompt(processor, questions[0]))


def test_panel_shows_seed_image_and_difference(seed):
    before = art.PixelLogits(seed).to_image()
    after = Image.fromarray(np.asarray(before) ^ 1)
    left, middle, right = np.split(np.asarray(art.panel(before, after)), 3, axis=1)
    assert (left == before).all() and (middle == after).all() and {*right.flat} == {127, 129}
