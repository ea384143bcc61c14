"""Attention masses by Hugging Face's maps: the reference for the engine's logger, and its tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flow.analysis.attention_reference import (
    IMAGE,
    OUTPUT,
    SYSTEM,
    USER,
    Masses,
    answer_rows,
    attention_masses,
    reduce_maps,
    runs,
    span_of,
    write_tables,
)
from vllm_flow.analysis.figure_attention import by_layer, read_masses
from vllm_flow.analysis.figure_flow import read_flow
from vllm_flow.analysis.vlm import Encoded, Vlm
from vllm_flow.style import SPANS

ANSWER = [20, 33, 47]


@pytest.fixture(scope="module")
def masses(eager: Vlm, encoded: Encoded) -> Masses:
    return attention_masses(eager, encoded, ANSWER)


def test_spans_of_a_prompt() -> None:
    is_image = [0, 0, 1, 1, 0, 1, 0, 0, 1]  # the last is an output token with the image token's id
    assert span_of(is_image, 7).tolist() == [
        SYSTEM, SYSTEM, IMAGE, IMAGE, USER, IMAGE, USER, OUTPUT, OUTPUT,
    ]  # fmt: skip
    assert span_of([0, 0, 0], 2).tolist() == [USER, USER, OUTPUT]
    assert span_of([0, 0, 1], 2).tolist() == [USER, USER, OUTPUT]  # an id is not an image


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=20))
def test_runs_cover_exactly_what_is_true(flags: list[bool]) -> None:
    covered = np.zeros(len(flags), dtype=bool)
    found = runs(flags)
    for run in found:
        assert run.start < run.stop and not covered[run].any()
        covered[run] = True
    assert covered.tolist() == flags
    assert all(a.stop < b.start for a, b in zip(found, found[1:], strict=False))


def test_masses_are_sums_of_probabilities(eager: Vlm, encoded: Encoded, masses: Masses) -> None:
    """Against the model's own maps on token ids and pixels, summed position by position."""
    ids = torch.cat([encoded.ids_T, torch.tensor(ANSWER)])[None]
    with torch.no_grad():
        maps = eager.model(
            input_ids=ids,
            pixel_values=encoded.picture.pixels[None].double(),
            output_attentions=True,
        ).attentions
    first, total = len(encoded.ids_T), ids.shape[1]
    for layer in range(4):
        for token in range(3):
            row = maps[layer][0, :, first - 1 + token].mean(0)
            expected = [0.0] * 4
            for position in range(total):
                if position >= first:
                    span = OUTPUT
                elif ids[0, position] == eager.model.config.image_token_id:
                    span = IMAGE
                else:
                    span = SYSTEM if position < int(encoded.image_P[0]) else USER
                expected[span] += float(row[position])
            np.testing.assert_allclose(masses.spans_LAS[layer, token], expected, atol=1e-6)


def test_masses_hang_together(masses: Masses) -> None:
    np.testing.assert_allclose(masses.spans_LAS.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(masses.images_LAI.sum(-1), masses.spans_LAS[..., IMAGE], atol=1e-6)
    np.testing.assert_allclose(masses.heat_LAP.sum(-1), masses.spans_LAS[..., IMAGE], atol=1e-6)
    assert (masses.spans_LAS[:, 0, OUTPUT] == 0).all()  # nothing is written yet
    assert (masses.spans_LAS[:, 1:, OUTPUT] > 0).all()
    np.testing.assert_allclose(masses.flow_LSS.sum(-1), 1, atol=1e-6)
    later = np.triu(np.ones((4, 4), dtype=bool), 1)
    assert (masses.flow_LSS[:, later] == 0).all()  # nobody reads what comes later


def test_own_rows_are_one_further(eager: Vlm, encoded: Encoded, masses: Masses) -> None:
    own = attention_masses(eager, encoded, ANSWER, rows="own").spans_LAS
    np.testing.assert_allclose(own[:, :-1], masses.spans_LAS[:, 1:], atol=1e-6)
    assert answer_rows(10, 3) == slice(9, 12) and answer_rows(10, 3, "own") == slice(10, 13)


def test_several_images_have_masses_of_their_own() -> None:
    is_image = np.array([0, 1, 1, 0, 1, 0, 0], dtype=bool)
    map_TT = np.tril(np.random.default_rng(0).random((7, 7)))
    map_TT /= map_TT.sum(1, keepdims=True)
    found = reduce_maps([map_TT], is_image, 6, runs(is_image))
    np.testing.assert_allclose(
        found.images_LAI[0, 0], [map_TT[5, 1:3].sum(), map_TT[5, 4]], rtol=1e-6
    )


def test_other_attention_than_eager_is_refused(tiny: Vlm, encoded: Encoded) -> None:
    with pytest.raises(ValueError, match="eager"):
        attention_masses(tiny, encoded, ANSWER)


def test_tables_keep_the_agreed_schema(masses: Masses, tmp_path: Path) -> None:
    write_tables({"a": masses, "b": masses}, tmp_path)
    schema = pq.read_schema(tmp_path / "attention.parquet")
    assert {field.name: str(field.type) for field in schema} == {
        "request_id": "string", "layer": "int32", "token": "int32", "system": "float",
        "image": "float", "user": "float", "output": "float", "images": "list<element: float>",
    }  # fmt: skip
    found = read_masses([tmp_path / "attention.parquet"])
    assert len(found["layer"]) == 2 * 4 * 3
    summary = by_layer(found)
    np.testing.assert_allclose(summary.mean, masses.spans_LAS.mean(1), atol=1e-6)
    np.testing.assert_allclose(summary.low, summary.high, atol=1e-6)  # both requests are the same
    flow = read_flow(tmp_path / "attention_flow.parquet")
    assert flow[2, "output", "image"] == pytest.approx(float(masses.flow_LSS[2, OUTPUT, IMAGE]))
    assert set(s for _, s, _ in flow) == set(SPANS)
