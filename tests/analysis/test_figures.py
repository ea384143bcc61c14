"""The commands write what they say: figures, numbers, and sentences where the input is wrong."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.analysis.conftest import PROMPT, SHAPE
from tests.engine import tiny_llava
from vllm_flow import cli
from vllm_flow.analysis import figure_cam
from vllm_flow.analysis.attention_reference import attention_masses, write_tables
from vllm_flow.analysis.cam_file import CamRecord
from vllm_flow.analysis.figure_cam import blend, draw_convergence, draw_overlays
from vllm_flow.analysis.vlm import Encoded, Vlm
from vllm_flow.attention import TokenAttention
from vllm_flow.engine.core.attention.writer import mass_table, write_table


@pytest.fixture(scope="module")
def cam_run(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, image_file: Path) -> Path:
    """A run folder that `vllm-flow cam` has written into."""
    out = tmp_path_factory.mktemp("run")
    model = str(tiny_llava.build(SHAPE, checkpoints))
    status = cli.main(
        ["cam", "--model", model, "--image", str(image_file), "--prompt", PROMPT, "--answer",
         " w7 w9", "--word", "w7w9", "--layers", "0:3:1", "--samples", "2", "--box", "0,0,8,16",
         "--device", "cpu", "--out", str(out)]
    )  # fmt: skip
    assert status == 0
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_cam_writes_arrays_numbers_and_figures(cam_run: Path) -> None:
    names = {path.name for path in cam_run.iterdir()}
    assert names == {"cam.npz", "cam.csv", "overlays.png", "overlays.svg", "convergence.png",
                     "convergence.svg"}  # fmt: skip
    record = CamRecord.load(cam_run / "cam.npz")
    assert record.layers == (0, 1, 2, 3) and record.heat.shape == (4, 4, 4)
    assert record.answer_tokens == ("w7", "w9") and record.explained == (0, 1)
    assert record.box == (0, 0, 8, 16)
    assert (np.asarray(record.coverage) == [[1, 1, 0, 0]] * 4).all()
    for row, heat in zip(rows(cam_run / "cam.csv"), record.heat, strict=True):
        assert float(row["peak"]) == pytest.approx(float(heat.max()), rel=1e-5)
        if heat.any():
            share = float(heat[:, :2].sum() / heat.sum())
            assert float(row["inside_box"]) == pytest.approx(share, rel=1e-5)
        assert float(row["inside_box_by_chance"]) == 0.5


def test_figures_draws_all_there_is(
    cam_run: Path, eager: Vlm, encoded: Encoded, tmp_path: Path
) -> None:
    (tmp_path / "cam.npz").write_bytes((cam_run / "cam.npz").read_bytes())
    masses = attention_masses(eager, encoded, [20, 33])
    write_tables({"a": masses}, tmp_path)
    (tmp_path / "scores.csv").write_text(
        "task,kind,layer,metric,headline,value,low,high\npope,baseline,4,f1,True,0.9,0.8,1\n"
        "pope,cliff,2,f1,True,0.5,0.4,0.6\npope,text-only,0,f1,True,0.4,0.3,0.5\n"
    )
    assert cli.main(["figures", str(tmp_path)]) == 0
    out = tmp_path / "figures"
    for stem in ("attention", "flow", "cam_overlays", "cam_convergence", "scores"):
        with Image.open(out / f"{stem}.png") as png:
            assert png.width > 600
            assert len(np.unique(np.asarray(png.convert("L")))) > 20  # something is drawn
        assert (out / f"{stem}.svg").read_text().lstrip().startswith("<?xml")
    table = rows(out / "attention.csv")
    assert [float(row["image"]) for row in table] == pytest.approx(
        masses.spans_LAS[:, :, 1].mean(1).tolist(), rel=1e-4
    )
    assert rows(out / "flow.csv")[2]["output<image"] != ""


def test_an_engines_log_is_drawn_where_it_lies(tmp_path: Path) -> None:
    shares = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1]], dtype=np.float32)
    layers, images = np.array([0, 1], dtype=np.int32), shares[:, 1:2]
    tokens = [("a", TokenAttention(token, layers, shares, images, None)) for token in range(3)]
    write_table(mass_table(tokens), tmp_path / "mass" / "part-1.parquet")
    write_table(mass_table([("b", tokens[0][1])]), tmp_path / "mass" / "part-2.parquet")
    assert cli.main(["figures", str(tmp_path)]) == 0
    drawn = rows(tmp_path / "figures" / "attention.csv")
    assert [float(row["image"]) for row in drawn] == pytest.approx([0.3, 0.6])


def test_figures_without_material(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["figures", str(tmp_path)]) == 1
    assert "nothing to draw" in capsys.readouterr().err
    assert cli.main(["figures", str(tmp_path / "gone")]) == 2
    assert "is no folder; name the one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "table", "says"),
    [
        ("attention.parquet", {"image": [1.0]}, "lacks request_id"),
        (
            "attention.parquet",
            {"request_id": ["r"], "layer": [3], "token": [0], "system": [0.5], "image": [0.1],
             "user": [0.1], "output": [0.0]},
            "request r, layer 3 sum to 0.700",
        ),
        ("attention_flow.parquet", {"layer": [0]}, "lacks source"),
    ],
)  # fmt: skip
def test_wrong_tables_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, table: dict, says: str
) -> None:
    pq.write_table(pa.table(table), tmp_path / name)
    assert cli.main(["figures", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


def test_an_overlay_is_grey_where_cold_and_coloured_where_hot() -> None:
    view = np.full((16, 16, 3), (200, 60, 60), dtype=np.uint8)
    heat = np.zeros((4, 4))
    heat[0, 0] = 3
    pixels = blend(view, heat).astype(int)
    assert np.ptp(pixels[-1, -1]) == 0 and np.ptp(pixels[0, 0]) > 40
    assert (np.ptp(blend(view, np.zeros((4, 4))).astype(int), axis=2) == 0).all()


def test_a_file_that_is_no_cam(tmp_path: Path) -> None:
    np.savez(tmp_path / "cam.npz", heat=np.zeros(3))
    with pytest.raises(
        ValueError, match="is no CAM: it lacks answer_ids, answer_tokens, explained"
    ):
        CamRecord.load(tmp_path / "cam.npz")


def record_of(size: tuple[int, int], grid: tuple[int, int], layers: int) -> CamRecord:
    """A CAM with some heat of a picture of a height and width."""
    rng = np.random.default_rng(0)
    return CamRecord(
        model="m", prompt="p", answer_tokens=("a",), answer_ids=(1,), explained=(0,),
        layers=tuple(range(layers)), heat=rng.random((layers, *grid), dtype=np.float32),
        view=rng.integers(0, 256, (*size, 3), dtype=np.uint8), hook="mlp", samples=0, sigma=0.1, seed=0,
    )  # fmt: skip


@pytest.mark.filterwarnings("error::UserWarning")
def test_panels_have_the_pictures_proportions(tmp_path: Path) -> None:
    """Of a wide picture, a tall one and strips; matplotlib warns where a panel has no room."""
    sizes = []
    for size, grid in (((100, 160), (5, 8)), ((160, 100), (8, 5)), ((40, 400), (2, 20))):
        with Image.open(draw_overlays([record_of(size, grid, 5)], tmp_path / "one")[0]) as png:
            sizes.append(png.size)
    (wide, low), (narrow, high), strip = sizes
    assert wide > 1.2 * narrow and low < 0.8 * high
    assert strip[0] > 3 * strip[1]
    both = [record_of((100, 160), (5, 8), 2), record_of((160, 100), (8, 5), 2)]
    draw_overlays(both, tmp_path / "both")
    draw_overlays([both[0]], tmp_path / "few")
    boxed = dataclasses.replace(both[0], coverage=np.full((5, 8), 0.5), box=(0, 0, 80, 100))
    draw_convergence(boxed, tmp_path / "boxed")  # with heat in every layer


def test_nothing_is_written_over_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of even heat is named in the legend, below each panel."""
    drawn: list[Any] = []
    monkeypatch.setattr(figure_cam, "save", lambda plt, figure, stem: drawn.append(figure) or [])
    record = record_of((100, 100), (4, 4), 5)
    draw_convergence(
        dataclasses.replace(record, coverage=np.full((4, 4), 0.5), box=(0, 0, 50, 50)), tmp_path
    )
    for axis in drawn[0].axes:
        assert not axis.texts
        assert [text.get_text() for text in axis.get_legend().get_texts()] == ["even heat"]


def test_a_map_need_not_be_square(tmp_path: Path) -> None:
    for part in ("", "whole"):
        record = dataclasses.replace(record_of((100, 160), (5, 8), 2), part=part)
        found = CamRecord.load(record.save(tmp_path / "cam.npz"))
        assert found.heat.shape == (2, 5, 8) and found.part == part
