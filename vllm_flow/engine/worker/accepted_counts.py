"""How many drafts of each request were accepted, while rows of Model Runner V1's batch move.

Seams: ``num_accepted_tokens_cpu`` and ``prev_req_id_to_index`` of its batch; ``num_accepted_tokens_event``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


def counts_by_former_rows(runner: Any) -> AbstractContextManager[None]:
    """Keep each request's count of accepted tokens at its row of the step before, while rows of the batch move.

    With cached states and asynchronous scheduling, Model Runner V1 of vLLM 0.32 and 0.33 looks these counts up by the
    rows of the step before, although it has already moved them to the new rows. A request whose row changed would then
    go on from the wrong state, by another request's count. vLLM without the extension has this fault too.

    Args:
        runner: a Model Runner V1, about to update its states.
    """
    event = getattr(runner, "num_accepted_tokens_event", None)
    align = runner.vllm_config.cache_config.mamba_cache_mode == "align"
    if event is None or not runner.use_async_scheduling or not align:
        return nullcontext()
    return _counts_kept(runner.input_batch, event)


@contextmanager
def _counts_kept(batch: Any, event: Any) -> Iterator[None]:
    event.synchronize()  # the counts are on their way from the device; vLLM waits for them a moment later
    former = batch.num_accepted_tokens_cpu.copy()
    yield
    if batch.prev_req_id_to_index:  # else vLLM takes them by the rows of now
        batch.num_accepted_tokens_cpu[:] = former
