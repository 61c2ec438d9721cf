"""Declares two operators of torchvision that its import asks for; runs as Python starts.

torchvision's wheel is built for the CUDA build of torch: beside the CPU build its compiled part
does not load, and `import torchvision` stops as it describes operators that nobody declared.
SGLang imports it for images only; no operator of it is ever called here.
"""

import importlib.abc
import importlib.util
import sys


class _DeclareFirst(importlib.abc.MetaPathFinder):
    """Declares the operators at the first import of torchvision, not at every start of Python."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library = library  # an operator lives as long as its library object
            sys.modules["_torchvision_operators"] = library
        return None


sys.meta_path.insert(0, _DeclareFirst())
