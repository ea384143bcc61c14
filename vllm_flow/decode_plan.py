"""Plans a decode step whose layers cannot be told its requests one by one. Integers only.

A captured step (a CUDA graph) runs the same kernels over the same memory every time; which layer sees
which tokens of which request follows from two integers per request and stage. Says the same as
:func:`vllm_flow.plan.plan_step` for steps of as many tokens per request; imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_flow.counts import counted
from vllm_flow.step import ScheduledRequest

EVERYTHING = np.iinfo(np.int32).max
"""More tokens than any request has: nothing is stored."""


def decode_facts(requests: Sequence[ScheduledRequest], num_layers: int) -> NDArray[np.int32]:
    """Stages and evicted tokens of a step in which every request has as many tokens: one, and its drafts.

    Args:
        requests: the batch in row order, R requests, at least one.

    Returns:
        [S, 2, R] int32 for S stages, the most that a request has, at least one. Of each the layer at
        which it begins: ``num_layers`` where the request has no such stage. Then how many of the
        request's tokens are missing from there on once the step is done; where the step's own tokens
        are evicted they have no place there, and all tokens count as missing. So a layer sees
        ``max(0, seq_len - missing)`` tokens, of the deepest stage that it has reached, the last of
        them this step's, and the request has no row in it if they are none. What is missing does not
        depend on how many drafts of earlier steps were refused: those came behind the images.

    Raises:
        ValueError: requests with more or fewer tokens than others, or with tokens of which only some
            are evicted.
    """
    depth = max((len(r.layout.stages) for r in requests if r.layout is not None), default=1)
    facts = np.zeros((depth, 2, len(requests)), dtype=np.int32)
    facts[:, 0] = num_layers
    count = requests[0].num_scheduled
    for index, request in enumerate(requests):
        if request.num_scheduled != count:
            raise ValueError(
                f"request {index} of the step has {counted(request.num_scheduled, 'token')} and request 0 has "
                f"{count}; in a captured decode step all have as many."
            )
        layout, token = request.layout, request.num_computed
        if layout is None:
            continue
        for number, stage in enumerate(layout.stages):
            gone = stage.evicted
            missing = gone.total
            if token < layout.spans.end:  # hardly ever: before the last image's end
                before, missing = gone.count_before(token), gone.count_before(token + count)
                if before < missing < before + count:
                    raise ValueError(
                        f"request {index} of the step has {counted(count, 'token')}, of which {missing - before} "
                        "are evicted; a captured decode step has rows of all or of none."
                    )
                if missing > before:
                    missing = EVERYTHING
            facts[number, :, index] = stage.layer, missing
    return facts
