"""Host tensors on their way to the device: copied as they are now, in a copy that nobody waits for.

An asynchronous copy reads the host's memory only when the device reaches it. By then vLLM may have written something
else into its buffers, sometimes in the same step. So vLLM's buffers are copied on the host first. All of our copies to
a device go through here.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from vllm_flow.engine.worker.aligned import packed, unpacked


def snapshot(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What a host tensor holds now, in memory of its own from which ``device`` can copy at any later time."""
    return torch.empty_like(host, pin_memory=device.type == "cuda").copy_(host)


def sent(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on ``device`` of what a host tensor holds now, never the tensor itself."""
    return copied(snapshot(host, device), device)


def copied(own: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on ``device`` of a :func:`snapshot` for it, which on a CPU is the copy."""
    return own if device.type == "cpu" else own.to(device, non_blocking=True)


class Part:
    """Some of the integers of a :class:`OneCopy`, once that is sent; on a CPU both are the same memory."""

    host: torch.Tensor
    there: torch.Tensor
    """On the device."""


class OneCopy:
    """Integers of the host that reach a device in a single copy, as int32."""

    def __init__(self) -> None:
        self._added: list[tuple[NDArray[Any], Part]] = []

    def add(self, integers: NDArray[Any]) -> Part:
        """Integers that go with the others."""
        part = Part()
        self._added.append((integers, part))
        return part

    def send(self, device: torch.device) -> None:
        """Fill in all parts."""
        whole, sizes = packed(integers for integers, _ in self._added)
        host = snapshot(torch.from_numpy(whole), device)
        here_of, there_of = unpacked(host, sizes), unpacked(copied(host, device), sizes)
        for (_, part), here, there in zip(self._added, here_of, there_of, strict=True):
            part.host, part.there = here, there
