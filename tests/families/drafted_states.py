"""What tests of states with drafts ask, by which methods, and how they look into an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tests.families.making import picture, words

if TYPE_CHECKING:
    from tests.families.running import Ask, Engine

GUESSES = 3
TOKENS = 24
UNIT = 32
"""Pixels of a picture's token, either way."""
KINDS = {
    "ngram": {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    "mtp": {"method": "mtp"},
}

Way = tuple[str, bool, bool]
"""A method, whether scheduling is asynchronous, whether prefixes are cached."""
QUICK: Way = ("mtp", False, True)
CACHING: list[Way] = [QUICK, ("ngram", False, True), ("mtp", True, True)]
ALL: list[Way] = [*CACHING, ("mtp", False, False), ("ngram", False, False), ("mtp", True, False)]


def name_of(way: Way) -> str:
    method, asynchronous, caching = way
    return f"{method}-{'async' if asynchronous else 'sync'}-{'cached' if caching else 'uncached'}"


def ask(seed: int, rows: int, columns: int, before: int = 0, cliff: int | None = None) -> Ask:
    """A picture of rows x columns tokens at token ``before`` of a prompt: without words, at the first."""
    from tests.families.running import Ask

    text = f"{words(before, seed)} <|image_pad|> {words(5, 900 + seed)}".strip()
    return Ask(text, (picture(seed, (rows * UNIT, columns * UNIT)),), cliff)


def scheduler_of(engine: Engine) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core.scheduler


def counted(engine: Engine) -> Any:
    """Drafts that are checked meanwhile."""
    from tests.engine import test_speculative

    return test_speculative.counted(SimpleNamespace(scheduler=scheduler_of(engine)))  # type: ignore[arg-type]


@contextmanager
def metadata_of_states(engine: Engine) -> Iterator[list[Any]]:
    """What is made meanwhile for layers with states past a cliff, where vLLM's own does not do."""
    from vllm_flow.engine.replacing import replaced

    core: Any = engine.llm.llm_engine.engine_core.engine_core
    hook = core.model_executor.driver_worker.worker.model_runner.flow_state.hook
    found: list[Any] = []
    stock = hook.arm

    def arm(step: Any) -> None:
        made = () if step is None else step.attn_metadata.values()
        found.extend(metadata for metadata in made if hasattr(metadata, "num_spec_decodes"))
        stock(step)

    with replaced("arm", [(hook, arm)]):
        yield found
