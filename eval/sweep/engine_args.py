"""`--engine-args`: whether vLLM knows these names, and what a sweep itself reads of them. No vLLM in here.

Without importing it, which takes longer than everything else before the engines: the names stand in its source.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_flow.eval.sweep.pictures import background_of
from vllm_flow.user_text import shown

TENSOR_PARALLEL = "tensor_parallel_size"
PIPELINE_PARALLEL = "pipeline_parallel_size"
DRAFTER = "speculative_config"
SEQUENCES = "max_num_seqs"
EXECUTOR = "distributed_executor_backend"
WHOLE = (TENSOR_PARALLEL, PIPELINE_PARALLEL, SEQUENCES)
"""Whole numbers above 0 that are read here."""


class EngineArgsError(ValueError):
    """An argument that no engine would start with; the message names the remedy."""


def check_engine_args(given: Mapping[str, Any]) -> None:
    """Refuse what would end every engine, before one is started.

    Raises:
        EngineArgsError, ValueError: a name that vLLM does not know, or a value that it cannot take.
    """
    known = known_names()
    for name in given:
        if known is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]!r}?" if near else "`vllm serve --help=all` lists them."
            raise EngineArgsError(f"--engine-args: vLLM has no argument {name!r}; {meant}")
    for name in WHOLE:
        value = given.get(name)
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise EngineArgsError(
                f"--engine-args: {name!r} is {shown(value)}; write a whole number above 0."
            )
    if given.get(EXECUTOR) == "ray":
        raise EngineArgsError(
            f"--engine-args: {EXECUTOR!r} is 'ray', but an engine's workers share its machine, whose GPUs Ray has "
            "given to the engine already; leave it out."
        )
    background_of(given)


def workers_of(given: Mapping[str, Any]) -> int:
    """Processes of an engine that need a GPU each, where there are any."""
    return int(given.get(TENSOR_PARALLEL) or 1) * int(given.get(PIPELINE_PARALLEL) or 1)


@cache
def known_names() -> frozenset[str] | None:
    """What `vllm.LLM` takes by name; None where vLLM's source is not to be had."""
    spec = find_spec("vllm")
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in map(Path, places):
        try:
            fields = ast.parse((place / "engine" / "arg_utils.py").read_text("utf-8"))
            offline = ast.parse((place / "entrypoints" / "llm.py").read_text("utf-8"))
        except (OSError, SyntaxError):
            continue
        names = {*_fields(fields, "EngineArgs"), *_parameters(offline, "LLM")}
        return frozenset(name for name in names if not name.startswith("_")) or None
    return None


def _class(tree: ast.Module, name: str) -> Iterator[ast.stmt]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield from node.body


def _fields(tree: ast.Module, name: str) -> Iterator[str]:
    for node in _class(tree, name):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _parameters(tree: ast.Module, name: str) -> Iterator[str]:
    for node in _class(tree, name):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            yield from (
                one.arg for one in (*node.args.args, *node.args.kwonlyargs) if one.arg != "self"
            )
