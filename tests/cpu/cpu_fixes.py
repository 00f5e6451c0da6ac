"""What vLLM's CPU package needs on some machines. tests/cpu/setup.sh puts this file into the virtual environment, with a line that
calls `on_import` at each start of Python for each of the two that is needed there."""

import importlib
import sys


class OnImport:
    """Runs `fix` when a module called `name` is about to be imported."""

    def __init__(self, name, fix):
        self.name, self.fix = name, fix

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            sys.meta_path.remove(self)
            self.fix()


def declare_operators():
    """A CPU torch beside a CUDA torchvision: the two operators whose library cannot load."""
    library = importlib.import_module("torch.library")
    for operator in "nms", "qnms":
        library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def multiply_in_float32(rows=64):
    """A processor without AVX-512: torch multiplies bfloat16 there some ten times slower than float32. The sums are float32 in
    both ways; the result is rounded to bfloat16. So many rows at a time, so that a row's result does not depend on the others."""
    functional = importlib.import_module("torch.nn.functional")
    linear, conv1d, pad, cat = functional.linear, functional.conv1d, functional.pad, importlib.import_module("torch").cat

    def narrow(x):
        return x.dtype.is_floating_point and x.dtype.itemsize == 2 and not x.requires_grad

    def wider_linear(x, weight, bias=None):
        if not narrow(x):
            return linear(x, weight, bias)
        flat, bias, weight = x.reshape(-1, x.shape[-1]), None if bias is None else bias.float(), weight.float()
        parts = pad(flat.float(), (0, 0, 0, -len(flat) % rows)).split(rows)
        return cat([linear(part, weight, bias) for part in parts])[:len(flat)].to(x.dtype).reshape(*x.shape[:-1], -1)

    def wider_conv1d(x, weight, bias=None, *args, **options):
        if not narrow(x):
            return conv1d(x, weight, bias, *args, **options)
        return conv1d(x.float(), weight.float(), None if bias is None else bias.float(), *args, **options).to(x.dtype)
    functional.linear, functional.conv1d = wider_linear, wider_conv1d


FIXES = {"torchvision": declare_operators, "vllm": multiply_in_float32}


def on_import(name):
    if name in FIXES:                                   # lib64/ may be lib/ again, and the line run twice
        sys.meta_path.insert(0, OnImport(name, FIXES.pop(name)))
