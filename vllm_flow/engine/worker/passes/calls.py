"""The ways in which models call their layers and final norm, brought to one form and back.

The hook thinks in ``layer(positions, hidden [T, H], residual) -> (hidden, residual)`` and
``norm(hidden, residual)``, T rows of a step, R of them alive, H wide. Knows neither steps nor families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

Forward: TypeAlias = "Callable[..., Any]"


def select_positions(positions: Any, rows: torch.Tensor) -> Any:
    """Positions [T], M-RoPE [3, T], or a tuple of such: those of some rows. None stays None."""
    if positions is None:
        return None
    return positions.index_select(-1, rows)


def _check_no_rows(others: Mapping[str, Any]) -> None:
    """Refuse tensors that a layer is given beside what is known of its call.

    Raises:
        RuntimeError: names them.
    """
    strange = [name for name, value in others.items() if isinstance(value, torch.Tensor)]
    if strange:
        raise RuntimeError(
            f"vLLM-Flow does not know which rows {', '.join(strange)} of this model's layers are "
            "about; serve it without additional_config['vllm_flow']."
        )


def _residual_layer(hook: Forward, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    return hook(forward, *args, **kwargs)


def _named_layer(
    hook: Forward,
    forward: Forward,
    positions: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    **others: Any,
) -> Any:
    _check_no_rows(others)

    def plain(positions: Any, hidden_RH: torch.Tensor, residual_RH: torch.Tensor | None) -> Any:
        return forward(positions=positions, hidden_states=hidden_RH, residual=residual_RH, **others)

    return hook(plain, positions, hidden_states, residual)


def _residual_norm(hook: Forward, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    return hook(forward, *args, **kwargs)


def _plain_layer(
    hook: Forward, forward: Forward, positions: torch.Tensor, hidden_states: torch.Tensor
) -> torch.Tensor:
    def plain(positions: torch.Tensor, hidden_RH: torch.Tensor, _: None) -> Any:
        return forward(positions, hidden_RH), None

    return hook(plain, positions, hidden_states, None)[0]


def _beside_layer(
    hook: Forward,
    forward: Forward,
    positions: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    beside: torch.Tensor | None,
    **kwargs: Any,
) -> Any:
    """What is given beside them, per row, goes with the positions: both are the step's, and lose the same rows."""

    def plain(given: Any, hidden_RH: torch.Tensor, residual_RH: torch.Tensor | None) -> Any:
        positions, beside = given
        return forward(positions, hidden_RH, residual_RH, beside, **kwargs)

    return hook(plain, (positions, beside), hidden_states, residual)


def _select_beside(given: Any, rows: torch.Tensor) -> Any:
    positions, beside = given
    beside = None if beside is None else beside.index_select(0, rows)
    return select_positions(positions, rows), beside


def _tensor_layer(
    hook: Forward, forward: Forward, hidden_states: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    def plain(positions: torch.Tensor, hidden_RH: torch.Tensor, _: None) -> Any:
        return forward(hidden_states=hidden_RH, position_ids=positions), None

    return hook(plain, position_ids, hidden_states, None)[0]


def _tensor_norm(hook: Forward, forward: Forward, hidden_RH: torch.Tensor) -> torch.Tensor:
    return hook(forward, hidden_RH)


def _alone_layer(hook: Forward, forward: Forward, hidden_states: torch.Tensor) -> torch.Tensor:
    def plain(_positions: None, hidden_RH: torch.Tensor, _: None) -> Any:
        return forward(hidden_RH), None

    return hook(plain, None, hidden_states, None)[0]


def _batched_layer(
    hook: Forward, forward: Forward, hidden_1TH: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """A layer of transformers; its rotary tables [..., T, D] are per row as well."""
    positions = kwargs.pop("position_ids", None), *kwargs.pop("position_embeddings")
    _check_no_rows(kwargs)

    def plain(positions: Any, hidden_RH: torch.Tensor, _: None) -> Any:
        ids, *tables = positions
        result = forward(
            hidden_RH[None], position_ids=ids, position_embeddings=tuple(tables), **kwargs
        )
        return (result[0] if isinstance(result, tuple) else result)[0], None

    return hook(plain, positions, hidden_1TH[0], None)[0][None]


def _batched_norm(hook: Forward, forward: Forward, hidden_1RH: torch.Tensor) -> torch.Tensor:
    return hook(lambda hidden_RH: forward(hidden_RH[None])[0], hidden_1RH[0])[None]


def _select_batched(positions: Any, rows: torch.Tensor) -> Any:
    ids, *tables = positions
    return select_positions(ids, rows), *(table.index_select(-2, rows) for table in tables)


def lengthened(tensor_RH: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, H] with the tensor's rows in front, and anything behind them."""
    if len(tensor_RH) == rows:
        return tensor_RH
    longer = tensor_RH.new_empty(rows, *tensor_RH.shape[1:])
    longer[: len(tensor_RH)] = tensor_RH
    return longer


def at_their_rows(hidden_RH: torch.Tensor, rows_R: torch.Tensor, num_rows: int) -> torch.Tensor:
    """What is left of a step's rows, where it stood among all T: the sampler indexes those. Others are zero,
    and never sampled: their tokens were evicted."""
    hidden_TH = hidden_RH.new_zeros(num_rows, *hidden_RH.shape[1:])
    hidden_TH[rows_R] = hidden_RH
    return hidden_TH


class AliveRows(Mapping[str, torch.Tensor]):
    """Stands in for a mapping of a step's tensors [T, H]: a look-up gives the rows alive by then.

    A proxy, since the tensors are views of a buffer that vLLM keeps from step to step.
    """

    def __init__(self, tensors: Any, alive: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._tensors, self._alive = tensors, alive

    @property
    def tensors(self) -> AliveRows:
        """As vLLM's ``IntermediateTensors`` has it."""
        return self

    def __contains__(self, name: object) -> bool:
        return name in self._tensors.tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._alive(self._tensors[name])

    def __iter__(self) -> Any:
        return iter(self._tensors.tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class CallForm:
    """How one kind of layer is wrapped; see :data:`vllm_flow.engine.families.decoder_parts.Call`."""

    layer: Forward
    """``layer(hook, forward, *args, **kwargs)``: calls ``hook(plain forward, positions, hidden,
    residual)``, and returns what the model expects."""
    norm: Forward
    """``norm(hook, forward, *args, **kwargs)``, likewise with ``hook(plain forward, hidden, ...)``."""
    select: Callable[[Any, torch.Tensor], Any] = select_positions
    """The positions of some rows."""
    lengthens: bool = False
    """Whether the model counts the rows that come out of a layer: short of some, they are lengthened."""


FORMS = {
    "residual": CallForm(_residual_layer, _residual_norm),
    "scaled": CallForm(_beside_layer, _residual_norm, _select_beside, lengthens=True),
    "plain": CallForm(_plain_layer, _tensor_norm),
    "masked": CallForm(_beside_layer, _residual_norm, _select_beside),
    "named": CallForm(_named_layer, _residual_norm),
    "tensor": CallForm(_tensor_layer, _tensor_norm),
    "alone": CallForm(_alone_layer, _tensor_norm),
    "batched": CallForm(_batched_layer, _batched_norm, _select_batched),
}
