"""Hostile and broken input. Each case works, or is refused by one sentence and exit code 2: without a traceback, within 30
seconds, below 2 GB before a model is loaded, writing nothing outside --out, running no code, asking nobody but the hub.

The cases are the lists below, each with what it must come to: WORKS, or a part of the sentence.
"""

import functools
import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import art
import eval as tasks
from conftest import ROOT, TINY, data

WORKS = "works"
PICTURE, NO_FILE = "it cannot be read as a picture", "there is no such"
TOO_MANY = "works|every prompt is longer than"          # for art.py, which scales it, and for eval.py


class Payload:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


# ------------------------------------------------------------------------------------------------------------------
# Pictures: name, what makes the file, what it comes to

def encoded(picture, format, **options):
    picture.save(buffer := io.BytesIO(), format=format, **options)
    return buffer.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, rows=b"", kind=2, depth=8, extra=b""):
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)) + extra
            + chunk(b"IDAT", rows or zlib.compress(b"")) + chunk(b"IEND", b""))


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def text_chunk(text, compressed=True):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", text, zip=compressed)
    return info


def palette(colours, transparency=None):
    picture = Image.fromarray((GREY // (256 // colours)).astype(np.uint8), mode=None).convert("P")
    picture.putpalette([(7 * i) % 256 for i in range(3 * colours)])
    if transparency is not None:
        picture.info["transparency"] = transparency
    return picture


GREY = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
RGB = Image.fromarray(np.stack([GREY, GREY.T, 255 - GREY], 2))
FRAMES = [RGB.rotate(90 * i) for i in range(4)]
whole_png = encoded(RGB, "PNG")
pictures = [
    ("whole.png", whole_png, WORKS), ("whole.jpg", encoded(RGB, "JPEG"), WORKS), ("whole.webp", encoded(RGB, "WEBP"), WORKS),
    ("whole.gif", encoded(RGB, "GIF"), WORKS), ("whole.bmp", encoded(RGB, "BMP"), WORKS), ("whole.tif", encoded(RGB, "TIFF"), WORKS),
    ("whole.ppm", encoded(RGB, "PPM"), WORKS), ("whole.jp2", encoded(RGB, "JPEG2000"), WORKS),
    # cut off, or a byte wrong
    *[(f"cut at {n}.png", whole_png[:n], PICTURE) for n in (0, 1, 8, 20, 33, 50, len(whole_png) // 2)],
    *[(f"cut at {n}.jpg", encoded(RGB, "JPEG")[:n], PICTURE) for n in (0, 2, 20, 200, 700)],
    *[(f"cut.{f}", encoded(RGB, f)[:n], PICTURE) for f, n in (("webp", 100), ("gif", 400), ("bmp", 60), ("tiff", 100), ("jpeg2000", 300))],
    ("wrong checksum.png", whole_png[:40] + b"\xff" + whole_png[41:], PICTURE),
    ("wrong header.png", whole_png.replace(b"IHDR", b"IHDX"), PICTURE),
    ("no pixels.png", png(64, 64), PICTURE),
    ("zeros.png", bytes(10_000), PICTURE), ("empty.png", b"", PICTURE), ("noise.png", np.random.default_rng(0).bytes(10_000), PICTURE),
    ("text.png", b"this is no picture", PICTURE), ("page.png", b"<html><img src=x></html>", PICTURE), ("script.png", b"#!/bin/sh\ntouch executed\n", PICTURE),
    ("pickle.png", pickle.dumps(Payload()), PICTURE), ("drawing.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', PICTURE),
    ("document.pdf", b"%PDF-1.4\n%%EOF", PICTURE),
    # another kind than the name says
    ("jpeg.png", encoded(RGB, "JPEG"), WORKS), ("png.jpg", whole_png, WORKS), ("png.txt", whole_png, WORKS), ("png", whole_png, WORKS),
    ("postscript.png", encoded(RGB, "EPS"), PICTURE), ("postscript.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(executed) (w) file\n", PICTURE),
    ("kinds.psd", b"8BPS" + bytes(1000), PICTURE), ("kinds.fits", b"SIMPLE  =                    T" + bytes(3000), PICTURE),
    # sizes
    ("one pixel.png", encoded(Image.new("RGB", (1, 1)), "PNG"), WORKS), ("one pixel.gif", encoded(Image.new("P", (1, 1)), "GIF"), WORKS),
    ("two by three.png", encoded(Image.new("RGB", (2, 3)), "PNG"), WORKS),
    ("strip.png", encoded(Image.new("RGB", (100_000, 1)), "PNG"), "200 times as long as"), ("column.png", encoded(Image.new("RGB", (1, 100_000)), "PNG"), "200 times as long as"),
    ("200 to 1.png", encoded(Image.new("RGB", (2000, 10)), "PNG"), WORKS), ("201 to 1.png", encoded(Image.new("RGB", (2010, 10)), "PNG"), "200 times as long as"),
    ("zero wide.png", png(0, 64), PICTURE), ("zero high.png", png(64, 0), PICTURE),
    # bombs: small files that unpack to gigabytes
    ("bomb 30000.png", png(30_000, 30_000), PICTURE), ("bomb 65535.png", png(65_535, 65_535), PICTURE),
    ("bomb 2 billion.png", png(2**31 - 1, 2**31 - 1), PICTURE), ("bomb.bmp", encoded(RGB, "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + bytes(100), PICTURE),
    ("bomb.gif", b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x00;", PICTURE),
    ("bomb.ppm", b"P6 60000 60000 255\n", PICTURE), ("bomb.pgm", b"P5 9000 9000 65535\n" + bytes(100), PICTURE),
    ("bomb.tif", lambda path: Image.new("1", (20_000, 20_000)).save(path, compression="group4"), PICTURE),
    ("unpacked bomb.png", lambda path: path.write_bytes(png(40_000, 40_000, zlib.compress(bytes(200_000_000), 1), 0, 1)), PICTURE),
    ("largest.png", lambda path: Image.new("L", (8000, 8000), 99).save(path), TOO_MANY),
    ("largest alpha.png", lambda path: Image.new("RGBA", (8000, 8000), (9, 9, 9, 9)).save(path, compress_level=1), TOO_MANY),
    ("largest 16 bit.png", lambda path: Image.fromarray(np.full((8000, 8000), 999, np.uint16)).save(path, compress_level=1), TOO_MANY),
    ("largest float.tif", lambda path: Image.fromarray(np.full((8000, 8000), 0.5, np.float32)).save(path), TOO_MANY),
    # animated
    ("animated.gif", encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), WORKS),
    ("animated.png", encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), WORKS),
    ("animated.webp", encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), WORKS),
    ("pages.tif", encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), WORKS),
    ("endless.gif", encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:] * 300, loop=0), WORKS),
    # depths and colours
    ("16 bit grey.png", encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), WORKS),
    ("16 bit colour.png", png(8, 8, zlib.compress(b"".join(b"\0" + bytes(48) for _ in range(8))), 2, 16), WORKS),
    ("32 bit.tif", encoded(Image.fromarray(GREY.astype(np.int32) * 9999), "TIFF"), WORKS),
    ("float.tif", encoded(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), WORKS),
    ("not a number.tif", encoded(Image.fromarray(np.full((64, 64), np.nan, np.float32)), "TIFF"), PICTURE),
    ("infinite.tif", encoded(Image.fromarray(np.full((64, 64), np.inf, np.float32)), "TIFF"), PICTURE),
    ("negative.tif", encoded(Image.fromarray(np.full((64, 64), -5.0, np.float32)), "TIFF"), WORKS),
    *[(f"cmyk.{f}", encoded(RGB.convert("CMYK"), f), WORKS) for f in ("jpeg", "tiff")],
    ("lab.tif", encoded(RGB.convert("LAB"), "TIFF"), WORKS), ("ycbcr.jpg", encoded(RGB.convert("YCbCr"), "JPEG"), WORKS),
    ("bits.png", encoded(RGB.convert("1"), "PNG"), WORKS), ("grey alpha.png", encoded(RGB.convert("LA"), "PNG"), WORKS),
    ("premultiplied.tif", encoded(RGB.convert("RGBA"), "TIFF"), WORKS), ("grey.jpg", encoded(RGB.convert("L"), "JPEG"), WORKS),
    ("palette.png", encoded(palette(16), "PNG"), WORKS), ("palette with one clear.png", encoded(palette(16, 3), "PNG"), WORKS),
    ("palette with many clear.png", encoded(palette(16, bytes(range(16))), "PNG"), WORKS), ("clear.gif", encoded(palette(16, 3), "GIF"), WORKS),
    ("clear colour.png", encoded(RGB, "PNG", transparency=(0, 0, 255)), WORKS), ("clear grey.png", encoded(RGB.convert("L"), "PNG", transparency=9), WORKS),
    ("no palette.png", png(8, 8, zlib.compress(b"\0" * 72), 3), WORKS),
    *[(f"rotation {n}.jpg", encoded(RGB, "JPEG", exif=exif(n)), WORKS) for n in range(1, 9)], ("rotation 99.jpg", encoded(RGB, "JPEG", exif=exif(99)), WORKS),
    ("exif of noise.jpg", encoded(RGB, "JPEG", exif=b"Exif\0\0" + np.random.default_rng(1).bytes(5000)), WORKS),
    ("exif of noise.png", encoded(RGB, "PNG", exif=b"Exif\0\0" + np.random.default_rng(2).bytes(5000)), PICTURE),
    # text
    ("text of 1 kB.png", encoded(RGB, "PNG", pnginfo=text_chunk("x" * 1000)), WORKS),
    ("text of 2 MB.png", encoded(RGB, "PNG", pnginfo=text_chunk("x" * 2_000_000)), PICTURE),
    ("text of 200 MB.png", lambda path: RGB.save(path, pnginfo=text_chunk("x" * 200_000_000)), PICTURE),
    ("a hundred texts of 1 MB.png", png(8, 8, extra=100 * chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 1_000_000))), PICTURE),
    ("icc of noise.png", encoded(RGB, "PNG", icc_profile=bytes(10_000)), WORKS), ("icc of 100 MB.png", lambda path: RGB.save(path, icc_profile=bytes(100_000_000)), PICTURE),
    # no files
    ("nowhere.png", None, NO_FILE), ("a folder.png", lambda path: path.mkdir(), NO_FILE), ("a pipe.png", lambda path: os.mkfifo(path), NO_FILE),
    ("to itself.png", lambda path: path.symlink_to(path), NO_FILE), ("an endless device.png", lambda path: path.symlink_to("/dev/zero"), NO_FILE),
    ("no terminal.png", lambda path: path.symlink_to("/dev/tty"), NO_FILE), ("x" * 300, None, NO_FILE), ("a/" * 3000, None, NO_FILE),
    # names
    ("name with  spaces.png", whole_png, WORKS), ("two\nlines.png", whole_png, WORKS), ("\u5b57 \u0639\u0631\u0628\u064a \U0001f3a8.png", whole_png, WORKS),
    ("per%cent {} $HOME `touch executed`;'\".png", whole_png, WORKS), (os.fsdecode(b"not utf8 \xff.png"), whole_png, WORKS),
    ("nowhere\nat all.png", None, NO_FILE), (os.fsdecode(b"nowhere \xff.png"), None, NO_FILE),
]


# ------------------------------------------------------------------------------------------------------------------
# Data: name, what is in the file, what it comes to, for which task

ROW = json.dumps({"question": "What is 2 + 3?", "answer": "#### 5"}).encode()
ROWS = b"\n".join(ROW.replace(b"2", str(i).encode()) for i in range(20)) + b"\n"
UNREADABLE, NO_ROWS, LACKS, SCHEMA = "cannot be read as", "it holds no example", "a row lacks", "a row is not in this task's schema"


def rows(count=20, **columns):
    return b"".join(json.dumps({"question": f"What is {i} + 3?", "answer": f"#### {i + 3}", **columns}).encode() + b"\n" for i in range(count))


def parquet(table, **options):
    pyarrow.parquet.write_table(pyarrow.table(table), buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def long_line(path, start=b'{"question": "'):
    """A gigabyte, of which the disk holds the start only."""
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(1 << 30)


def calls(target=None, tools=None, **changed):
    turn = {"role": "assistant", "content": "<think></think>", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}], **changed}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}
    row = {"conversations": [{"role": "user", "content": "Call f."}, turn if target is None else target], "tools": [tool] if tools is None else tools}
    return "".join(json.dumps({**row, "conversations": [{"role": "user", "content": f"Call f {i}."}, row["conversations"][1]]}) + "\n"
                   for i in range(12)).encode()


GPQA = ["Record ID", "Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
CSV = (",".join(GPQA) + "\n" + "".join(f"r{i},what {i}?,a,b,c,d\n" for i in range(20))).encode()
DEEP = b"[" * 100_000 + b"]" * 100_000
files = [
    ("whole.jsonl", ROWS, WORKS, "gsm8k"), ("whole.json", ROWS, WORKS, "gsm8k"), ("list.json", json.dumps([json.loads(r) for r in ROWS.splitlines()]).encode(), WORKS, "gsm8k"),
    ("WHOLE.JSONL", ROWS, WORKS, "gsm8k"), ("whole.csv", CSV, WORKS, "gpqa"), ("whole.parquet", parquet({"question": ["1?"] * 20, "answer": ["#### 5"] * 20}), WORKS, "gsm8k"),
    ("mark.jsonl", b"\xef\xbb\xbf" + ROWS, WORKS, "gsm8k"), ("mark.csv", b"\xef\xbb\xbf" + CSV, WORKS, "gpqa"), ("windows.jsonl", ROWS.replace(b"\n", b"\r\n"), WORKS, "gsm8k"),
    ("windows.csv", CSV.replace(b"\n", b"\r\n"), WORKS, "gpqa"), ("no last newline.jsonl", ROWS[:-1], WORKS, "gsm8k"), ("blank lines.jsonl", ROWS.replace(b"\n", b"\n\n \n"), WORKS, "gsm8k"),
    # names
    *[(name, ROWS, "the name must end in .jsonl, .json, .csv or .parquet", "gsm8k") for name in ("rows.txt", "rows", "rows.jsonl.gz", ".jsonl", "rows.py", "rows.pkl")],
    ("nowhere.jsonl", None, NO_FILE, "gsm8k"), ("folder.jsonl", lambda path: path.mkdir(), NO_FILE, "gsm8k"), ("pipe.jsonl", lambda path: os.mkfifo(path), NO_FILE, "gsm8k"),
    ("device.jsonl", lambda path: path.symlink_to("/dev/zero"), NO_FILE, "gsm8k"), ("loop.csv", lambda path: path.symlink_to(path), NO_FILE, "gpqa"),
    ("x" * 300 + ".jsonl", None, NO_FILE, "gsm8k"), ("with  space\n\u5b57\U0001f3a8.jsonl", ROWS, WORKS, "gsm8k"), (os.fsdecode(b"\xff.jsonl"), ROWS, WORKS, "gsm8k"),
    # empty and binary
    *[(f"empty.{kind}", b"", outcome, "gsm8k") for kind, outcome in (("jsonl", NO_ROWS), ("json", NO_ROWS), ("csv", NO_ROWS), ("parquet", UNREADABLE))],
    *[(f"binary.{kind}", np.random.default_rng(3).bytes(10_000), UNREADABLE, "gsm8k") for kind in ("jsonl", "json", "parquet")],
    ("binary.csv", np.random.default_rng(3).bytes(10_000), UNREADABLE, "gpqa"), ("zeros.jsonl", bytes(1000), UNREADABLE, "gsm8k"), ("zeros.csv", bytes(1000), "", "gpqa"),
    ("pickle.jsonl", pickle.dumps(Payload()), UNREADABLE, "gsm8k"), ("pickle.parquet", pickle.dumps(Payload()), UNREADABLE, "gsm8k"), ("picture.json", whole_png, UNREADABLE, "gsm8k"),
    ("blank.jsonl", b"\n \n\t\n", NO_ROWS, "gsm8k"), ("header.csv", CSV.splitlines()[0], NO_ROWS, "gpqa"), ("empty list.json", b"[]", NO_ROWS, "gsm8k"),
    ("no rows.parquet", parquet({"question": pyarrow.array([], "string"), "answer": pyarrow.array([], "string")}), NO_ROWS, "gsm8k"),
    # invalid text
    *[(f"invalid utf8.{kind}", body.replace(b"1", b"\xff"), UNREADABLE, task) for kind, body, task in (("jsonl", ROWS, "gsm8k"), ("csv", CSV, "gpqa"))],
    ("utf16.jsonl", ROWS.decode().encode("utf-16"), UNREADABLE, "gsm8k"), ("utf16.csv", CSV.decode().encode("utf-16"), UNREADABLE, "gpqa"), ("latin1.jsonl", rows(question="\u00fc").replace(b"\\u00fc", b"\xfc"), UNREADABLE, "gsm8k"),
    ("half a pair.jsonl", rows(question="\ud800 what?"), UNREADABLE, "gsm8k"), ("half a pair.json", b"[" + rows(1, answer="\udfff#### 1") + b"]", UNREADABLE, "gsm8k"),
    ("half a pair.toolmind.jsonl", calls(tools=[{"name": "f", "description": "\udc80"}]), UNREADABLE, "toolmind"),
    ("zero characters.jsonl", rows(question="a\0b"), WORKS, "gsm8k"), ("control characters.jsonl", rows(question="\x1b[2J\u202e\x07"), WORKS, "gsm8k"), ("zero characters.csv", CSV.replace(b"what", b"wh\0at"), "", "gpqa"),
    # no JSON, no CSV, no Parquet
    ("cut.jsonl", ROWS[:-5], UNREADABLE, "gsm8k"), ("comma.jsonl", ROWS.replace(b"\n", b",\n"), UNREADABLE, "gsm8k"), ("quotes.jsonl", ROWS.replace(b'"', b"'"), UNREADABLE, "gsm8k"), ("cut list.json", b"[" + ROW, UNREADABLE, "gsm8k"),
    ("two values.json", b"[" + ROW + b"] []", UNREADABLE, "gsm8k"), ("pretty.json", json.dumps(json.loads(ROW), indent=1).encode(), UNREADABLE, "gsm8k"), ("cut.parquet", parquet({"question": ["a"], "answer": ["b"]})[:-20], UNREADABLE, "gsm8k"),
    ("wrong inside.parquet", b"PAR1" + np.random.default_rng(4).bytes(1000) + b"\x10\0\0\0PAR1", "--data ", "gsm8k"), ("open quote.csv", CSV + b'"', UNREADABLE, "gpqa"), ("short row.csv", CSV + b"r99,what?\n", WORKS, "gpqa"),
    ("long row.csv", CSV + b"r99,what?,a,b,c,d,e,f,g\n", WORKS, "gpqa"), ("semicolons.csv", CSV.replace(b",", b";"), LACKS, "gpqa"), ("deep.jsonl", DEEP, UNREADABLE, "gsm8k"), ("deep.json", DEEP, UNREADABLE, "gsm8k"),
    ("deep inside.jsonl", b'{"question": ' + DEEP + b', "answer": "#### 1"}', UNREADABLE, "gsm8k"), ("long number.jsonl", b'{"question": ' + b"9" * 10_000 + b', "answer": "#### 1"}', UNREADABLE, "gsm8k"),
    # columns
    ("wrong columns.jsonl", b'{"prompt": "a", "completion": "b"}\n', LACKS, "gsm8k"), ("wrong columns.csv", b"a,b\n1,2\n", LACKS, "gpqa"), ("wrong columns.parquet", parquet({"a": [1]}), LACKS, "gsm8k"), ("none.jsonl", b"{}\n", LACKS, "gsm8k"),
    *[(f"{kind}.jsonl", json.dumps(value).encode(), LACKS, "gsm8k") for kind, value in (("number", 1), ("string", "a"), ("list", [1]), ("null", None), ("true", True))],
    ("null.jsonl", rows(answer=None), LACKS, "gsm8k"), ("null.json", b"[null]", LACKS, "gsm8k"), ("null.parquet", parquet({"question": ["a", None], "answer": ["#### 1", "#### 2"]}), WORKS, "gsm8k"),
    *[(f"question is {kind}.jsonl", rows(question=value), SCHEMA, "gsm8k") for kind, value in (("number", 1), ("list", ["a"]), ("object", {"a": 1}), ("true", True))],
    *[(f"answer is {kind}.jsonl", rows(answer=value), SCHEMA, "gsm8k") for kind, value in (("number", 1), ("list", ["a"]), ("object", {}))],
    ("nan.jsonl", ROWS.replace(b'"#### 5"', b"NaN"), SCHEMA, "gsm8k"), ("bytes.parquet", parquet({"question": [b"\xff"], "answer": [b"#### 1"]}), SCHEMA, "gsm8k"), ("no answers.jsonl", rows(answer="5"), NO_ROWS, "gsm8k"),
    ("a billion digits.jsonl", rows(answer="#### " + "9" * 100_000), NO_ROWS, "gsm8k"), ("by zero.jsonl", rows(answer="#### 1/0"), NO_ROWS, "gsm8k"), ("empty strings.jsonl", rows(question=""), LACKS, "gsm8k"),
    ("equal rows.jsonl", (ROW + b"\n") * 20, "fewer than --prompts|works", "gsm8k"), ("duplicate ids.csv", CSV.replace(b"r1", b"r2"), WORKS, "gpqa"), ("duplicate columns.csv", CSV.replace(b"Question", b"Record ID"), LACKS, "gpqa"),
    ("duplicate keys.jsonl", ROWS.replace(b"{", b'{"answer": 1, '), WORKS, "gsm8k"),
    # sizes
    ("a gigabyte in a line.jsonl", long_line, "a line is longer than", "gsm8k"), ("a gigabyte.json", functools.partial(long_line, start=b"["), "more than 64 MiB", "gsm8k"),
    ("a gigabyte in a line.csv", functools.partial(long_line, start=CSV), "a line is longer than", "gpqa"), ("columns of 100 MB.csv", b"Record ID" + b"," * 100_000_000, "a line is longer than", "gpqa"),
    ("a million columns.csv", b",".join(b"c%d" % i for i in range(1_000_000)) + b"\n" + b"," * 999_999 + b"\n", "a line is longer than", "gpqa"), ("a million columns.jsonl", json.dumps({f"c{i}": i for i in range(1_000_000)}).encode(), "a line is longer than", "gsm8k"), ("100,000 columns.jsonl", json.dumps({f"c{i}": i for i in range(100_000)}).encode(), LACKS, "gsm8k"),
    ("100,000 columns and the right ones.jsonl", rows(1, **{f"c{i}": i for i in range(100_000)}) + ROWS, WORKS, "gsm8k"), ("10,000 columns.parquet", parquet({f"c{i}": [i] for i in range(10_000)}), "more than 1000 columns", "gsm8k"),
    ("a long question.jsonl", rows(1, question="a " * 1_000_000) + ROWS, WORKS, "gsm8k"), ("only long questions.jsonl", rows(2, question="a " * 100_000), "every prompt is longer than", "gsm8k"), ("a long field.csv", CSV + b"r99," + b"a" * 200_000 + b",a,b,c,d\n", UNREADABLE, "gpqa"),
    ("a list of a million.json", b"[" + b",".join([b"1"] * 1_000_000) + b"]", LACKS, "gsm8k"), ("bomb.parquet", lambda path: path.write_bytes(parquet({"question": pyarrow.array(["a" * 10_000_000] * 100), "answer": ["#### 1"] * 100})), "16 rows of more than 64 MiB", "gsm8k"),
    # tool calls
    ("whole.jsonl", calls(), WORKS, "toolmind"), ("no calls.jsonl", calls(tool_calls=None), NO_ROWS, "toolmind"), ("no tools.jsonl", calls(tools=[]), LACKS, "toolmind"),
    *[(f"conversations are {kind}.jsonl", json.dumps({"conversations": value, "tools": []}).encode(), outcome, "toolmind")
      for kind, value, outcome in (("empty", [], LACKS), ("number", 3, LACKS), ("string", "a", NO_ROWS), ("numbers", [1, 2], LACKS), ("object", {"a": 1}, NO_ROWS))],
    *[(f"tools are {kind}.jsonl", calls(tools=value), SCHEMA, "toolmind") for kind, value in (("number", 1), ("numbers", [1]), ("nameless", [{}]), ("string", "a"))],
    *[(f"calls are {kind}.jsonl", calls(tool_calls=value), SCHEMA, "toolmind") for kind, value in (("number", 1), ("string", "a"), ("empty calls", [{}]), ("numbers", [1]))],
    *[(f"arguments are {kind}.jsonl", calls(tool_calls=[{"function": {"name": "f", "arguments": value}}]), NO_ROWS, "toolmind") for kind, value in (("number", 1), ("string", "a"), ("list", [1]))],
    ("name is a list.jsonl", calls(tool_calls=[{"function": {"name": ["f"], "arguments": {}}}]), SCHEMA, "toolmind"), ("no role.jsonl", b'{"conversations": [{"content": "a"}, {}], "tools": []}', LACKS, "toolmind"),
    ("content is a number.jsonl", json.dumps({"conversations": [{"role": "user", "content": 5}, {"role": "assistant", "tool_calls": [{"name": "f"}]}], "tools": []}).encode(), LACKS, "toolmind"),
    ("unknown role.jsonl", calls().replace(b'"user"', b'"emperor"'), NO_ROWS, "toolmind"), ("deep arguments.jsonl", calls(tool_calls=[{"function": {"name": "f", "arguments": "[" * 50_000}}]), NO_ROWS, "toolmind"),
    ("deep schema.jsonl", calls(tools=[functools.reduce(lambda inner, _: {"name": "f", "parameters": {"type": "object", "properties": {"x": inner}}}, range(100), {})]), WORKS, "toolmind"),
]


# ------------------------------------------------------------------------------------------------------------------
# Model folders: name, how the tiny model's folder is changed, what it comes to

def change(file, **changed):
    """Change keys of a JSON file; None removes one."""
    def edit(folder):
        content = {**json.loads((folder / file).read_text()), **changed}
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return edit


def write(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(3)}, folder / "pytorch_model.bin")


def both(*edits):
    return lambda folder: [edit(folder) for edit in edits]


CODE = b"open('executed', 'w')\nclass Config: pass\nclass Model: pass\nclass Processor: pass\n"
own_code = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model", "AutoProcessor": "code.Processor", "AutoTokenizer": ["code.Config", None]}
NO_IMAGES, TEMPLATE, NO_CONFIG = "ART needs a model that takes images", "it cannot put an image before a text", "it holds no config.json"
models = [
    ("whole", lambda folder: None, WORKS), ("with  space", lambda folder: None, WORKS), ("two\nlines \u5b57", lambda folder: None, WORKS),
    # missing parts
    ("no config", remove("config.json"), NO_CONFIG), ("nothing", lambda folder: [file.unlink() for file in folder.iterdir()], NO_CONFIG),
    ("a file", lambda folder: (shutil.rmtree(folder), folder.write_text("{}")), NO_CONFIG), ("config is a folder", lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()), NO_CONFIG),
    ("no processor", remove("processor_config.json"), NO_IMAGES), ("no tokenizer", remove("tokenizer.json", "tokenizer_config.json"), TEMPLATE), ("no weights", remove("model.safetensors"), "it holds no .safetensors weights"),
    ("no template", remove("chat_template.jinja"), TEMPLATE), ("no generation config", remove("generation_config.json"), WORKS),
    # not what they should be
    *[(f"{file} of {kind}", write(file, content), outcome) for file, outcome in (("config.json", NO_IMAGES), ("processor_config.json", NO_IMAGES), ("tokenizer.json", NO_IMAGES))
      for kind, content in (("nothing", b""), ("noise", b"\xff\xfe\0"), ("text", b"hello"), ("a list", b"[]"), ("an object", b"{}"), ("null", b"null"), ("half", b'{"model_type": "qw'), ("depth", DEEP))],
    ("text-only model", both(change("config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"]), remove("processor_config.json")), NO_IMAGES),
    ("unknown type", change("config.json", model_type="of the future"), NO_IMAGES), ("no type", change("config.json", model_type=None), "ART needs a model that takes images|works"),
    ("type is a number", change("config.json", model_type=3), NO_IMAGES), ("layers below zero", change("config.json", text_config={"num_hidden_layers": -1}), "ART needs a model that takes images|works"),
    ("processor of another kind", change("processor_config.json", processor_class="NoSuchProcessor"), "ART needs a model that takes images|works"),
    # templates
    ("template of nothing", write("chat_template.jinja", b""), TEMPLATE), ("template with an error", write("chat_template.jinja", b"{% if %}"), TEMPLATE), ("template without images", write("chat_template.jinja", b"{{ messages[0].role }}"), TEMPLATE),
    ("template that raises", write("chat_template.jinja", b"{{ raise_exception('no') }}"), TEMPLATE), ("template that reaches out", write("chat_template.jinja", b"{{ ''.__class__.__mro__[1].__subclasses__() }}"), TEMPLATE),
    ("template that opens files", write("chat_template.jinja", b"{{ cycler.__init__.__globals__.os.system('touch executed') }}"), TEMPLATE), ("template that is noise", write("chat_template.jinja", b"\xff\xfe"), "it cannot put an image before a text|ART needs a model"),
    # weights that are code
    ("pickled weights", pickled, "pickled ones are refused"), ("pickled payload", both(remove("model.safetensors"), write("pytorch_model.bin", pickle.dumps(Payload()))), "pickled ones are refused"),
    ("pickled beside", write("pytorch_model.bin", pickle.dumps(Payload())), WORKS),
    # code in the folder
    ("own code, known type", both(change("config.json", auto_map=own_code), write("code.py", CODE)), WORKS), ("own code, unknown type", both(change("config.json", auto_map=own_code, model_type="own"), write("code.py", CODE)), "by --trust-remote-code only"),
    ("own processor", both(change("processor_config.json", auto_map=own_code, processor_class="Processor"), write("code.py", CODE)), "by --trust-remote-code only|works"),
    ("own tokenizer", both(change("tokenizer_config.json", auto_map=own_code, tokenizer_class="Config"), write("code.py", CODE)), "by --trust-remote-code only|works"),
    ("code of others", change("config.json", auto_map={"AutoConfig": "nobody/nothing--code.Config"}, model_type="own"), "by --trust-remote-code only"),
    ("sitecustomize", both(write("sitecustomize.py", CODE), write("torch.py", CODE), write("conftest.py", CODE)), WORKS),
]


# ------------------------------------------------------------------------------------------------------------------
# Flags: program, flag, values, what they come to

numbers = [(program, flag, low, high) for program, flags in {
    "art": [("--limit", 1, None), ("--rng", 0, None), ("--steps", 1, None), ("--warmup", 0, None), ("--group-size", 2, 1024), ("--prompts", 1, None), ("--updates", 1, None),
            ("--rounds", 1, None), ("--overlong-cache", 0, None), ("--max-new-tokens", 1, None), ("--max-model-len", 1, None), ("--max-num-seqs", 1, 65536), ("--tokens-per-microbatch", 1, None), ("--validation", 1, None),
            ("--validate-every", 1, None), ("--timeout", 1, None), ("--size", 1, 2048)],
    "eval": [("--limit", 1, None), ("--timeout", 1, None), ("--size", 1, 2048), ("--rng", 0, None), ("--max-new-tokens", 1, None), ("--max-model-len", 1, None)]}.items() for flag, low, high in flags]
INVALID = "invalid number"
flags = [
    *[(program, [f"{flag}={value}"], INVALID) for program, flag, low, high in numbers for value in (str(low - 1), "-1e9", "nan", "1.5", "one", "", "9" * 30, "9" * 5000, *([str(high + 1)] if high else []))],
    *[("art", [f"{flag}={value}"], INVALID) for flag in ("--lr", "--eps-low", "--eps-high", "--weight-cap", "--max-grad-norm", "--gpu-memory-utilization") for value in ("-1", "nan", "inf", "-inf", "1e400", "x", "")],
    *[("eval", ["--gpu-memory-utilization", value], INVALID) for value in ("-1", "nan", "inf", "1.5", "x")], *[("eval", ["--presence-penalty", value], INVALID) for value in ("-2.1", "nan", "inf", "3", "x")],
    *[(program, [flag], "expected one argument|expected at least one argument") for program in ("art", "eval") for flag in ("--task", "--model", "--data", "--limit", "--size")], ("art", ["--out"], "expected one argument"), ("art", ["--seed"], "expected one argument"),
    *[(program, ["--task", task], "invalid choice") for program in ("art", "eval") for task in ("", "GSM8K", "../gsm8k", "gsm8k\n", "\U0001f3a8")], ("art", ["--no-such-flag"], "unrecognized arguments"), ("art", ["more"], "unrecognized arguments"),
    ("eval", ["--no-such-flag"], "unrecognized arguments"), ("eval", ["--task", "gsm8k", "gsm8k"], "one is named twice"), ("art", ["--model", ""], "--model "), ("eval", ["--model", ""], "--model "), ("art", ["--data", ""], "|works"),
    *[(program, ["--model", name], "--model ") for program in ("art", "eval") for name in ("nobody/nothing", "../nothing", "a/b/c", "/nowhere", "http://127.0.0.1/x", "x" * 300, "two\nlines", "\U0001f3a8", "; touch executed", os.fsdecode(b"\xff"))],
    *[("art", ["--size", size], "sizes that work near it") for size in ("2", "200", "255", "257", "2047")], ("art", ["--max-new-tokens", "512", "--max-model-len", "512"], "every prompt is longer than"),
    ("art", ["--validation", "1000000"], "fewer than --prompts"), ("art", ["--prompts", "1000000"], "fewer than --prompts"), ("art", ["--limit", "1"], "fewer than --prompts"),
    ("art", ["--lr", "0"], WORKS), ("art", ["--weight-cap", "0"], WORKS), ("art", ["--rng", str(2**31)], WORKS), ("eval", ["--rng", str(2**31)], WORKS), ("eval", ["--presence-penalty", "-2"], WORKS), ("eval", ["--size", "1"], WORKS), ("eval", ["--size", "2048"], TOO_MANY),
    # folders
    *[("art", ["--out", "out/" + name], WORKS) for name in ("with  space", "two\nlines", "\u5b57 \u0639\u0631\u0628\u064a \U0001f3a8", "a/b/c/d", "per%cent {} $HOME `touch executed`;'\"", os.fsdecode(b"not utf8 \xff"), ".", "-x", "trailing/", "~")],
    *[("art", ["--out", name], "name another folder") for name in ("x" * 300, "/dev/null", "/dev/null/x", "/proc/x", "a/" * 3000)], ("art", ["--resume"], "no run to go on with"),
]


# ------------------------------------------------------------------------------------------------------------------
# What each case is held to

class Accepted(Exception):
    """Raised where a model would be loaded: everything before it went well."""


def status(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e6            # GB


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """Run a program up to where a model would be loaded; check all that every case is held to; return its sentence or WORKS."""
    calls = []

    def accept(*args, **kwargs):
        raise Accepted
    monkeypatch.setattr(art, "load_engine", accept)
    monkeypatch.setattr(tasks, "load_engine", accept)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: calls.append(address))
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda self, command, *args, **kwargs: calls.append(command))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(program, *argv):
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, argv)])
        signal.alarm(30)
        before, started = sorted(p for p in tmp_path.rglob("*") if "out" not in p.parts), time.monotonic()
        Path("/proc/self/clear_refs").write_text("5")                           # forget the peak so far
        resident = status("VmRSS")
        result, out, err = WORKS, *(io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        try:
            tasks.exit_with(lambda: tasks.main(tasks.parse_args()) if program == "eval" else art.train(art.parse_args()))
        except Accepted:
            pass
        except SystemExit as error:
            err.flush()
            err = err.buffer.getvalue().decode()
            assert error.code == 2, err
            result = err[err.rindex(".py: error: ") + 12:].strip()
            assert result and "Traceback" not in err
        signal.alarm(0)
        print(f"{program}: {time.monotonic() - started:.1f} s, {status('VmHWM') - resident:.2f} GB: {result}", file=sys.__stdout__)
        assert time.monotonic() - started < 30
        assert status("VmHWM") - resident < 1.3                                 # beside 0.6 GB for Python with torch and transformers
        assert calls == [] and not Path("executed").exists()
        assert sorted(p for p in tmp_path.rglob("*") if "out" not in p.parts) == before
        return result
    return run


def expected(result, expectation):
    assert any(result == part if part == WORKS else part in result and result != WORKS for part in expectation.split("|")), result


def made(folder, name, content):
    """The file of a case: `content` is bytes, a function that makes it, or None for none."""
    path = folder / name
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content)
    return path


@pytest.fixture
def one_processor(monkeypatch, processor):
    """The tiny model's processor, loaded once for all the cases that are not about models."""
    for module in art, tasks:
        monkeypatch.setattr(module, "load_processor", lambda *args, real=tasks.load_processor: processor if args[0] == str(TINY) else real(*args))


def ids(cases):
    return [ascii(case[0])[1:-1][:40] for case in cases]


EVAL = ["--task", "gsm8k", "--model", str(TINY), "--data", data("gsm8k", "test"), "--limit", "4"]
ART = ["--task", "gsm8k", "--model", str(TINY), "--data", data("gsm8k", "train"), "--limit", "40", "--validation", "4", "--out", "out"]


@pytest.mark.parametrize("name, content, expectation", pictures, ids=ids(pictures))
def test_pictures(outcome, one_processor, tmp_path, name, content, expectation):
    """As an arm of eval.py and as the seed of art.py."""
    path = made(tmp_path, name, content)
    expected(outcome("eval", path, *EVAL), expectation)
    expected(outcome("art", *ART, "--seed", path), expectation)


@pytest.mark.parametrize("name, content, expectation, task", files, ids=ids(files))
def test_data_files(outcome, one_processor, tmp_path, name, content, expectation, task):
    """As held-out questions of eval.py; where they are refused, as the training questions of art.py, too."""
    path = made(tmp_path, name, content)
    result = outcome("eval", "none", "--task", task, "--model", TINY, "--data", path)
    expected(result, expectation) if expectation else None
    if result != WORKS:
        assert outcome("art", "--task", task, "--model", TINY, "--data", path, "--out", "out") == result.replace("test split", "train split")


@pytest.mark.parametrize("name, edit, expectation", models, ids=ids(models))
def test_model_folders(outcome, tmp_path, name, edit, expectation):
    folder = tmp_path / name
    folder.mkdir()
    for file in TINY.iterdir():
        if file.is_file() and file.suffix != ".py":
            shutil.copy(file, folder)
    edit(folder)
    expected(outcome("eval", "none", *EVAL, "--model", folder), expectation)
    expected(outcome("art", *ART, "--model", folder), expectation)


@pytest.mark.parametrize("program, argv, expectation", flags, ids=ids([(f"{f[0]} {f[1]}",) for f in flags]))
def test_flags(outcome, one_processor, program, argv, expectation):
    expected(outcome(program, *(["none", *EVAL] if program == "eval" else ART), *argv), expectation)


# ------------------------------------------------------------------------------------------------------------------
# A sample of them in processes of their own, where the engine is real and memory is counted from the start

def weights(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    return edit


@pytest.mark.parametrize("edit", [
    lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1_000_000]),
    write("model.safetensors", b""),
    weights(lambda tensors: {}),
    weights(lambda tensors: {name: t[..., :-1].contiguous() for name, t in tensors.items()}),
], ids=["cut off", "empty", "no tensors", "other shapes"])
def test_broken_weights_are_refused_by_the_engine(tmp_path, edit):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in TINY.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    edit(folder)
    result = subprocess.run([sys.executable, ROOT / "eval.py", "none", *EVAL, "--model", folder], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert re.match(r"eval\.py: error: --model .*: vLLM cannot start it \(", result.stderr.strip().splitlines()[-1])
    assert "Traceback" not in result.stderr + result.stdout


def test_a_template_without_an_end(tmp_path):
    for file in TINY.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    (tmp_path / "chat_template.jinja").write_text(loop + (TINY / "chat_template.jinja").read_text())
    started = time.monotonic()
    result = subprocess.run([sys.executable, ROOT / "eval.py", "none", *EVAL, "--model", tmp_path], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and time.monotonic() - started < 30
    assert result.stderr.strip().splitlines()[-1] == f"eval.py: error: --model {tmp_path}: its chat template does not come to an end."


MEASURED = """import os, sys                # a small process in between: a child's peak counts from its parent's size
_, status, usage = os.wait4(os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:]), 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))"""


@pytest.mark.parametrize("argv", [
    ["eval.py", "largest 16 bit.png", *EVAL, "--max-model-len", "9"], ["eval.py", "largest alpha.png", *EVAL, "--max-model-len", "9"],
    ["art.py", *ART, "--seed", "largest float.tif", "--prompts", "100"], ["art.py", *ART, "--size", "2047"],
    ["eval.py", "none", *EVAL[:-2], "--data", "a gigabyte in a line.jsonl"], ["eval.py", "none", *EVAL, "--data", "a gigabyte.json"],
    ["eval.py", "none", *EVAL, "--data", "bomb.parquet"], ["eval.py", "bomb.tif", *EVAL], ["eval.py", os.fsdecode(b"nowhere \xff.png"), *EVAL],
], ids=lambda argv: ascii(argv[1:2] + argv[-1:])[:50])
def test_the_largest_inputs_in_a_process_of_their_own(tmp_path, argv):
    """Below 2 GB of memory from start to end, within 30 seconds."""
    for name, content, *_ in pictures + files:
        if name in argv:
            made(tmp_path, name, content)
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", MEASURED, sys.executable, ROOT / argv[0], *argv[1:]], cwd=tmp_path,
                            capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    memory, err = int(result.stdout.split()[-1]) / 1e6, result.stderr
    print(f"{time.monotonic() - started:.1f} s, {memory:.2f} GB: {err}")
    assert result.returncode == 2 and "Traceback" not in err and ".py: error: " in err.splitlines()[-1]
    assert memory < 2 and time.monotonic() - started < 30
