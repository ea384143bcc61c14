"""Ranks of other packages: found by name, refused in words, in nobody's way; and what their functions must give."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.plugins.installing import RANK_PACKAGE, lay_out, pip_install, visible, write_package
from vllm_flow import rank_trials
from vllm_flow.cli import main
from vllm_flow.engine import diagnosis, obstacles
from vllm_flow.eval.sweep.policies import PolicySpecError, parse_policies
from vllm_flow.policy_error import PolicyError
from vllm_flow.policy_keys import parse_policy, policy_label
from vllm_flow.ranks import GROUP, OWN, RANKS, PictureRank, PositionRank, TowerRank
from vllm_flow.ranks.added import FUNCTIONS
from vllm_flow.ranks.base import Draw
from vllm_flow.ranks.rows import HiddenRank, QuestionRank
from vllm_flow.registry import PluginError

SOUND = """
    import numpy as np
    from vllm_flow.ranks import AttentionRank, PictureRank, PositionRank, TowerRank
    from vllm_flow.ranks.base import Needs

    def first(total, keep, draw):
        return np.arange(keep)

    FIRST = PositionRank("first", "the first ones", first)
"""


PAGE = Path(__file__).parents[2] / "docs/extending.md"


@pytest.fixture
def center(tmp_path: Path) -> Iterator[None]:
    with visible(lay_out(RANK_PACKAGE, tmp_path / "site")):
        yield


def refused(keys: dict[str, Any]) -> str:
    with pytest.raises(PolicyError) as caught:
        parse_policy(keys, 32)
    return str(caught.value)


def test_a_package_that_pip_installs_is_found_by_name(tmp_path: Path) -> None:
    """In a process of its own, which is told of nothing but where packages are."""
    site = pip_install(RANK_PACKAGE, tmp_path / "site")
    code = (
        "import sys; from vllm_flow.ranks import RANKS; from vllm_flow.policy_keys import parse_policy\n"
        "assert {'center', 'far_from_mean'} <= set(RANKS) and 'flow_center_rank' not in sys.modules\n"
        "assert parse_policy({'flow_stages': '0:50% uniform'}, 8) and 'flow_center_rank' not in sys.modules\n"
        "print(parse_policy({'flow_stages': '0:50% center, 4:20% far_from_mean'}, 8))"
    )
    path = os.pathsep.join([str(site), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "0:50% center, 4:20% far_from_mean\n", done.stderr


def test_it_is_a_rank_like_any_other(center: None, capsys: pytest.CaptureFixture[str]) -> None:
    policy = parse_policy({"flow_cliff": 2, "flow_keep": "25%", "flow_rank": "center"}, 32)
    assert str(policy) == "2:25% center"
    assert policy_label({"flow_stages": "0:50% center, 4:0"}) == "ranks=center"
    assert RANKS["center"].choose(9, 4, Draw(0, 0, 0)).tolist() == [2, 3, 4, 5]
    assert [p.name for p in parse_policies("0:64 center;20:0", 32)] == ["0:64 center;20:0"]
    assert [p.name for p in parse_policies("budget=1/4 center far_from_mean", 32, 24)] == [
        "0:25% center",
        "0:25% far_from_mean",
    ]
    assert main(["policies"]) == 0
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()[-2:]
    assert rows == [
        "| `center` | the middle in reading order (flow_center_rank 1.0) | places alone | nothing | any prefix |",
        "| `far_from_mean` | far from the picture's mean embedding (flow_center_rank 1.0) | the image's embeddings "
        "| the image | any prefix that does not end inside an image |",
    ]
    # What follows from its kind: places are known after the prefill, embeddings are not.
    assert parse_policy({"flow_stages": "2:9 center", "flow_when": "decode"}, 32) is not None
    late = refused({"flow_stages": "2:9 far_from_mean", "flow_when": "decode"})
    assert "rank by 'uniform', 'random', 'last_prompt', 'center'" in late


def test_an_unknown_name_is_told_the_packages_ranks(center: None) -> None:
    assert "'dart', 'center', 'far_from_mean'." in refused({"flow_stages": "0:1 xyz"})
    assert "did you mean 'center'?" in refused({"flow_stages": "0:1 centre"})
    assert "0:1 center" not in RANKS
    with pytest.raises(PolicySpecError, match="choose from .*downsample, center, far_from_mean"):
        parse_policies("budget=1/4 xyz", 32)


def test_without_the_package_it_is_unknown() -> None:
    assert "'center' is no rank" in refused({"flow_stages": "0:1 center"})


def test_an_own_name_cannot_be_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"last_prompt": "taker:FIRST", "first": "taker:FIRST"}
    with visible(write_package(tmp_path, "taker", GROUP, places, SOUND)):
        told = (
            "rank 'last_prompt' is one of vllm-flow's own, and taker 1.0 (taker:FIRST) registers another one by that "
            "name; rename it there, or uninstall that package."
        )
        assert told in refused({"flow_stages": "2:1 last_prompt"})
        assert told in refused({"flow_preset": "fastv"}), "whose stages name it"
        assert told.rstrip(".") in str(pytest.raises(PluginError, RANKS.check, "last_prompt").value)
        assert parse_policy({"flow_stages": "2:1 last_image, 4:1 first"}, 32) is not None
        assert RANKS["last_prompt"] is OWN["last_prompt"], "nothing inside takes the other one"
        assert main(["policies"]) == 1
        said = capsys.readouterr()
        assert told in said.err and "| `first` |" in said.out and "`last_prompt` |" not in said.out


def test_a_name_of_two_packages_is_refused(tmp_path: Path) -> None:
    sites = [
        write_package(tmp_path / name, name, GROUP, {"first": f"{name}:FIRST"}, SOUND)
        for name in ("one", "two")
    ]
    with visible(*sites):
        assert (
            "rank 'first' is registered by one 1.0 (one:FIRST) and by two 1.0 (two:FIRST); uninstall all but one"
            in refused({"flow_stages": "0:1 first"})
        )


BROKEN = {
    "missing module": ("", "cannot be imported: ModuleNotFoundError: No module named 'broken'"),
    "missing dependency": ("import nowhere", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    "syntax": ("def", "cannot be imported: SyntaxError"),
    "exit": ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
    "missing attribute": ("OTHER = 1", "cannot be imported: AttributeError"),
    "number": ("RANK = 1", "int is of no such kind; it must be an object of one of vllm_flow.ranks's kinds"),
    "class": ("from vllm_flow.ranks import PositionRank as RANK", "PositionRank is a class, not an object"),
    "derived": (
        f"{SOUND}\n    class Late(PictureRank): late = True\n    RANK = Late('broken', 'x', first)",
        "Late is of no such kind; it must be an object of one of vllm_flow.ranks's kinds PositionRank, PictureRank, "
        "TowerRank, TileRank, FrameRank, QuestionRank, UnrotatedRank, HiddenRank, itself and not of a class derived "
        "from it",
    ),
    "attention": (
        f"{SOUND}\n    RANK = AttentionRank('broken', 'x', Needs.IMAGE)",
        "an AttentionRank has no function that a package could bring, and both that there can be are there: "
        "'last_image' and 'last_prompt'",
    ),
    "other name": (f"{SOUND}\n    RANK = FIRST", "it calls itself 'first'; its name must be that of its entry point"),
    "title": (f"{SOUND}\n    RANK = PositionRank('broken', 'a | b', first)", "its title 'a | b' cannot be a cell"),
    "no function": (f"{SOUND}\n    RANK = PositionRank('broken', 'x', 7)", "its choose is no function, but int"),
    "flag": (f"{SOUND}\n    RANK = PositionRank('broken', 'x', first, 'no')", "its draws must be True or False"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_package_is_told_of_when_it_is_named(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = BROKEN[fault]
    with visible(write_package(tmp_path, "broken", GROUP, {"broken": "broken:RANK"}, code)):
        # Others are used, and told of, as if it were not there.
        assert parse_policy({"flow_preset": "fastv"}, 32) is not None
        late = refused({"flow_stages": "2:9 dart", "flow_when": "decode"})
        assert "broken" not in late and "'last_prompt'" in late
        assert "broken" in refused({"flow_stages": "0:1 xyz"}), "its name is known all the same"
        message = refused({"flow_stages": "0:1 broken"})
        assert "rank 'broken' of broken 1.0 (broken:RANK) cannot be" in message and told in message
        assert message == refused({"flow_stages": "0:1 broken"}), "also the second time"
        assert main(["policies"]) == 1
        said = capsys.readouterr()
        table = said.out.split("\n\n")[0].splitlines()[2:]
        assert told in said.err and [row.split("`")[1] for row in table] == list(OWN)


@pytest.mark.parametrize("name", ["Center", "a-b", "horizon", "9"])
def test_names_that_could_not_be_written_are_refused(name: str, tmp_path: Path) -> None:
    with visible(write_package(tmp_path, "odd", GROUP, {name: "odd:FIRST"}, SOUND)):
        assert "cannot be its name" in str(pytest.raises(PluginError, RANKS.check, name).value)


def test_the_registry_is_a_mapping_of_all_names(center: None) -> None:
    assert list(RANKS) == [*OWN, "center", "far_from_mean"] and len(RANKS) == len(OWN) + 2
    assert list(RANKS.usable()) == list(RANKS) and RANKS.faults() == []
    assert RANKS.get("xyz") is None and "xyz" not in RANKS
    with pytest.raises(KeyError):
        RANKS.check("xyz")


def test_what_a_function_gives_is_checked_at_every_call(tmp_path: Path) -> None:
    code = f"""{SOUND}
    WRONG = PositionRank("wrong", "x", lambda n, k, draw: np.arange(k)[::-1] if n > 9 else np.arange(k))
    FAILS = PositionRank("fails", "x", lambda total, keep, draw: 1 // 0)
    SHORT = PictureRank("short", "x", lambda rows, keep: rows[:, 0].argsort()[: keep - 1])
    """
    places = {name.lower(): f"bad:{name}" for name in ("WRONG", "FAILS", "SHORT")}
    with visible(write_package(tmp_path, "bad", GROUP, places, code)):
        assert RANKS["wrong"].choose(9, 2, Draw(0, 0, 0)).tolist() == [0, 1]
        with pytest.raises(PluginError) as caught:
            RANKS["wrong"].choose(10, 3, Draw(0, 0, 0))
        assert str(caught.value) == (
            "choose of rank 'wrong' of bad 1.0 (bad:WRONG) gave ndarray (3,) of int64 [2, 1, 0] and must give a numpy "
            "array of 3 int64 indices from 0 to 9, ascending, each once"
        )
        with pytest.raises(PluginError, match=r"bad:FAILS\) failed: ZeroDivisionError"):
            RANKS["fails"].choose(9, 2, Draw(0, 0, 0))
        with pytest.raises(PluginError, match=r"gave Tensor \(2,\) of torch.int64 and must give"):
            RANKS["short"].order(torch.zeros(9, 4), 3)


@pytest.mark.parametrize("name", OWN)
def test_the_ranks_of_this_package_pass_the_trial(name: str) -> None:
    rank_trials.check(OWN[name])


def test_the_example_passes_the_trial(center: None) -> None:
    for name in ("center", "far_from_mean"):
        rank_trials.check(RANKS[name])
        assert hasattr(getattr(RANKS[name], FUNCTIONS[type(RANKS[name])]), "__wrapped__")


def best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    return scores.argsort(descending=True, stable=True)[:keep]


def forgetful(rows: torch.Tensor, keep: int, seen: list[int] = []) -> torch.Tensor:  # noqa: B006
    seen.append(0)
    return (best(rows[:, 0], keep) + len(seen)) % len(rows)


UNSOUND = {
    "two results": PictureRank("p", "x", forgetful),
    "each once": PictureRank("p", "x", lambda rows, keep: best(rows[:, 0], keep) * 0),
    "the beginning of the order of more": PictureRank(
        "p", "x", lambda rows, keep: best(rows[:, 0], keep).flip(0)
    ),
    "changes what it is given": PictureRank("p", "x", lambda rows, keep: best(rows.neg_()[:, 0], keep)),
    "say draws=True": PositionRank(
        "p", "x", lambda n, k, draw: np.sort((np.arange(k) + draw.seed) % n)
    ),
    "ascending, each once": PositionRank("p", "x", lambda n, k, draw: np.arange(k)[::-1].copy()),
    r"of torch\.int64": TowerRank("p", "x", lambda scores, rows, keep: best(scores, keep).int()),
    "must stay": HiddenRank("p", "x", lambda rows, keys, q, qk, keep: keys > 0.5),
    "not all of them 0": QuestionRank("p", "x", weights=lambda rows, asked: asked[:, 0].float() * 0),
    "not finite": PictureRank(
        "p", "x", lambda rows, keep: best(rows[:, 0], keep), merge=lambda rows, kept: rows[kept] / 0
    ),
    "merge of rank 'p' changes what": TowerRank(
        "p", "x", lambda scores, rows, keep: best(scores, keep),
        merge=lambda rows, kept, scores, keys: rows.mul_(2)[kept],
    ),
    "merge of rank 'p' gave": TowerRank(
        "p", "x", lambda scores, rows, keep: best(scores, keep), merge=lambda rows, kept, *more: rows
    ),
    "ZeroDivisionError": PictureRank("p", "x", lambda rows, keep: best(rows[:, 0], keep // 0)),
}  # fmt: skip


@pytest.mark.parametrize("told", UNSOUND)
def test_what_breaks_a_promise_fails_the_trial(told: str) -> None:
    wanted = ZeroDivisionError if told == "ZeroDivisionError" else ValueError
    with pytest.raises(wanted, match=None if wanted is ZeroDivisionError else told):
        rank_trials.check(UNSOUND[told])


def test_a_worker_without_the_package_says_so(center: None) -> None:
    wanted = obstacles.added_ranks()
    assert wanted == {
        "center": "flow_center_rank 1.0 (flow_center_rank:CENTER)",
        "far_from_mean": "flow_center_rank 1.0 (flow_center_rank:FAR_FROM_MEAN)",
    }
    assert obstacles.missing_ranks(wanted) == {}
    newer = {"center": "flow_center_rank 2.0 (flow_center_rank:CENTER)", "third": "third 1.0 (a:B)"}
    assert obstacles.missing_ranks(newer) == {
        "added rank center": "the front end has that of flow_center_rank 2.0 (flow_center_rank:CENTER), a worker "
        "flow_center_rank 1.0 (flow_center_rank:CENTER)",
        "added rank third": "the front end has that of third 1.0 (a:B), a worker none",
    }


def test_the_page_shows_the_packages_that_are_tested() -> None:
    shown = re.findall(r"<!-- (tests/\S+) -->\n```\w+\n(.+?)```\n", PAGE.read_text(), re.DOTALL)
    assert len(shown) == 4
    for path, text in shown:
        assert text == (PAGE.parents[1] / path).read_text(), path


def test_a_bug_report_names_the_package(center: None) -> None:
    assert diagnosis.versions()["flow_center_rank"] == "1.0"
