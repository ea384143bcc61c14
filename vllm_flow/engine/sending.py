"""Host tensors on their way to the device: copied as they are now, in a copy that nobody waits for.

An asynchronous copy reads the host's memory when the device gets to it. vLLM writes on into buffers of its own,
sometimes in the same step, so nothing of vLLM's may be sent as it lies there. All of our copies to a device go
through here.
"""

from __future__ import annotations

import torch


def snapshot(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What a host tensor holds now, in memory of its own from which ``device`` can copy at any later time."""
    return torch.empty_like(host, pin_memory=device.type == "cuda").copy_(host)


def sent(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on ``device`` of what a host tensor holds now, never the tensor itself."""
    return copied(snapshot(host, device), device)


def copied(own: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on ``device`` of a :func:`snapshot` for it, which on a CPU is the copy."""
    return own if device.type == "cpu" else own.to(device, non_blocking=True)
