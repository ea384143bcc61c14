"""Logprobs of a prompt of which tokens were evicted: None where there are no logits.

Seams: what both runners hand to vLLM's prompt logprobs, the step's hidden states; and
``LogprobsProcessor._update_prompt_logprobs`` in the front end, which makes entries of them. A row that
left has no hidden state after the last layer. It is handed over as not-a-number, which goes through
logits and logprobs of its own row only, and which no logprob of a row that stayed is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_flow.engine.worker.passes.decoder import DecoderHook


class FlowPromptLogprobs:
    """Mixed in before the class of Model Runner V2's ``PromptLogprobsWorker``."""

    flow_hook: DecoderHook
    uses_prompt_logprobs: Any
    token_id_scores: dict[str, Any]

    def compute_prompt_logprobs(
        self, logits_fn: Any, hidden_states: Any, input_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.uses_prompt_logprobs[input_batch.idx_mapping_np].any():
            hidden_states = self.flow_hook.marked(hidden_states)
        return super().compute_prompt_logprobs(  # type: ignore[misc]
            logits_fn, hidden_states, input_batch, *args, **kwargs
        )

    def compute_prompt_token_id_logprobs(
        self, logits_fn: Any, hidden_states: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.token_id_scores:
            hidden_states = self.flow_hook.marked(hidden_states)
        return super().compute_prompt_token_id_logprobs(  # type: ignore[misc]
            logits_fn, hidden_states, *args, **kwargs
        )


def unscored(logprobs: Sequence[float]) -> set[int]:
    """Positions that have no logprob: of evicted tokens, and of what one would have predicted.

    A token without logits is one that was evicted, whether its own logprob is known (of the first
    after a text token, it is) or not. No prompt ends in an evicted token.

    Args:
        logprobs: each prompt token's own logprob, whatever the first's; not-a-number where the row
            before was evicted.
    """
    gone = [position for position, logprob in enumerate(logprobs) if math.isnan(logprob)]
    return {*gone, *(position - 1 for position in gone)}


def blank(entries: Any, logprobs: Sequence[float]) -> Any:
    """vLLM's entries of a prompt, one per position, with none where :func:`unscored` says so.

    Args:
        entries: a list, or vLLM's ``FlatLogprobs``.
        logprobs: as there.
    """
    missing = unscored(logprobs)
    if not missing:
        return entries
    if isinstance(entries, list):
        return [None if position in missing else entry for position, entry in enumerate(entries)]
    kept = type(entries)()
    spans = zip(entries.start_indices, entries.end_indices, strict=True)
    for position, (start, end) in enumerate(spans):
        if position in missing:
            kept.append(None)
            continue
        kept.append_fast(
            entries.token_ids[start:end],
            entries.logprobs[start:end],
            entries.ranks[start:end],
            entries.decoded_tokens[start:end],
        )
    return kept
