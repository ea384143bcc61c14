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
from PIL import Image, ImageOps

from tests.analysis.conftest import PROMPT, SHAPE
from tests.engine import tiny_llava
from tests.unit.odd_pictures import png_of
from vllm_flow import cli
from vllm_flow.analysis import cam_command, figure_cam
from vllm_flow.analysis.attention_reference import attention_masses, write_tables
from vllm_flow.analysis.cam_command import box_corners, colour, layer_numbers
from vllm_flow.analysis.cam_file import CamRecord
from vllm_flow.analysis.figure_cam import blend, draw_convergence, draw_overlays
from vllm_flow.analysis.vlm import Encoded, Vlm
from vllm_flow.attention import TokenAttention
from vllm_flow.engine.attention.writer import mass_table, write_table


@pytest.fixture(scope="module")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "picture.png"
    tiny_llava.picture(SHAPE, 3).save(path)
    return path


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


def test_cam_refuses_in_a_sentence(
    checkpoints: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_llava.build(SHAPE, checkpoints))
    asked = ["cam", "--model", model, "--image", str(image_file), "--prompt", PROMPT,
             "--answer", " w7", "--samples", "0", "--device", "cpu", "--out", str(tmp_path)]  # fmt: skip
    for extra, says in (
        (["--layers", "9"], "layer 9 does not exist: this model has the layers 0 to 3"),
        (["--word", "w8"], "does not contain the word 'w8'"),
        (["--box", "0,0,17,4"], "not inside the picture of 16 x 16"),
        (["--prompt", "w1 w2"], "chat template"),
    ):
        assert cli.main([*asked, *extra]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        cli.main([*asked, "--sigma", "-1"])
    assert left.value.code == 2
    assert "--sigma: '-1' is no number" in capsys.readouterr().err
    assert cli.main([*asked, "--model", str(tmp_path / "gone")]) == 1
    assert "cannot be loaded" in capsys.readouterr().err


def asked_of(checkpoints: Path, image: Path, out: Path, *more: str) -> list[str]:
    model = str(tiny_llava.build(SHAPE, checkpoints))
    return ["cam", "--model", model, "--image", str(image), "--prompt", PROMPT, "--answer", " w7",
            "--layers", "1", "--samples", "0", "--device", "cpu", "--out", str(out), *more]  # fmt: skip


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[CamRecord]:
    """What `vllm-flow cam` found, undrawn."""
    found: list[CamRecord] = []
    monkeypatch.setattr(cam_command, "write", lambda record, out: found.append(record) or [])
    return found


@pytest.mark.parametrize("orientation", [3, 6])
def test_cam_and_its_box_see_the_picture_as_shown(
    checkpoints: Path, tmp_path: Path, records: list[CamRecord], orientation: int
) -> None:
    """A picture that EXIF turns, beside one that is stored as shown."""
    stored = tiny_llava.picture(SHAPE, 3).resize((16, 8))
    data = Image.Exif()
    data[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=data)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    shown.save(tmp_path / "shown.png", exif=Image.Exif())
    width, height = shown.size
    box = f"0,0,{width // 2},{height // 2}"
    for name in ("turned", "shown"):
        path = tmp_path / f"{name}.png"
        assert cli.main(asked_of(checkpoints, path, tmp_path / name, "--box", box)) == 0
    turned, plain = records
    assert (turned.view == plain.view).all() and (turned.heat == plain.heat).all()
    assert turned.box == plain.box and (turned.coverage == plain.coverage).all()
    assert turned.coverage is not None and turned.coverage[0, 0] == 1


def test_cam_puts_transparency_on_a_background(
    checkpoints: Path, tmp_path: Path, records: list[CamRecord]
) -> None:
    Image.new("RGBA", (16, 16), (200, 10, 10, 0)).save(tmp_path / "gone.png")
    for more, value in (([], 255), (["--background", "0,0,0"], 0)):
        assert cli.main(asked_of(checkpoints, tmp_path / "gone.png", tmp_path, *more)) == 0
        assert (records[-1].view == value).all()


def test_cam_refuses_a_picture_before_it_loads_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vllm_flow.analysis.loading.load", load)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "large.png").write_bytes(png_of(20_000, 10_000))
    tiny_llava.picture(SHAPE, 3).save(tmp_path / "x.png")
    for name, more, says in (
        ("gone.png", [], "gone.png: there is no such file"),
        ("text.png", [], "text.png: no picture of a kind that vLLM's server reads"),
        ("large.png", [], "large.png: more than 178956970 pixels"),
        ("x.png", ["--box", "0,0,17,4"], "not inside the picture of 16 x 16"),
    ):
        asked = ["cam", "--model", "m", "--image", str(tmp_path / name), "--prompt", PROMPT, *more]
        assert cli.main(asked) == 2
        said = capsys.readouterr().err
        assert said.startswith("vllm-flow cam: ") and says in said and said.count("\n") == 1


@pytest.mark.parametrize("text", ["", "1,2", "1,2,256", "1,2,-3", "1,2,3,4", "white", "1,2,3²"])
def test_backgrounds_that_are_no_colour(text: str) -> None:
    with pytest.raises(Exception, match="is no colour: write red,green,blue"):
        colour(text)


def test_layers_and_boxes_as_they_are_typed() -> None:
    assert layer_numbers("all") is None
    assert layer_numbers("8,0,4,4") == (0, 4, 8)
    assert layer_numbers("0:30:10") == (0, 10, 20, 30) and layer_numbers("2:4") == (2, 3, 4)
    assert box_corners("1,2,3.5,4") == (1, 2, 3.5, 4)
    for bad in ("", "a", "4:2", "0:9:0", "1_6", "2²", "-1", "0:99999999999", "1:2:3:4", "9" * 5000):
        with pytest.raises(Exception, match="none of"):
            layer_numbers(bad)
    for bad in ("1,2,3", "nan,0,1,1", "0,0,inf,1"):
        with pytest.raises(Exception, match="left,top,right,bottom"):
            box_corners(bad)


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
