"""What in a compiled piece's call follows the number of rows, learnt from two calls of different size.

A piece takes tensors, and integers that its code was compiled for as symbols: the number of rows, products with it
(the elements of a flattened tensor), and strides that it was not told (M-RoPE's positions are a slice of a longer
buffer, whose rows lie as far apart whatever the step).

Pure PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class _Layout:
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_contiguous: bool

    @classmethod
    def of(cls, value: Any) -> _Layout | None:
        if not isinstance(value, torch.Tensor):
            return None
        return cls(tuple(value.shape), value.stride(), value.is_contiguous())


@dataclass(frozen=True)
class Call:
    """Sizes of what one call of a piece was given, and gave."""

    rows: int
    integers: tuple[int, ...]
    args: tuple[_Layout | None, ...]
    outputs: tuple[_Layout | None, ...]

    @classmethod
    def of(cls, rows: int, symbols: Sequence[int], args: Sequence[Any], found: Any) -> Call:
        """Of a call.

        Args:
            symbols: the arguments that are integers.
            found: what the piece returned, one value or a sequence of them.
        """
        return cls(
            rows,
            tuple(int(args[index]) for index in symbols),
            tuple(_Layout.of(arg) for arg in args),
            tuple(_Layout.of(output) for output in outputs_of(found)),
        )


@dataclass(frozen=True)
class RowShapes:
    """Where a piece's call has the number of rows."""

    integers: Mapping[int, int]
    """Place among the integers -> how often it counts a row: once, or as wide as some flattened tensor is."""
    args: Mapping[int, int]
    """Argument -> its dimension that counts rows."""
    outputs: Mapping[int, int]
    """Output -> likewise."""


def outputs_of(found: Any) -> Sequence[Any]:
    """What a piece returned, as a sequence."""
    return found if isinstance(found, tuple | list) else (found,)


def learn(first: Call, second: Call) -> RowShapes | None:
    """What follows the rows; None where more changes than their number, so that others cannot be tried.

    Args:
        first, second: calls of different size.
    """
    rows = (first.rows, second.rows)
    integers = {}
    for index, (one, other) in enumerate(zip(first.integers, second.integers, strict=True)):
        if one == other:
            continue
        factor, rest = divmod(one, first.rows)
        if rest or other != factor * second.rows:
            return None
        integers[index] = factor
    args = _dims(first.args, second.args, rows)
    outputs = _dims(first.outputs, second.outputs, rows)
    if args is None or outputs is None:
        return None
    if any(
        layout is not None and index not in outputs for index, layout in enumerate(first.outputs)
    ):
        return None  # made of whatever rows there are: nobody knows what it would be for fewer
    return RowShapes(integers, args, outputs)


def _dims(
    first: Sequence[_Layout | None], second: Sequence[_Layout | None], rows: tuple[int, int]
) -> dict[int, int] | None:
    found = {}
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        if one is None or other is None or one.shape == other.shape:
            continue
        sizes = list(zip(one.shape, other.shape, strict=True))
        differ = [dim for dim, pair in enumerate(sizes) if pair[0] != pair[1]]
        if len(differ) != 1 or sizes[differ[0]] != rows:
            return None
        contiguous = one.is_contiguous and other.is_contiguous
        if not contiguous and one.strides != other.strides:
            return None
        found[index] = differ[0]
    return found


def gathered(tensor: torch.Tensor, dim: int, rows_R: torch.Tensor) -> torch.Tensor:
    """Some rows of a tensor, laid out as the whole is: compiled code counts on strides that do not follow the rows.

    Args:
        dim: the dimension that counts rows.
    """
    found = tensor.index_select(dim, rows_R)
    return found if tensor.is_contiguous() else laid_out(found, tensor.stride())


def laid_out(values: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """A copy with these strides, which a tensor has that is a part of something longer."""
    copy = torch.empty_strided(values.shape, strides, dtype=values.dtype, device=values.device)
    return copy.copy_(values)
