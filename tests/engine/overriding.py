"""Finds what of vLLM's this package overrides or wraps, and whether every call of it would still fit.

Overrides are found, not listed: methods of our classes whose names their vLLM bases have. Only for a
mixin that a live object takes on (``adoption``) the classes it is mixed before are named here.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import vllm
from torch import nn
from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.v1.worker.block_table import MultiGroupBlockTable
from vllm.v1.worker.cpu.model_runner import CPUModelRunner as CpuRunnerV2
from vllm.v1.worker.cpu_model_runner import CPUModelRunner as CpuRunnerV1
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu.model_states import default
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

import vllm_flow.engine
import vllm_flow.models
from vllm_flow.engine.connectors import FlowConnector
from vllm_flow.engine.cpu_groups import StackedTables
from vllm_flow.engine.model_call import FlowModel, FlowScoringModel
from vllm_flow.engine.prompt_scores import FlowPromptLogprobs
from vllm_flow.engine.runner_v1 import FlowRunnerV1
from vllm_flow.engine.runner_v2 import FlowModelState, FlowRunnerV2

MIXED_BEFORE: dict[type, tuple[type, ...]] = {
    FlowRunnerV1: (RunnerV1, CpuRunnerV1),
    FlowRunnerV2: (RunnerV2, CpuRunnerV2),
    FlowModelState: (default.DefaultModelState,),
    FlowModel: (nn.Module,),
    FlowScoringModel: (nn.Module, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration),
    FlowPromptLogprobs: (PromptLogprobsWorker,),
    StackedTables: (MultiGroupBlockTable,),
    FlowConnector: (SupportsHMA,),
}

_KINDS = inspect.Parameter
_POSITIONAL = (_KINDS.POSITIONAL_ONLY, _KINDS.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Override:
    """One method of ours in the place of one of theirs."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.ours.__qualname__} over {self.theirs.__qualname__}"


def overrides() -> Iterator[Override]:
    """Every method of this package's engine and models that takes the place of one of vLLM's."""
    for kind in our_classes():
        others = MIXED_BEFORE.get(kind, ())
        bases = [base for base in kind.__mro__ if base.__module__.startswith("vllm.")]
        mixins = [base for base in kind.__mro__ if _is_ours(base)]
        names = {name for mixin in mixins for name in vars(mixin)} - {"__init__", "__doc__"}
        for name in sorted(names):
            ours = _function(kind, name)
            if ours is None or not _is_ours(ours):
                continue
            for base in (*others, *bases):
                theirs = _function(base, name)
                if theirs is not None and not _is_ours(theirs):
                    yield Override(ours, theirs)
                    if base in bases:
                        break  # the others' methods are behind this one


def our_classes() -> list[type]:
    """The classes that the modules of this package define, in the engine and among the models."""
    found: dict[type, None] = {}
    for package in (vllm_flow.engine, vllm_flow.models):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for kind in vars(importlib.import_module(info.name)).values():
                if isinstance(kind, type) and _is_ours(kind):
                    found[kind] = None
    return list(found)


def adopted_names() -> set[str]:
    """Classes that the source gives to :func:`vllm_flow.engine.adoption.adopt`."""
    found = set()
    for path in Path(vllm_flow.engine.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "adoption.adopt":
                found.add(ast.unparse(node.args[1]))
    return found


def misfits(ours: Callable[..., Any], theirs: Callable[..., Any]) -> list[str]:
    """Calls that ``theirs`` takes and ``ours`` would not, or would understand otherwise; [] if none."""
    mine, other = _parameters(ours), _parameters(theirs)
    kinds = {parameter.kind for parameter in mine.values()}
    rest, named_rest = _KINDS.VAR_POSITIONAL in kinds, _KINDS.VAR_KEYWORD in kinds
    places = [p.name for p in mine.values() if p.kind in _POSITIONAL]
    wrong = []
    for place, parameter in enumerate(other.values()):
        name, kind = parameter.name, parameter.kind
        if kind == _KINDS.VAR_POSITIONAL:
            fits = rest
        elif kind == _KINDS.VAR_KEYWORD:
            fits = named_rest
        else:
            by_name = named_rest if name not in mine else mine[name].kind in _NAMED
            by_place = places[place] == name if place < len(places) else rest
            fits = (by_name or kind == _KINDS.POSITIONAL_ONLY) and (
                by_place or kind == _KINDS.KEYWORD_ONLY
            )
            if fits and kind in _POSITIONAL and name in mine and name not in places:
                fits = most_by_place(theirs) <= place  # else it would be lost among the rest
        if not fits:
            wrong.append(str(parameter))
    needed = [
        f"{p.name} is needed"
        for p in mine.values()
        if p.default is _KINDS.empty and p.kind in (*_POSITIONAL, _KINDS.KEYWORD_ONLY)
    ]
    return wrong + [text for text in needed if text.split()[0] not in other]


_NAMED = (_KINDS.POSITIONAL_OR_KEYWORD, _KINDS.KEYWORD_ONLY)


def most_by_place(function: Callable[..., Any]) -> int:
    """Most arguments that vLLM's workers give this method by place."""
    counts = [
        len(node.args)
        for tree in _worker_sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == function.__name__
        and not any(isinstance(argument, ast.Starred) for argument in node.args)
    ]
    return max(counts, default=0)


@lru_cache(maxsize=1)
def _worker_sources() -> list[ast.Module]:
    folder = Path(vllm.__file__).parent / "v1/worker"
    return [ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")]


def _is_ours(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("vllm_flow")


def _function(kind: type, name: str) -> Callable[..., Any] | None:
    """The function behind a class's method of whatever kind, None for what is no method."""
    found = inspect.getattr_static(kind, name, None)
    if isinstance(found, classmethod | staticmethod):
        found = found.__func__
    return found if inspect.isfunction(found) else None


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """By name, without the instance or class."""
    # A wrapper shows what it takes itself, not what it wraps.
    signature = inspect.signature(function, follow_wrapped=False)
    return {
        name: parameter
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
    }
