"""Arguments of ``vllm-flow profile``: what is refused, and that every preset can be read."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from vllm_flow.cli import build_parser
from vllm_flow.exits import Refused
from vllm_flow.profile.presets import PRESETS
from vllm_flow.profile.shape import LlavaShape


def parse(line: str) -> argparse.Namespace:
    argv = ["profile", *shlex.split(line)]
    return build_parser(argv).parse_args(argv)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_read(name: str) -> None:
    names = [run for run, _ in PRESETS[name]]
    assert len(set(names)) == len(names)
    for _, line in PRESETS[name]:
        args = parse(line)
        LlavaShape.parse(args.shape)
        if args.requests is not None:
            assert len(args.requests) == len(args.concurrency)


@pytest.mark.parametrize(
    "line, said",
    [
        ("", "required"),
        ("--model a --shape layers=2", "not allowed"),
        ("--model a --parts prefil", "choose from"),
        ("--model a --rounds 0", "above 0"),
        ("--model a --rounds 1,2", "above 0"),
        ("--model a --concurrency 1,x", "such as 1,8,32"),
        ("--model a --concurrency 1_6", "such as 1,8,32"),
        ("--model a --kv-cache-gib 0", "above 0"),
        ("--model a --kv-cache-gib nan", "above 0"),
        ("--model a --ttft-ms inf", "above 0"),
    ],
)
def test_refusals(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(line)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, said",
    [
        ("--shape layers=x", "layers=x"),
        ("--shape layers=4 --requests 1,2", "--requests names 2"),
        ("--shape layers=4 --policies cliff=9", "cliff=9"),
        ("--shape layers=4 --policies cliff=1_0", "write cliff=8"),
        ("--shape layers=4 --policies cliff=L/-4", "write cliff=8"),
        ("--shape layers=4 --policies cliff=2/", "write cliff=8"),
        ("--shape layers=4 --group-layers 3", "group_layers=3"),
        ("--shape layers=4 --image-tokens 600", "600 image tokens"),
        ("--shape layers=4,image_tokens=20", "--image-tokens for more"),
        ("--shape layers=4 --peer-cliff cliff=1,cliff=2", "--peer-cliff 'cliff=1,cliff=2'"),
        ("--shape layers=4 --peer-cliff ''", "peers are compared at one cliff"),
        ("--shape layers=4 --peer-cliff fastv", "such as cliff=8"),
        ("--shape layers=4 --control", "not load"),
        ("--shape layers=4 --control --parts decode --policies cliff=2", "leave out --policies"),
        ("--model no-such-folder", "no model at 'no-such-folder'"),
    ],
)
def test_what_does_not_fit_is_told_before_an_engine_starts(
    line: str, said: str, tmp_path: Path
) -> None:
    from vllm_flow.profile import command

    with pytest.raises(Refused, match=re.escape(said)):
        command.run(parse(f"{line} --out {tmp_path}"))


def test_graphs_need_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from vllm_flow.profile import command

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refused, match="--execution graphs: CUDA graphs need a CUDA device"):
        command.run(parse(f"--shape layers=4 --execution graphs --out {tmp_path}"))


@pytest.mark.parametrize(
    ("line", "extension"),
    [("--parts decode", [False, True]), ("--parts decode --control", [False, False])],
)
def test_a_control_is_stock_vllm_twice(
    line: str, extension: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm_flow.profile import command, engines, session

    opened = []

    def record(*_: object, extension: bool, num_layers: int) -> None:
        opened.append(extension)

    monkeypatch.setattr(engines, "open_engine", record)
    args = parse(f"--shape layers=4 {line} --out {tmp_path}")
    with pytest.raises(AttributeError, match="NoneType"):  # what is measured needs engines
        command.run(args)
    assert opened == extension
    names = [system.name for system in session.settle(args, tmp_path).systems]
    assert names[:2] == ["stock", "stock again" if args.control else "baseline"]


@pytest.mark.parametrize(
    ("line", "beside", "unread"),
    [
        ("", "", {}),
        ("--out OUT", "", {}),
        (
            "--rounds 6 --dtype float32 --out=OUT",
            "--rounds 6 --dtype float32",
            {"capacity": "--rounds 6"},
        ),
        (
            "--policies 'cliff=1, fastv' --guard",
            "--policies 'cliff=1, fastv' --guard",
            {"peers": "--policies 'cliff=1, fastv' --guard"},
        ),
        (
            "--ttft-ms 5 --block-size 16",
            "--ttft-ms 5 --block-size 16",
            dict.fromkeys(("capacity", "decode", "tinyllama-22", "peers"), "--ttft-ms 5"),
        ),
    ],
)
def test_options_beside_a_preset_replace_its_own(
    line: str,
    beside: str,
    unread: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Each run takes those that it reads; the others would be refused there."""
    from vllm_flow import cli
    from vllm_flow.profile import command

    runs = []

    class Child:
        def __init__(self, run: list[str]) -> None:
            runs.append(run)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(command.subprocess, "Popen", Child)
    out = tmp_path / "out"
    argv = shlex.split(line.replace("OUT", str(out)))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", *argv, "--preset", "cpu"]) == 0
    folder = str(out) if "OUT" in line else "out/profile"
    for run, (name, own) in zip(runs, PRESETS["cpu"], strict=True):
        without = unread.get(name, "")
        assert without in beside
        more = shlex.split(beside.replace(without, "") if without else beside)
        given = [*shlex.split(own), *more, "--out", f"{folder}/{name}"]
        assert run[run.index("profile") + 1 :] == given
        parse(shlex.join(given))
