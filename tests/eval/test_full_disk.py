"""A disk that fills up under an evaluation: one sentence, no answer lost, and the same command goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray")

from tests.commands.places import fill, tiny_disk  # noqa: E402
from tests.eval import fake_engine  # noqa: E402
from tests.eval.demo_pope import write_pope  # noqa: E402
from tests.eval.test_driver import command, rows_of, written  # noqa: E402
from vllm_flow import cli  # noqa: E402
from vllm_flow.eval.sweep import driver, engine_args  # noqa: E402
from vllm_flow.eval.sweep.records import Run  # noqa: E402

QUESTIONS = 100


def test_a_full_disk_keeps_the_answers(
    cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(driver, "answers", fake_engine.fake_answers)
    monkeypatch.setattr(engine_args, "known_names", fake_engine.any_name)
    write_pope(tmp_path / "data" / "pope", QUESTIONS)
    with tiny_disk(tmp_path / "disk", 1024) as disk:
        out = disk / "run"
        asked = command(tmp_path / "data", out, "baseline,cliff=2", "--engines", "1")
        asked += ["--batch", "2", "--engine-args", '{"seconds": 0.01}']
        tell = Run.append

        def filled(run: Run, batch: object) -> None:
            """The disk is all but full once something is on it."""
            tell(run, batch)  # type: ignore[arg-type]
            if len(written(out)) == 3:
                fill(disk, leave=30_000)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "append", filled)
            assert cli.main(asked) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"vllm-flow eval: {out}/") and "No space left on device" in said
        assert said.endswith(f"the answers so far are in {out}, and the same command goes on.")
        kept = rows_of(out)
        assert 0 < len(kept) < 2 * QUESTIONS

        (disk / "filler").unlink()
        assert cli.main(asked) == 0
        rows = rows_of(out)
        assert len(rows) == len({(r["item_id"], r["policy"]) for r in rows}) == 2 * QUESTIONS
        found = {(row["item_id"], row["policy"]): row for row in rows}
        assert all(found[row["item_id"], row["policy"]] == row for row in kept)
