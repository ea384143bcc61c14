"""What a decode step must know of its requests when its layers cannot be told one by one. Integers only.

A captured step (a CUDA graph) runs the same kernels over the same memory every time; which layer sees
the image of which request follows from two integers per request. Says the same as
:func:`vllm_flow.plan.plan_step` for steps of one token per request; imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_flow.plan import ScheduledRequest

EVERYTHING = np.iinfo(np.int32).max
"""More tokens than any request has: nothing is stored past the cliff."""


def decode_facts(requests: Sequence[ScheduledRequest], num_layers: int) -> NDArray[np.int32]:
    """Cliffs and evicted tokens of a step in which every request has one token.

    Args:
        requests: the batch in row order, R requests.

    Returns:
        [2, R] int32. First the cliff: ``num_layers`` where the request evicts nothing. Then how many
        of its tokens are missing from the layers past the cliff once the step is done; where the
        step's own token is evicted it has no place there, and all tokens count as missing. So layer
        ``l`` sees ``max(0, seq_len - missing)`` tokens if ``l >= cliff``, the last of them this
        step's, and the request has no row in it if they are none.

    Raises:
        ValueError: a request with more or less than one scheduled token.
    """
    facts = np.empty((2, len(requests)), dtype=np.int32)
    for index, request in enumerate(requests):
        if request.num_scheduled != 1:
            raise ValueError(
                f"request {index} of the step has {request.num_scheduled} tokens; a captured decode "
                "step has one per request."
            )
        layout = request.layout
        if layout is None:
            facts[:, index] = num_layers, 0
            continue
        spans, token = layout.spans, request.num_computed
        if token >= spans.end:  # nearly always: past the last image
            facts[:, index] = layout.cliff, spans.total
            continue
        before, after = spans.count_before(token), spans.count_before(token + 1)
        facts[:, index] = layout.cliff, EVERYTHING if after > before else after
    return facts
