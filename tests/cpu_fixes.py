"""What vLLM's CPU package needs on some machines. tests/setup.sh puts this file into the virtual environment, with a line that
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


def multiply_in_float32():
    """A processor without AVX-512: torch multiplies bfloat16 there some ten times slower than float32. The sums are float32 in
    both ways; the result is rounded to bfloat16."""
    functional = importlib.import_module("torch.nn.functional")
    for name in "linear", "conv1d":
        def wider(x, weight, bias=None, *args, real=getattr(functional, name), **options):
            if x.dtype.is_floating_point and x.dtype.itemsize == 2 and not x.requires_grad:
                return real(x.float(), weight.float(), None if bias is None else bias.float(), *args, **options).to(x.dtype)
            return real(x, weight, bias, *args, **options)
        setattr(functional, name, wider)


FIXES = {"torchvision": declare_operators, "vllm": multiply_in_float32}


def on_import(name):
    if name in FIXES:                                   # lib64/ may be lib/ again, and the line run twice
        sys.meta_path.insert(0, OnImport(name, FIXES.pop(name)))
