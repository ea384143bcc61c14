"""Computes what rows of a vision tower's layer attend to, and by which keys, for ranks that go by that.

Seam: ``forward`` of vLLM's ``MMEncoderAttention`` of one layer, replaced while pictures are encoded.

Legend: P pictures, or parts of them, with as many rows each; L rows of one; Q heads of this worker, D their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vllm_flow.engine.replacing import replaced
from vllm_flow.engine.worker.attention.row_mass import LOGITS_AT_ONCE
from vllm_flow.ranks import TowerRows, TowerScore

if TYPE_CHECKING:
    from vllm_flow.engine.worker.tower.scores import Kind


def class_attention(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """[P, L - 1] probability that the first row gives each other one, averaged over heads.

    Args:
        query, key: [P, L, Q, D].
    """
    class_PQ1D = query[:, :1].transpose(1, 2).float()
    logits_PQ1L = (class_PQ1D * scale) @ key.permute(0, 2, 3, 1).float()
    mass_PL = logits_PQ1L[:, :, 0].softmax(-1).mean(1)
    return mass_PL[:, 1:].contiguous()


def received_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    first: int = 0,
    at_once: int = LOGITS_AT_ONCE,
) -> torch.Tensor:
    """[P, L - first] probability that each row is given, averaged over the rows from ``first`` on and over heads.

    Every row attends to all rows of its picture, those before ``first`` included. Nothing of the size of
    P x Q x L x L is ever held.

    Args:
        query, key: [P, L, Q, D].
        at_once: logits that are held at once, but at least one row's.
    """
    pictures, rows, heads, _ = query.shape
    rows_at_once = max(1, at_once // (heads * rows))
    pictures_at_once = max(1, rows_at_once // rows)
    found_PL = query.new_zeros(pictures, rows, dtype=torch.float32)
    for start in range(0, pictures, pictures_at_once):
        some = slice(start, start + pictures_at_once)
        query_pQLD = query[some].transpose(1, 2)
        key_pQDL = key[some].permute(0, 2, 3, 1).float()
        for row in range(first, rows, rows_at_once):
            query_pQlD = query_pQLD[:, :, row : row + rows_at_once].float() * scale
            found_PL[some] += (query_pQlD @ key_pQDL).softmax(-1).sum((1, 2))
    return found_PL[:, first:] / (heads * (rows - first))


def mean_keys(key: torch.Tensor, first: int = 0) -> torch.Tensor:
    """[P, L - first, D] keys of the rows from ``first`` on, averaged over heads, in float32.

    Args:
        key: [P, L, Q, D].
    """
    return key[:, first:].float().mean(2)


@contextmanager
def watching(
    attention: Any, kinds: Iterable[Kind], first: int
) -> Iterator[Callable[[], dict[Kind, torch.Tensor]]]:
    """Score what goes through a layer whose pictures, or tiles, all have as many rows.

    Args:
        attention: the layer's.
        first: row of a picture that is its first patch's, or token's.

    Yields:
        what gives rows [P, L - first, width] of every kind that is this layer's: scores are of width 1, keys of D.
        Nothing if the layer was not called.
    """
    noted: dict[Kind, list[torch.Tensor]] = {
        kind: [] for kind in kinds if isinstance(kind, TowerScore) or kind == TowerRows.KEYS
    }
    forward, size, scale = attention.forward, attention.head_size, attention.scale

    def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        heads = [rows.unflatten(-1, (-1, size)) for rows in (query, key)]
        for kind, found in noted.items():
            if kind == TowerScore.CLASS:
                found.append(class_attention(*heads, scale)[..., None])
            elif kind == TowerScore.RECEIVED:
                found.append(received_attention(*heads, scale, first)[..., None])
            else:
                found.append(mean_keys(heads[1], first))
        return forward(query, key, *args, **kwargs)

    with replaced("forward", [(attention, watched)]):
        yield lambda: {kind: torch.cat(found) for kind, found in noted.items() if found}
