"""Triton's interpreter without what it does anew at every launch although nothing has changed.

Before each kernel, and before each function that a kernel calls, Triton 3.7 replaces a few hundred members of
``triton.language``; it puts them back after the kernel, and copies every argument's whole storage to the host
and back. In a process that only interprets, and whose tensors are on the host, once is enough and nothing has
to be copied: what the kernels compute is the same. And of each sum and product of integers it finds out whether it
overflows, a fifth of the time, to tell it in debug mode alone.

And with masks that are made of numbers, as they are where one side of a comparison is a scalar (vLLM's kernels that
draft from the text): Triton 3.7's interpreter takes booleans alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any


class _Stays:
    """In the place of the scope that would take the members back."""

    def restore(self) -> None:
        pass


def install() -> None:
    """Patch the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang
    patched: set[bool] = set()

    def patch_once(fn: Any) -> _Stays:
        # A kernel's module knows triton.language, or its core alone, which has fewer members.
        whole = any(value is tl for value in fn.__globals__.values())
        if whole not in patched:
            patch_lang(fn)
            patched.add(whole)
        return _Stays()

    def as_they_are(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs

    def truth(mask: Any) -> Any:
        return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load = lambda self, ptrs, mask, *args, **kwargs: load(
        self, ptrs, truth(mask), *args, **kwargs
    )
    builder.create_masked_store = lambda self, ptrs, value, mask, *args: store(
        self, ptrs, value, truth(mask), *args
    )
    shared = interpreter.interpreter_builder
    shared.options = replace(shared.options, sanitize_overflow=False)
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor._init_args_hst = as_they_are
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
