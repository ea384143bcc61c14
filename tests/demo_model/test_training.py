"""The demo model's training: stopped and started again it makes the same weights; its table is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.demo_model.sprites import drawn_palette  # noqa: E402
from vllm_flow.demo_model.assemble import WEIGHTS  # noqa: E402
from vllm_flow.demo_model.scenes import LABELS, SIZE, Style, compose  # noqa: E402
from vllm_flow.demo_model.small import SMALL_CONFIG  # noqa: E402
from vllm_flow.demo_model.smollm2 import Decoder  # noqa: E402
from vllm_flow.demo_model.training import (  # noqa: E402
    batches,
    decoder_stage,
    export,
    projector_stage,
    run,
    small_stage,
    vision_stage,
)
from vllm_flow.demo_model.training.budget import Budget, trapezoid  # noqa: E402
from vllm_flow.demo_model.training.files import Log, load, log_rows  # noqa: E402
from vllm_flow.demo_model.training.lora import new_llama  # noqa: E402
from vllm_flow.demo_model.training.sprites import Assets  # noqa: E402
from vllm_flow.demo_model.training.towers import new_tower  # noqa: E402
from vllm_flow.demo_model.training.vision_stage import features  # noqa: E402
from vllm_flow.demo_model.vision import TOWER_CONFIG  # noqa: E402

BUDGET = replace(
    Budget(),
    vision_steps=4, vision_batch=2, projector_steps=3, projector_batch=2, lora_steps=4, lora_batch=1,
    lora_rank=2, small_steps=3, small_batch=2, checkpoint_every=0.0,
)  # fmt: skip
FEWER = replace(BUDGET, vision_steps=2, small_steps=2)
"""For the command as a whole."""
MACHINE = batches.Machine()


class Stopped(Exception):
    """What a stop at the worst moment looks like: right after a state was written."""


@pytest.fixture()
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is checked, and the tower computes in float32: most processors only emulate bfloat16."""
    for stage in (vision_stage, projector_stage, decoder_stage):
        monkeypatch.setattr(stage, "features", partial(features, dtype=torch.float32))
    monkeypatch.setattr(vision_stage, "CHECK_BATCHES", 1)
    monkeypatch.setattr(vision_stage, "CHECK_SIZE", 4)
    for stage in (projector_stage, decoder_stage, small_stage):
        monkeypatch.setattr(stage, "CHECK_SCENES", 2)


def stopped_after(states: int, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a stage until it has written so many states."""
    written = 0
    save = batches.Saver.save

    def counting(self: batches.Saver, *args: Any, **more: Any) -> None:
        nonlocal written
        save(self, *args, **more)
        written += 1
        if written == states:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(batches.Saver, "save", counting)
        run()


def small_words() -> Any:
    return tokenizers.Tokenizer.from_file(str(WEIGHTS / "small_tokenizer.json"))


def tiny_decoder() -> Decoder:
    """Two layers in SmolLM2's place, with the same weights in every call."""
    config = {**SMALL_CONFIG, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return Decoder(config, dict(new_llama(config).state_dict()))


def same(one: Path, other: Path) -> bool:
    left, right = load(one), load(other)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.long
def test_the_vision_stage_goes_on_exactly_where_it_was_stopped(
    tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch, quick_checks: None
) -> None:
    def run(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        log = Log(tmp_path / name / "log.jsonl")
        return vision_stage.train(tmp_path / name, assets, BUDGET, log, MACHINE)

    whole = run("whole")
    stopped_after(2, lambda: run("twice"), monkeypatch)
    assert not (tmp_path / "twice" / "vision.safetensors").exists()
    assert same(whole, run("twice"))
    assert not (tmp_path / "twice" / "vision_state.pt").exists()
    assert [row["step"] for row in log_rows(tmp_path / "twice") if row.get("resumed")] == [2]
    torch.manual_seed(BUDGET.seed)
    fresh = new_tower(TOWER_CONFIG).state_dict()
    assert all(not torch.equal(fresh[k], v) for k, v in load(whole).items() if v.ndim == 2)


def test_products_of_sixteen_bits_are_near() -> None:
    """As training takes them; the other tests here take all of 32."""
    tower, pixels = (
        new_tower(TOWER_CONFIG).eval(),
        torch.randint(256, (1, 3, SIZE, SIZE), dtype=torch.uint8),
    )
    with torch.no_grad():
        short, long = features(tower, pixels), features(tower, pixels, torch.float32)
    for one, other in zip(short, long, strict=True):
        assert one.dtype == torch.float32 and not torch.equal(one, other)
        torch.testing.assert_close(one, other, atol=0.1, rtol=0.1)


@pytest.mark.long
def test_the_later_stages_go_on_exactly_where_they_were_stopped(
    tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch, quick_checks: None
) -> None:
    tokenizer, decoder = small_words(), tiny_decoder()
    torch.manual_seed(0)
    tower = new_tower(TOWER_CONFIG).eval().requires_grad_(False)

    def run(name: str) -> Path:
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        log = Log(work / "log.jsonl")
        table = decoder.weights["embed_tokens.weight"]
        fitted = work / "projector.safetensors"
        projector_stage.train(fitted, assets, tower, table, tokenizer, BUDGET, log, MACHINE)
        decoder_stage.train(work, assets, tower, decoder, tokenizer, BUDGET, log, MACHINE)
        return work

    whole = run("whole")
    stopped_after(2, lambda: run("twice"), monkeypatch)
    twice = run("twice")
    for name in ("projector", "lora", "projector_tuned"):
        assert same(whole / f"{name}.safetensors", twice / f"{name}.safetensors"), name
    assert not same(whole / "projector.safetensors", whole / "projector_tuned.safetensors")
    assert any(v.abs().max() > 0 for k, v in load(whole / "lora.safetensors").items() if "_b" in k)
    log = (whole / "log.jsonl").read_text()
    assert all(f'"{task}"' in log for task in ("presence", "choice", "word", "caption"))


@pytest.fixture
def train(
    tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch, quick_checks: None
) -> Callable[[str], Path]:
    """Runs the command with little of everything; the folder that it worked in."""
    tiny = make_dataclass(
        "Tiny",
        [(name, type(value), field(default=value)) for name, value in FEWER.as_dict().items()],
        bases=(Budget,),
        frozen=True,
    )
    # Muon multiplies in bfloat16, which takes seconds a step where it is emulated.
    monkeypatch.setattr(torch.optim, "Muon", partial(torch.optim.Muon, ns_steps=1))
    monkeypatch.setattr(run, "Budget", tiny)
    monkeypatch.setattr(run, "load_assets", lambda work: assets)
    monkeypatch.setattr(run, "read_decoder", tiny_decoder)
    monkeypatch.setattr(run, "read_tokenizer", small_words)
    monkeypatch.setattr(run, "small_tokenizer", small_words)

    def train_in(name: str) -> Path:
        work = tmp_path / name
        monkeypatch.setattr("sys.argv", ["run", "--work", str(work), "--lora-steps", "2"])
        run.main()
        return work

    return train_in


def test_the_command_runs_every_stage_once(train: Callable[[str], Path]) -> None:
    work = train("one")
    made = {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert set(made) >= {*export.COMMITTED.values(), "projector.safetensors"}
    assert not list(work.glob("*.pt")) and not list(work.glob("*.part"))
    rows = log_rows(work)
    assert [row["stage"] for row in rows if row["stage"] in ("start", "done")] == ["start", "done"]
    assert rows[0]["lora_steps"] == 2 and rows[0]["vision_steps"] == FEWER.vision_steps
    checked = [row["stage"] for row in rows if any(name in row for name in export.CHECKS)]
    assert checked == ["vision", "projector", "lora", "small_projector", "small"]

    train("one")  # nothing is left to do
    assert {path.name: path.stat().st_mtime_ns for path in work.glob("*.safetensors")} == made

    small = load(work / "small_decoder.safetensors")
    assert small["embed_tokens.weight"].shape == (992, 192)
    assert not any(name.startswith("layers.6") for name in small)
    fitted, tuned = work / "small_fitted.safetensors", work / "small_projector.safetensors"
    assert not same(fitted, tuned)


@pytest.mark.long
def test_the_command_always_makes_the_same_weights(train: Callable[[str], Path]) -> None:
    one, other = train("one"), train("other")
    made = [path.name for path in one.glob("*.safetensors")]
    assert made and all(same(one / name, other / name) for name in made)


def test_batches_are_the_scenes_of_their_step(assets: Assets) -> None:
    steps = batches.SceneSteps(batches.training_palette(assets), 1000, 3, page_share=0.2)
    ahead = list(steps.steps(5, 7, MACHINE))
    assert len(ahead) == 2
    for number, batch in zip((5, 6), ahead, strict=True):
        assert torch.equal(batch["pixels"], steps[number]["pixels"])
        assert batch["facts"] == steps[number]["facts"]
        present = [{LABELS[i] for i in row.nonzero()[:, 0]} for row in batch["present"]]
        assert present == [{*f.objects, *(s.word for s in f.signs)} for f in batch["facts"]]


def test_a_patch_is_to_look_like_its_word() -> None:
    tokenizer = small_words()
    table = torch.randn(SMALL_CONFIG["vocab_size"], 64, generator=torch.Generator().manual_seed(0))
    goal = projector_stage.Goal(table, tokenizer)
    scenes = [compose(seed, drawn_palette(), Style()) for seed in range(4)]
    batch = batches.collate(scenes)
    target = goal.of(batch)
    nearest = goal.nearest(target).argmax(-1)
    # Words of one spelling in this small vocabulary may be cut alike; nearly all are their own.
    assert (nearest == batch["patches"]).float().mean() > 0.9
    left, right = target[:, 0], target[:, 11]
    assert not torch.allclose(left, right)


@given(st.integers(1, 10_000), st.integers(1, 100), st.floats(0.05, 0.9))
def test_the_rate_rises_stays_and_falls(steps: int, warmup: int, decay: float) -> None:
    factors = [
        trapezoid(step, steps, warmup, decay) for step in range(0, steps, max(1, steps // 50))
    ]
    assert all(0.0 < factor <= 1.0 for factor in factors)
    assert (
        trapezoid(steps - 1, steps, 1, decay) <= max(0.02 + 1 / (steps * decay), 0.05) or steps < 30
    )
    for step in range(warmup, int(steps * (1 - decay))):
        assert trapezoid(step, steps, warmup, decay) == 1.0
