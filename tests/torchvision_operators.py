"""For a CPU torch beside a CUDA torchvision: declares, when torchvision is imported, the two operators whose library
cannot load. tests/setup.sh puts this file into the virtual environment, and only where `import torchvision` fails."""

import sys


class DeclareOperators:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch
            for operator in "nms", "qnms":
                torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, DeclareOperators())
