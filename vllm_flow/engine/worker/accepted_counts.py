"""How many drafts of each request were accepted, while rows of Model Runner V1's batch move.

Seams: ``num_accepted_tokens_cpu`` and ``prev_req_id_to_index`` of its batch; ``num_accepted_tokens_event``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


def counts_by_former_rows(runner: Any) -> AbstractContextManager[None]:
    """While rows of the batch move, how many tokens each request was given stays by the rows of the step before.

    Where the prefix cache finds states and steps are scheduled ahead, Model Runner V1 of vLLM 0.32 and 0.33 looks
    these counts up by former rows, though they have moved with their requests: of a request whose row changed, it would
    go on from the state of another one's last accepted draft. So does vLLM without the extension.

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
