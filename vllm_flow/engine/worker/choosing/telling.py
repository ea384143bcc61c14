"""What pipeline stages tell one another of a step's choices, as one tensor among those that vLLM sends.

Which parts it has, and how long they are, both sides know (:mod:`vllm_flow.handing_on`). It is there in the steps that
have something to tell, and in no other: vLLM says with every step what it sends, and its own tensors keep their sizes.

Seam: ``IntermediateTensors``, a mapping of names to tensors that the model of one stage returns and that of the next is
given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from vllm.sequence import IntermediateTensors

from vllm_flow.handing_on import Part, What

NAME = "flow_choices"
"""[W] int32, all parts one behind the other; floats bit by bit."""

FLOATS = (What.WEIGHTS, What.MASS)


def without(received: IntermediateTensors) -> IntermediateTensors:
    """What vLLM itself has sent."""
    return IntermediateTensors(
        {name: found for name, found in received.tensors.items() if name != NAME}
    )


def with_told(sending: IntermediateTensors, words_W: torch.Tensor) -> IntermediateTensors:
    """What vLLM sends, and what :func:`put_together` has made."""
    return IntermediateTensors({**sending.tensors, NAME: words_W})


def put_together(found: Iterable[torch.Tensor]) -> torch.Tensor:
    """[W] int32 of the parts."""
    return torch.cat(
        [
            part.float().view(torch.int32) if part.is_floating_point() else part.to(torch.int32)
            for part in found
        ]
    )


def taken_apart(
    received: IntermediateTensors | None, parts: Sequence[Part]
) -> Iterator[tuple[Part, torch.Tensor]]:
    """Each part with its numbers, [length] int64 or float32.

    Raises:
        RuntimeError: the stage before has told something else, so that it goes by another plan.
    """
    words_W = None if received is None else received.tensors.get(NAME)
    counts = [part.length for part in parts]
    if words_W is None or len(words_W) != sum(counts):
        raise RuntimeError(
            f"a pipeline stage of vLLM-Flow waited for {sum(counts)} numbers of the one before, and got "
            f"{'none' if words_W is None else len(words_W)}: its workers do not go by the same plan."
        )
    for part, own in zip(parts, words_W.split(counts), strict=True):
        yield part, own.view(torch.float32) if part.what in FLOATS else own.long()
