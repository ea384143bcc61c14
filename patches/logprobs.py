"""Patch: evicted positions of a prompt have no logprobs. Ledger in README.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vllm_flow.patches.wrapping import unwrap, wrap

Blank = Callable[[Any, Sequence[float]], Any]


def apply(blank: Blank) -> None:
    """Let ``blank(entries, logprobs)`` have the last word on a prompt's entries, given its tokens' logprobs."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    wrap(LogprobsProcessor, "_update_prompt_logprobs", partial(_around_update, blank))


def revert() -> None:
    """Put the original back."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    unwrap(LogprobsProcessor, "_update_prompt_logprobs")


def _around_update(blank: Blank, original: Callable[..., Any]) -> Callable[..., Any]:
    def _update_prompt_logprobs(self: Any, prompt_logprobs_tensors: Any) -> Any:
        before = len(self.prompt_logprobs)  # the first token's entry is there from the start
        result = original(self, prompt_logprobs_tensors)
        own = prompt_logprobs_tensors.logprobs[:, 0].tolist()
        self.prompt_logprobs = blank(self.prompt_logprobs, [0.0] * before + own)
        return result

    return _update_prompt_logprobs
