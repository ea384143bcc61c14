"""Which variants of a kernel Triton would compile for some launches; no GPU is needed for that.

Triton compiles a kernel anew for other constants, for integers that are 1 or multiples of 16, and for pointers that
are multiples of 16 bytes, except where the kernel forbids it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import vllm.triton_utils


def with_triton(name: str) -> ModuleType:
    """A second copy of a module, whose kernels are Triton's even where vLLM, which sees no device, has a stand-in."""
    import triton

    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with (
        mock.patch.object(vllm.triton_utils, "triton", triton),
        mock.patch.object(vllm.triton_utils, "tl", triton.language),
        mock.patch.object(triton.knobs.runtime, "interpret", False),
        mock.patch.dict(sys.modules, {name: module}),
    ):
        spec.loader.exec_module(module)
    return module


class Launches:
    """Stands in for a kernel of a module: runs nothing, and remembers what would be compiled."""

    def __init__(self, module: ModuleType, kernel: str) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        made = getattr(module, kernel)
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self._bind = create_function_from_signature(made.signature, made.params, backend)
        self.variants: set[Any] = set()
        self.count = 0
        setattr(module, kernel, self)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.count += 1
            _, specialised, options = self._bind(*args, **kwargs)
            self.variants.add((tuple(specialised), tuple(sorted(options.items()))))

        return launch
