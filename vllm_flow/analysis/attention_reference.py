"""Attention mass on system, image, user and output tokens, by Hugging Face's own attention maps.

Equations 6 to 8 of arXiv 2406.06579: in a layer, the head-averaged probability that a row puts on
each span of the context; the four sum to 1. The reference for faster ways to the same table, and
the source of figures where no engine has logged it. Costs a full attention map, heads x T x T
floats, in one layer after the other.

Shapes: T tokens (prompt expanded, then output), A answer tokens, P image tokens, S = 4 spans.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vllm_flow.style import SPANS

if TYPE_CHECKING:
    from vllm_flow.analysis.vlm import Encoded, Vlm

SYSTEM, IMAGE, USER, OUTPUT = range(4)
Rows = Literal["predicting", "own"]


@dataclass(frozen=True)
class Masses:
    """The masses of one request's answer."""

    spans_LAS: NDArray[np.float32]
    """[layers, answer tokens, 4]: system, image, user, output; each sums to 1."""
    images_LAI: NDArray[np.float32]
    """[layers, answer tokens, images]: mass per image, in order."""
    heat_LAP: NDArray[np.float32]
    """[layers, answer tokens, image tokens]."""
    flow_LSS: NDArray[np.float32]
    """[layers, 4, 4]: mean over a span's rows of the mass on each span; NaN for a span without rows."""


def span_of(is_image: ArrayLike, prompt_length: int) -> NDArray[np.int64]:
    """The span of each position: before the first image token it is system, after it user.

    `is_image` covers the prompt and what follows; from `prompt_length` on all is output, whatever
    the token's id. Without an image the prompt is user.
    """
    image = np.asarray(is_image, dtype=bool).copy()
    image[prompt_length:] = False
    spans = np.full(len(image), USER)
    if image.any():
        spans[: int(np.argmax(image))] = SYSTEM
    spans[image] = IMAGE
    spans[prompt_length:] = OUTPUT
    return spans


def runs(flags: ArrayLike) -> list[slice]:
    """The runs of True, in order."""
    padded = np.concatenate(([False], np.asarray(flags, dtype=bool), [False])).astype(np.int8)
    edges = np.flatnonzero(np.diff(padded))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def answer_rows(prompt_length: int, answer_length: int, rows: Rows = "predicting") -> slice:
    """The rows that stand for the answer's tokens.

    `predicting`: the row before the token, whose logits chose it (a decoding engine's rows);
    `own`: the token's own row.
    """
    first = prompt_length - (rows == "predicting")
    return slice(first, first + answer_length)


def reduce_maps(
    maps: Sequence[NDArray[Any]],
    is_image: ArrayLike,
    prompt_length: int,
    images: Sequence[slice | NDArray[np.int64]],
    rows: Rows = "predicting",
) -> Masses:
    """Masses from head-averaged attention maps [T, T], one per layer; `images`: each one's tokens."""
    spans = span_of(is_image, prompt_length)
    member_TS = _members(spans)
    at = answer_rows(prompt_length, len(spans) - prompt_length, rows)
    where = np.flatnonzero(spans == IMAGE)
    found: dict[str, list[NDArray[Any]]] = {"spans": [], "images": [], "heat": [], "flow": []}
    for map_TT in maps:
        to_spans = map_TT @ member_TS
        found["spans"].append(to_spans[at])
        found["images"].append(
            np.stack([map_TT[at][:, image].sum(1) for image in images], axis=1)
            if images
            else np.zeros((at.stop - at.start, 0))
        )
        found["heat"].append(map_TT[at][:, where])
        found["flow"].append(mean_flow(to_spans, spans))
    arrays = {key: np.stack(value).astype(np.float32) for key, value in found.items()}
    return Masses(arrays["spans"], arrays["images"], arrays["heat"], arrays["flow"])


def mean_flow(to_spans_TS: NDArray[Any], spans_T: NDArray[np.int64]) -> NDArray[Any]:
    """[4, 4]: mean over a span's rows of the mass on each span; NaN for a span without rows."""
    member_TS = _members(spans_T)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: NDArray[Any] = (member_TS.T @ to_spans_TS) / member_TS.sum(0)[:, None]
    return mean


def _members(spans_T: NDArray[np.int64]) -> NDArray[np.float64]:
    """[T, 4]: 1 where a position belongs to a span."""
    return (spans_T[:, None] == np.arange(len(SPANS))).astype(np.float64)


@torch.inference_mode()
def attention_masses(
    vlm: Vlm, encoded: Encoded, answer: Sequence[int], rows: Rows = "predicting"
) -> Masses:
    """Masses of `answer` after the prompt, in one forward.

    By the model's maps where it was loaded with `attention="eager"`; others return none, and on a CUDA
    device xformers takes their place. ValueError where neither can be.
    """
    if vlm.decoder.config._attn_implementation != "eager":
        from vllm_flow.analysis.span_attention import against, span_masses

        reason = against(vlm)
        if reason is not None:
            raise ValueError(
                'attention maps need a model loaded with attention="eager", and xformers cannot do '
                f"without them: {reason}"
            )
        return span_masses(vlm, encoded, answer, rows)
    with keeping_maps(vlm) as maps:
        vlm.forward(encoded, answer, logits_to_keep=1)
    is_image = np.concatenate([encoded.is_image_T.numpy(), np.zeros(len(answer), dtype=bool)])
    return reduce_maps(maps, is_image, len(encoded.ids_T), [encoded.image_P.numpy()], rows)


@contextlib.contextmanager
def keeping_maps(vlm: Vlm) -> Iterator[list[NDArray[np.float64]]]:
    """While open, a forward of one sequence fills the list: per layer its map [T, T], the mean over heads."""
    maps: list[NDArray[np.float64]] = []

    def keep(_module: object, _args: object, output: Any) -> None:
        maps.append(output[1][0].float().mean(0).double().cpu().numpy())

    handles = [layer.get_submodule("self_attn").register_forward_hook(keep) for layer in vlm.layers]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def mass_table(by_request: Mapping[str, Masses]) -> Any:
    """A pyarrow table in the logger's schema: request_id, layer, token, the four spans, images."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {
        name: [] for name in ("request_id", "layer", "token", *SPANS, "images")
    }
    for request, masses in by_request.items():
        layers, tokens, _ = masses.spans_LAS.shape
        for layer in range(layers):
            for token in range(tokens):
                columns["request_id"].append(request)
                columns["layer"].append(layer)
                columns["token"].append(token)
                for number, name in enumerate(SPANS):
                    columns[name].append(float(masses.spans_LAS[layer, token, number]))
                columns["images"].append(masses.images_LAI[layer, token].tolist())
    return pa.table(columns, schema=mass_schema())


def mass_schema() -> Any:
    """The schema of attention-mass files."""
    import pyarrow as pa

    return pa.schema(
        [("request_id", pa.string()), ("layer", pa.int32()), ("token", pa.int32())]
        + [(name, pa.float32()) for name in SPANS]
        + [("images", pa.list_(pa.float32()))]
    )


def flow_table(by_request: Mapping[str, Masses]) -> Any:
    """request_id, layer, source, target, mass: what a span's rows attend to, on average."""
    import pyarrow as pa

    rows = [
        {"request_id": request, "layer": layer, "source": source, "target": target,
         "mass": float(masses.flow_LSS[layer, i, j])}
        for request, masses in by_request.items()
        for layer in range(len(masses.flow_LSS))
        for i, source in enumerate(SPANS)
        for j, target in enumerate(SPANS)
        if j <= i and np.isfinite(masses.flow_LSS[layer, i, j])
    ]  # fmt: skip
    schema = pa.schema(
        [("request_id", pa.string()), ("layer", pa.int32()), ("source", pa.string()),
         ("target", pa.string()), ("mass", pa.float32())]
    )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schema)


def write_tables(by_request: Mapping[str, Masses], run: Path) -> list[Path]:
    """Write `attention.parquet` and `attention_flow.parquet` into the run's folder."""
    import pyarrow.parquet as pq

    run.mkdir(parents=True, exist_ok=True)
    paths = [run / "attention.parquet", run / "attention_flow.parquet"]
    pq.write_table(mass_table(by_request), paths[0])
    pq.write_table(flow_table(by_request), paths[1])
    return paths
