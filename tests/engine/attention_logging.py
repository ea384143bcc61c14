"""An engine that logs its attention, and what its log must hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from vllm import RequestOutput

from tests.engine import attention_oracle, kept_oracle, oracle
from tests.engine.cases import (
    Ask,
)
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine, tokens_of
from tests.engine.tiny_llava import Shape, picture

TOLERANCE = 5e-5
"""Of a probability; the masses themselves sum to 1."""


class LoggingEngine:
    """An engine with a log of its own, and the log."""

    def __init__(
        self,
        open_engine: OpenEngine,
        root: Path,
        shape: Shape,
        group_layers: int,
        kernel: str = "auto",
        **options: Any,
    ) -> None:
        name = f"{shape.family}-{group_layers}-{kernel}-{sorted(options.items())}"
        self.directory = root / f"log-{abs(hash(name))}"
        flow = {
            "group_layers": group_layers,
            "attention_log": str(self.directory),
            "attention_log_kernel": kernel,
        }
        self.engine: Engine = open_engine(
            shape, group_layers, additional_config={"vllm_flow": flow}, **options
        )

    def rows(self, kind: str, request_ids: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of some requests, from disk."""
        assert self.engine.scheduler.flow_logged.log.flush()
        folder = self.directory / kind
        rows = pq.read_table(folder).to_pylist() if folder.exists() else []
        return [row for row in rows if row["request_id"] in request_ids]


def expected_shares(
    attention_TT: np.ndarray, row: int, prompt: oracle.Prompt, images: int
) -> tuple[list[float], list[float], np.ndarray]:
    """The four shares, the images' and the heat of one row, straight from the definition."""
    is_image = np.array(prompt.is_image_T)
    weights = attention_TT[row, : row + 1]
    inside, outside = weights[: len(is_image)], weights[len(is_image) :]
    first = int(is_image.argmax()) if is_image.any() else 0
    before = np.arange(len(inside)) < first
    heat = inside[is_image]
    per_image = heat.reshape(images, -1).sum(1).tolist() if images else []
    text = [inside[~is_image & before].sum(), heat.sum(), inside[~is_image & ~before].sum()]
    return [*text, outside.sum()], per_image, heat


def assert_logged(
    logging: LoggingEngine, asks: Sequence[Ask], outputs: Sequence[RequestOutput]
) -> None:
    """What the log says of these requests, and of no token more, is the oracle's attention."""
    engine = logging.engine
    ids = [out.request_id for out in outputs]
    rows = logging.rows("mass", ids)
    heat_rows = logging.rows("heat", ids)
    keys = [(row["request_id"], row["layer"], row["token"]) for row in rows]
    assert len(keys) == len(set(keys)), "a token is logged twice"
    by_key = dict(zip(keys, rows, strict=True))
    heats = {(row["request_id"], row["layer"], row["token"]): row["heat"] for row in heat_rows}
    assert len(heats) == len(heat_rows)
    for ask, output in zip(asks, outputs, strict=True):
        layers = () if not ask.log else range(engine.shape.layers) if ask.log is True else ask.log
        tokens = tokens_of(output)
        wanted = {(output.request_id, layer, t) for layer in layers for t in range(len(tokens))}
        assert {key for key in keys if key[0] == output.request_id} == wanted
        assert {key for key in heats if key[0] == output.request_id} == (
            wanted if ask.heat else set()
        )
        if not wanted:
            continue
        pictures = [picture(engine.shape, seed) for seed in ask.images]
        prompt = oracle.encode(engine.model_dir, ask.prompt, pictures)
        cliff = engine.shape.layers if ask.cliff is None else ask.cliff
        of_model = (engine.model_dir, prompt, tokens[:-1])
        if ask.late:
            attention = kept_oracle.attention_late(*of_model, ask.stages or f"{cliff}:0").numpy()
        else:
            attention = attention_oracle.attention_removed(*of_model, cliff).numpy()
        for key in wanted:
            _, layer, token = key
            row = by_key[key]
            shares, images, heat = expected_shares(
                attention[layer], len(prompt.ids) - 1 + token, prompt, len(ask.images)
            )
            found = [row[name] for name in ("system", "image", "user", "output")]
            where = f"cliff {ask.cliff}, layer {layer}, token {token}"
            np.testing.assert_allclose(found, shares, atol=TOLERANCE, rtol=0, err_msg=where)
            assert abs(sum(found) - 1) < 1e-5, where
            np.testing.assert_allclose(row["images"], images, atol=TOLERANCE, rtol=0, err_msg=where)
            if layer >= cliff and ask.images and not (ask.late and token == 0):
                assert row["image"] == 0 and not any(row["images"])
            if ask.heat:
                np.testing.assert_allclose(heats[key], heat, atol=TOLERANCE, rtol=0, err_msg=where)
