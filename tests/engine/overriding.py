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
from functools import cache, lru_cache
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
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu.model_states import default
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

import vllm_flow.engine
import vllm_flow.models
from vllm_flow.engine.core.connectors import FlowConnector
from vllm_flow.engine.worker.cpu_groups import StackedTables
from vllm_flow.engine.worker.model_call import FlowModel, FlowScoringModel
from vllm_flow.engine.worker.prompt_scores import FlowPromptLogprobs
from vllm_flow.engine.worker.runner_v1 import FlowRunnerV1
from vllm_flow.engine.worker.runner_v2 import FlowGraphManager, FlowModelState, FlowRunnerV2

MIXED_BEFORE: dict[type, tuple[type, ...]] = {
    FlowRunnerV1: (RunnerV1, CpuRunnerV1),
    FlowRunnerV2: (RunnerV2, CpuRunnerV2),
    FlowModelState: (default.DefaultModelState,),
    FlowModel: (nn.Module,),
    FlowScoringModel: (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration),
    FlowPromptLogprobs: (PromptLogprobsWorker,),
    StackedTables: (MultiGroupBlockTable,),
    FlowConnector: (SupportsHMA,),
    FlowGraphManager: (CudaGraphManager,),
}

WITHOUT_SUPER: dict[str, set[str]] = {
    "BulkBlockPool": {"_remove_cached_block_hashes"},
    "FlowBlockPool": {"emit_cached_block_events"},
    "FlowCoordinator": {"remove_skipped_blocks"},
    "FlowKVCacheManager": {"free", "get_computed_blocks_for_connector", "pop_blocks_for_free"},
    "InstructBlipForConditionalGeneration": {"embed_multimodal"},
    "InstructBlipMultiModalProcessor": {"_get_mm_fields_config"},
    "InstructBlipProcessingInfo": {"get_hf_config"},
    "QwenVLDummyInputs": {"get_dummy_mm_data", "get_dummy_text"},
    "QwenVLForConditionalGeneration": {"embed_multimodal", "forward", "get_placeholder_str"},
    "QwenVLMultiModalProcessor": {
        *("_get_mm_fields_config", "_get_prompt_updates", "_postprocess_prompt"),
    },
    "QwenVLProcessingInfo": {
        *("get_hf_config", "get_hf_processor"),
        *("get_mm_max_tokens_per_item", "get_supported_mm_limits"),
    },
    "SentPictures": {
        *("clear_cache", "get_and_update_item", "invalidate", "is_cached_item", "make_stats"),
        *("release_sender_touches", "touch_sender_cache_item"),
    },
    "SharedSchedule": {"update_block_table"},
    "ShikraForConditionalGeneration": {"get_placeholder_str"},
    "StackedTables": {"commit_block_table", "compute_slot_mapping"},
    "_OfOneGroup": {"is_uniform_with_collection", "merge"},
}
"""Methods that take the place of ones of vLLM's and never call them: nothing else says that vLLM has these."""

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


def lost_supers() -> list[str]:
    """Every ``super().NAME`` of our classes behind which some class that we are mixed before has no NAME.

    A method that vLLM renames is no override any more, so :func:`overrides` would not miss it.
    """
    lost = []
    for kind, others in _with_upstream():
        for place, ours in enumerate(kind.__mro__):
            behind = kind.__mro__[place + 1 :]
            for method, name in _supers(ours) if _is_ours(ours) else ():
                for chain in [(*behind, other) for other in others] or [behind]:
                    if not any(name in vars(base) for end in chain for base in end.__mro__):
                        lost.append(
                            f"{ours.__qualname__}.{method}: {name} of {chain[-1].__qualname__}"
                        )
    return sorted(set(lost))


def replaced() -> set[str]:
    """Methods of ours in the place of ones of vLLM's that they never call."""
    found = set()
    for override in overrides():
        kind, method = override.ours.__qualname__.rsplit(".", 1)
        written = _super_names(override.ours.__module__).get(kind, {})
        if method in written and method not in written[method]:  # a dataclass has others
            found.add(override.ours.__qualname__)
    return found


def without_upstream() -> set[str]:
    """Our classes with a ``super()`` of which nobody knows what it reaches."""
    known = {base for kind, _ in _with_upstream() for base in kind.__mro__}
    return {kind.__qualname__ for kind in our_classes() if kind not in known and any(_supers(kind))}


def _with_upstream() -> Iterator[tuple[type, tuple[type, ...]]]:
    """Our classes that meet vLLM's, and what they are mixed before without being told so."""
    for kind in our_classes():
        others = next((MIXED_BEFORE[base] for base in kind.__mro__ if base in MIXED_BEFORE), ())
        if others or any(not _is_ours(base) and base is not object for base in kind.__mro__):
            yield kind, others


def _supers(kind: type) -> Iterator[tuple[str, str]]:
    """Of a class: its methods that look at ``super()``, and each name that they look for there."""
    for method, names in _super_names(kind.__module__).get(kind.__qualname__, {}).items():
        for name in sorted(names):
            yield method, name


@cache
def _super_names(module: str) -> dict[str, dict[str, set[str]]]:
    """By class and method of a module's source, the names that it looks for behind ``super()``."""
    tree = ast.parse(Path(inspect.getfile(importlib.import_module(module))).read_text("utf-8"))
    return {
        kind.name: {
            method.name: {
                node.attr
                for node in ast.walk(method)
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Call)
                and ast.unparse(node.value.func) == "super"
            }
            for method in kind.body
            if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for kind in tree.body
        if isinstance(kind, ast.ClassDef)
    }


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
