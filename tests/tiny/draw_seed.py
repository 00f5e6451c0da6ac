"""Draws seed.png, the picture that the README starts from: a lighthouse at dusk.   python tests/tiny/draw_seed.py"""

import math
from pathlib import Path

from PIL import Image, ImageDraw

SCALE, SIDE, FRAME = 4, 256, 12                          # drawn four times as large, then scaled down: smooth edges


def lighthouse():
    image = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE))
    draw = ImageDraw.Draw(image)
    at = lambda *points: [(x * SCALE, y * SCALE) for x, y in points]                                       # noqa: E731
    for i, colour in enumerate(["#33456f", "#405781", "#58698c", "#7c7d8e", "#a58d80", "#c4986c"]):         # sky
        draw.rectangle(at((0, 28 * i), (256, 28 * i + 28)), fill=colour)
    draw.ellipse(at((34, 112), (82, 160)), fill="#f4d58d")                                                 # sun
    for i, colour in enumerate(["#4d7f94", "#42748b", "#386a82", "#306078"]):                               # sea
        wave = [(x, 160 + 22 * i + 3 * math.sin(x / 9 + 2 * i)) for x in range(0, 257, 2)]
        draw.polygon(at(*wave, (256, 256), (0, 256)), fill=colour)
    for y, half in (172, 17), (183, 12), (196, 8), (212, 5):                                                # its reflection
        draw.rounded_rectangle(at((58 - half, y), (58 + half, y + 3)), radius=6, fill="#d9bd85")
    draw.polygon(at((112, 256), (128, 216), (150, 200), (206, 198), (232, 214), (256, 226), (256, 256)), fill="#5f6c58")
    draw.polygon(at((150, 200), (206, 198), (196, 208), (160, 210)), fill="#7f8b6e")
    draw.polygon(at((163, 80), (193, 80), (201, 200), (155, 200)), fill="#f0e9dc")                          # tower
    for y in 100, 140, 180:
        inset = lambda y: 8 * (y - 80) / 120                                                               # noqa: E731
        draw.polygon(at((163 - inset(y), y), (193 + inset(y), y), (193 + inset(y + 18), y + 18),
                        (163 - inset(y + 18), y + 18)), fill="#b8463c")
    shade = Image.new("L", image.size)
    ImageDraw.Draw(shade).polygon(at((183, 80), (193, 80), (201, 200), (186, 200)), fill=60)
    image.paste("#20303c", mask=shade)
    draw.rectangle(at((157, 74), (199, 80)), fill="#3b3f46")                                               # gallery
    draw.rectangle(at((167, 56), (189, 74)), fill="#f9e7a8")                                               # lamp
    for x in 167, 177, 187:
        draw.rectangle(at((x, 56), (x + 2, 74)), fill="#3b3f46")
    draw.polygon(at((162, 56), (194, 56), (178, 40)), fill="#8f3630")
    draw.rectangle(at((174, 184), (183, 200)), fill="#3b3f46")                                             # door
    for x, y in (96, 52), (118, 40), (72, 70):                                                             # gulls
        draw.arc(at((x - 9, y), (x, y + 8)), 200, 340, fill="#e8e4da", width=2 * SCALE)
        draw.arc(at((x, y), (x + 9, y + 8)), 200, 340, fill="#e8e4da", width=2 * SCALE)
    draw.rectangle(at((0, 0), (256, 256)), outline="#e9dfcd", width=FRAME * SCALE)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).quantize(96, dither=Image.Dither.NONE).convert("RGB")


if __name__ == "__main__":
    lighthouse().save(Path(__file__).parents[2] / "seed.png", optimize=True)
