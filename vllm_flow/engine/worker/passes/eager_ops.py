"""The operators of eager steps in an engine that compiles: those of one that does not.

Where vLLM compiles, it leaves norms, activations and rotary embeddings to Inductor, and their modules run
operation by operation when nothing compiles them. Eager steps take vLLM's own kernels instead, which
an engine started with ``--enforce-eager`` takes.

Seams: ``CustomOp.dispatch_forward``, and the priorities of vLLM's IR operators, which the platform
chooses. What the operator configured himself stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from vllm.config.compilation import CompilationMode
from vllm.model_executor.custom_op import CustomOp
from vllm.platforms import current_platform

from vllm_flow.engine.replacing import replaced

ROOMS = tuple(
    f"vllm.model_executor.layers.{name}" for name in ("layernorm", "activation", "rotary_embedding")
)
"""Where vLLM keeps what Inductor would fuse; others' operators bring their own kernels."""


def eager_operators(
    decoder: nn.Module, vllm_config: Any
) -> Callable[[], AbstractContextManager[None]]:
    """A context in which a decoder's modules run with the kernels of an engine that compiles nothing."""
    if vllm_config.compilation_config.mode == CompilationMode.NONE:
        return nullcontext
    kernels = [
        (module, _kernel(module))
        for module in decoder.modules()
        if isinstance(module, CustomOp) and _left_to_inductor(module, vllm_config)
    ]
    priority = _eager_priority(vllm_config)

    @contextmanager
    def active() -> Iterator[None]:
        with replaced("_forward_method", kernels), priority():
            yield

    return active


def _left_to_inductor(module: CustomOp, vllm_config: Any) -> bool:
    if not type(module).__module__.startswith(ROOMS):
        return False
    name = getattr(type(module), "name", None)
    switched_off = f"-{name}" in vllm_config.compilation_config.custom_ops
    return not (module._enforce_enable or type(module).enabled() or switched_off)


def _kernel(module: CustomOp) -> Callable[..., Any]:
    """What the module would run if its operator were on."""
    module._enforce_enable = True
    try:
        return module.dispatch_forward(compile_native=False)
    finally:
        module._enforce_enable = False


def _eager_priority(vllm_config: Any) -> Callable[[], AbstractContextManager[None]]:
    """The platform's choice of IR kernels where nothing is compiled; none of its own for an operator's."""
    eager = copy.copy(vllm_config)
    eager.compilation_config = copy.copy(vllm_config.compilation_config)
    eager.compilation_config.mode = CompilationMode.NONE
    chosen, compiled, uncompiled = (
        vllm_config.kernel_config.ir_op_priority,
        current_platform.get_default_ir_op_priority(vllm_config),
        current_platform.get_default_ir_op_priority(eager),
    )
    return uncompiled.set_priority if chosen == compiled != uncompiled else nullcontext
