"""Integers one behind another in memory, each part where a kernel may read it by 16 bytes.

Triton compiles a kernel anew for pointers that are no multiples of 16 bytes. vLLM's own metadata begin where a buffer
begins, so its kernels are compiled for such alone before it serves: ours must not begin anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_flow.spans import IntArray

PER_LINE = {torch.int32: 4, torch.int64: 2}
"""Integers in 16 bytes."""
_GAP = np.zeros(PER_LINE[torch.int32] - 1, dtype=np.int32)


def packed(parts: Iterable[IntArray]) -> tuple[NDArray[np.int32], list[int]]:
    """Parts as int32, with gaps between them; and the sizes of parts and gaps by turns, for :func:`unpacked`."""
    arrays: list[NDArray[np.integer]] = []
    for part in parts:
        arrays += part, _GAP[: -len(part) % PER_LINE[torch.int32]]
    return np.concatenate(arrays, dtype=np.int32, casting="unsafe"), [len(a) for a in arrays]


def unpacked(flat: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """The parts that :func:`packed` put into one array, as views."""
    return flat.split(list(sizes))[::2]


def filled(rows: IntArray) -> IntArray:
    """As many that each row of a table of int64 begins at 16 bytes: what is added repeats the first."""
    return np.append(rows, rows[: -len(rows) % PER_LINE[torch.int64]])
