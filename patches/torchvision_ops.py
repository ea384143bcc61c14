"""Lets `import torchvision` work where its compiled part does not load beside a CPU build of torch.

Set-up copies this file into site-packages as `_vllm_flow_torchvision_ops.py`, with a `.pth` that
calls `install()` at interpreter start, so it reaches every process, also those that vLLM spawns.
Hence: standard library only at the top, no torch until torchvision itself is imported, and nothing
here knows about vLLM-Flow.

Why: torchvision's `_meta_registrations` describes `torchvision::nms` and `torchvision::qnms`, which
only its compiled part defines; without it the import dies with "operator torchvision::nms does not
exist", and with it transformers and vLLM. Defining the two schemas is enough for the import and for
the pure Python transforms. Calling `nms` still fails, as it should: there is no kernel.
"""

import sys
from importlib.machinery import PathFinder

TARGET = "torchvision"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries = []  # a torch.library.Library undoes its definitions when it is collected


def define_operators(package_dir):
    """Define the missing operators; leave everything alone where the compiled part loads.

    `package_dir` is torchvision's directory. Returns True where operators had to be defined.
    """
    import glob
    import os

    import torch

    for path in glob.glob(os.path.join(package_dir, "_C*.so")):
        try:
            torch.ops.load_library(path)
            return False
        except OSError:
            continue
    library = torch.library.Library(TARGET, "FRAGMENT")
    for schema in SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
            library.define(schema)
    _libraries.append(library)
    return True


class Finder:
    """Finds torchvision as usual, and has its loader define the operators just before it runs."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != TARGET:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not spec.submodule_search_locations:
            return None
        execute = spec.loader.exec_module
        package_dir = list(spec.submodule_search_locations)[0]

        def exec_module(module):
            define_operators(package_dir)
            execute(module)

        spec.loader.exec_module = exec_module
        return spec


def install():
    """Put the finder in front of the others, once."""
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)
