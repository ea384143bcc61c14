"""Draws the figures of a run from what its folder holds, and writes the numbers beside them.

  attention*.parquet       attention mass by span (Figure 2): request_id, layer, token, system, image, user, output
  mass/*.parquet           the same, as an engine's attention log has it
  attention_flow.parquet   attention between spans (after Figure 1): request_id, layer, source, target, mass
  cam*.npz                 LLaVA-CAMs of `vllm-flow cam` (Figures 3 and 4)
  report/scores.csv        scores of an evaluation, as `vllm-flow report` writes them (Figure 5); also scores.csv

A file that is not there is passed over. Figures are PNG and SVG, numbers CSV.

    python -m vllm_flow.demo_model.datasets --out data --tasks pope
    vllm-flow cam --image $(ls data/pope/val2014/*.jpg | head -1) --prompt "What is in this picture?" \\
        --layers 0:28:4 --out runs/cam
    vllm-flow figures runs/cam
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_flow.user_text import parse_json

FLOW = "attention_flow.parquet"
WORDS = "attention_words.json"
"""Optional: request_id -> the answer's tokens as text, to label rows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vllm-flow figures``."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder with the files named above")
    parser.add_argument("--out", type=Path, help="where figures go (default: RUN/figures)")
    parser.add_argument("--request", help="whose answer panel B of Figure 2 shows (its request_id)")


def run(args: argparse.Namespace) -> int:
    """Draw what can be drawn; 1 where there is nothing, 2 where a file is not what it should be."""
    from vllm_flow.exits import CommandError, Refused, keeping
    from vllm_flow.outputs import check_folder

    if not args.run.is_dir():
        raise Refused(f"{args.run} is no folder; name the one that the files are in")
    out = args.out or args.run / "figures"
    check_folder(out)
    with keeping(lambda: f"figures that were drawn are in {out}" if out.is_dir() else None):
        try:
            written = draw_all(args.run, out, args.request)
        except ValueError as error:
            raise Refused(str(error)) from error
    if not written:
        evaluated = (args.run / "answers").is_dir()
        hint = f"; for an evaluation run `vllm-flow report {args.run}` first" if evaluated else ""
        raise CommandError(
            f"nothing to draw in {args.run}; it looks for attention*.parquet, mass/*.parquet, "
            f"cam*.npz and report/scores.csv there{hint}"
        )
    for path in written:
        print(f"  {path}")
    return 0


def draw_all(run: Path, out: Path, request: str | None = None) -> list[Path]:
    """Every figure there is material for; the paths written."""
    return [
        *draw_masses(run, out, request),
        *draw_flows(run, out),
        *draw_cams(run, out),
        *draw_score_curves(run, out),
    ]


def draw_masses(run: Path, out: Path, request: str | None = None) -> list[Path]:
    """Figure 2."""
    from vllm_flow.analysis.cam_file import write_rows
    from vllm_flow.analysis.figure_attention import (
        by_layer,
        draw_attention,
        longest,
        mass_rows,
        read_masses,
    )

    written = [*sorted(run.glob("attention*.parquet")), *sorted(run.glob("mass/*.parquet"))]
    paths = [path for path in written if is_mass_file(path)]
    if not paths:
        if request is not None:
            raise ValueError(
                f"--request {request}: there is no attention in {run}, neither attention*.parquet nor mass/*.parquet"
            )
        return []
    masses = read_masses(paths)
    if request is not None and request not in set(masses["request_id"]):
        raise ValueError(f"--request {request}: no such request_id in {paths[0].name}")
    request = request or longest(masses)
    words = None
    if (run / WORDS).exists():
        words = read_words(run / WORDS, request)
    return [
        *draw_attention(masses, out / "attention", request, words),
        write_rows(mass_rows(by_layer(masses)), out / "attention.csv"),
    ]


def read_words(path: Path, request: str) -> list[str] | None:
    """The words of a request's answer; None where the file has none. ValueError where it is damaged."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    words = found.get(request) if isinstance(found, dict) else found
    if words is not None and not (
        isinstance(words, list) and all(isinstance(word, str) for word in words)
    ):
        raise ValueError(f"{path} is no object of lists of words")
    return words


def is_mass_file(path: Path) -> bool:
    """Whether a Parquet file has a column of image masses, and so is neither flow nor heat."""
    from vllm_flow.analysis.columns import column_names

    return "image" in column_names(path)


def draw_flows(run: Path, out: Path) -> list[Path]:
    """The diagram after Figure 1."""
    from vllm_flow.analysis.cam_file import write_rows
    from vllm_flow.analysis.figure_flow import draw_flow, flow_rows, read_flow

    if not (run / FLOW).exists():
        return []
    flow = read_flow(run / FLOW)
    return [*draw_flow(flow, out / "flow"), write_rows(flow_rows(flow), out / "flow.csv")]


def draw_cams(run: Path, out: Path) -> list[Path]:
    """Figures 3 and 4, one per CAM."""
    from vllm_flow.analysis.cam_file import CamRecord, write_rows
    from vllm_flow.analysis.figure_cam import draw_convergence, draw_overlays

    written = []
    records = [(path.stem, CamRecord.load(path)) for path in sorted(run.glob("cam*.npz"))]
    for name, record in records:
        written += draw_overlays([record], out / f"{name}_overlays")
        written.append(write_rows(record.rows(), out / f"{name}.csv"))
        if record.coverage is not None:
            written += draw_convergence(record, out / f"{name}_convergence")
    return written


def draw_score_curves(run: Path, out: Path) -> list[Path]:
    """Figure 5."""
    from vllm_flow.analysis.cam_file import write_rows
    from vllm_flow.analysis.figure_scores import draw_scores, read_scores, score_rows

    for path in (run / "report" / "scores.csv", run / "scores.csv"):
        if path.exists():
            scores = read_scores(path)
            rows = write_rows(score_rows(scores), out / "scores.csv")
            return [*draw_scores(scores, out / "scores"), rows]
    return []
