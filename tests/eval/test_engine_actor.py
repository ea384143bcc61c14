"""One engine of an evaluation, without Ray: what it answers, shares, measures and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.engine.fixtures import prepare_process

prepare_process()

from tests.eval.demo_pope import GRID, LAYERS, small_options  # noqa: E402
from vllm_flow.demo_model.heldout import ANSWER_SUFFIX, load_questions, parse_yes_no  # noqa: E402
from vllm_flow.demo_model.naming import resolve_model  # noqa: E402
from vllm_flow.eval.sweep import engine_actor, model_facts  # noqa: E402
from vllm_flow.eval.sweep.downsample import encode, interpolate, reduced  # noqa: E402
from vllm_flow.eval.sweep.engine_actor import Ask, EngineActor  # noqa: E402
from vllm_flow.eval.sweep.policies import parse_policies  # noqa: E402
from vllm_flow.eval.sweep.schema import ANSWERS  # noqa: E402
from vllm_flow.eval.sweep.work import TaskWork, batches_of, plan_work  # noqa: E402
from vllm_flow.eval.tasks.base import Item  # noqa: E402
from vllm_flow.eval.tasks.pictures import parquet_image  # noqa: E402

pytestmark = pytest.mark.slow

QUESTIONS = load_questions("seen")[:12]
POLICIES = "baseline,cliff=2,cliff=3,text-only,downsample=1,downsample=3,downsample=6"
IMAGE_TOKENS = GRID * GRID


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineActor]:
    actor = EngineActor(small_options(POLICIES))
    yield actor
    actor.llm.llm_engine.engine_core.shutdown()


def items(*more: Item) -> list[Item]:
    asked = [
        Item(str(q.question_id), q.text + ANSWER_SUFFIX, str(q.image_path), {}) for q in QUESTIONS
    ]
    return [*asked, *more]


def under_new_names(asked: list[Item]) -> list[Item]:
    """The same pictures, of which no cache knows."""
    return [
        Item(i.id, i.text, f"{Path(i.image).parent}/./{Path(i.image).name}", {})
        for i in asked
        if i.image
    ]


def ask(engine: EngineActor, asked: list[Item], policies: str = POLICIES) -> dict[Any, dict]:
    work = TaskWork("t", asked, 4, "pad")
    (batch,) = batches_of(plan_work([work], parse_policies(policies, LAYERS), set()), 1000, 1000)
    table = engine(batch)
    assert table.schema == ANSWERS
    rows = {(row["item_id"], row["policy"]): row for row in table.to_pylist()}
    assert len(rows) == table.num_rows
    return rows


@contextmanager
def pictures_encoded(engine: EngineActor) -> Iterator[list[int]]:
    """How many pictures went through the vision tower, call by call."""
    seen: list[int] = []

    def watch(module: Any, args: Any, output: Any) -> None:
        seen.append(args[0].shape[0])

    (handle,) = engine.llm.apply_model(
        lambda model: model.vision_tower.register_forward_hook(watch)
    )
    try:
        yield seen
    finally:
        handle.remove()


def test_every_policy_of_every_item_is_answered_and_measured(engine: EngineActor) -> None:
    rows = ask(engine, items())
    assert rows.keys() == {(i.id, p.name) for i in items() for p in engine.options.policies}
    right = [
        parse_yes_no(rows[str(q.question_id), "baseline"]["answer"]) == q.label for q in QUESTIONS
    ]
    assert sum(right) >= 10, "the small model is no better than chance"
    blocks_of_text_only = set()
    for (_, policy), row in rows.items():
        assert row["error"] is None and row["answer"] == row["answer"].strip() != ""
        assert row["finish_reason"] in ("stop", "length") and 1 <= row["output_tokens"] <= 4
        assert row["seconds"] > 0
        kind, _, value = policy.partition("=")
        cliff = {"baseline": LAYERS, "text-only": 0}.get(policy) or (
            int(value) if kind == "cliff" else 0
        )
        if kind == "downsample":
            side = {1: 3, 3: 6, 6: 8}[int(value)]
            assert row["image_tokens"] == side * side
            assert row["prefill_rows_saved"] == LAYERS * (IMAGE_TOKENS - side * side)
        else:
            assert row["image_tokens"] == IMAGE_TOKENS
            assert row["prefill_rows_saved"] == IMAGE_TOKENS * (LAYERS - cliff)
        saved = row["kv_blocks_baseline"] - row["kv_blocks"]
        assert (saved > 0) == (policy not in ("baseline", "downsample=6"))
        assert (row["kv_bytes_saved"] > 0) == (saved > 0)
        if policy == "text-only":
            blocks_of_text_only.add(saved)
    assert blocks_of_text_only == {3 * (IMAGE_TOKENS // 32)}
    differ = {p for (i, p), row in rows.items() if row["answer"] != rows[i, "baseline"]["answer"]}
    assert "text-only" in differ, "hiding the picture changes no answer: policies are not applied"


def test_a_picture_is_encoded_once_for_all_policies(engine: EngineActor) -> None:
    pictures = {q.image_path for q in QUESTIONS}
    with pictures_encoded(engine) as seen:
        ask(engine, under_new_names(items()), "baseline,cliff=2,cliff=3,text-only")
    assert sum(seen) == len(pictures)


def test_a_reduced_picture_is_prefilled_with_its_own_tokens(engine: EngineActor) -> None:
    asked = items()[:3]
    rows = ask(engine, asked, "baseline,downsample=1,downsample=3")
    for item in asked:
        whole = rows[item.id, "baseline"]["prompt_tokens"]
        for policy, side in (("downsample=1", 3), ("downsample=3", 6)):
            row = rows[item.id, policy]
            assert row["prompt_tokens"] == whole - IMAGE_TOKENS + side * side


def test_the_full_grid_answers_as_the_picture_does(engine: EngineActor) -> None:
    rows = ask(engine, items(), "baseline,downsample=6")
    for item in items():
        whole, control = rows[item.id, "baseline"], rows[item.id, "downsample=6"]
        assert control["answer"] == whole["answer"]
        assert control["prompt_tokens"] == whole["prompt_tokens"]


@pytest.mark.parametrize("side", [1, 3, 6, 8])
def test_reduced_pictures_are_what_hugging_face_makes_of_them(
    engine: EngineActor, side: int
) -> None:
    """The tower and projector of another implementation, with its own interpolation."""
    from transformers import LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(
        resolve_model("demo-small"), dtype=torch.float32
    )
    pictures = [Image.open(q.image_path).convert("RGB") for q in QUESTIONS[:2]]
    pixels = engine.downsampler.pixels(pictures, side)
    assert pixels.shape[2] == pixels.shape[3] == side * pixels_per_patch(llava)
    (found,) = engine.llm.apply_model(lambda model: encode(model, pixels, side))
    with torch.inference_mode():
        hidden = llava.model.vision_tower(
            pixels, output_hidden_states=True, interpolate_pos_encoding=True
        ).hidden_states[llava.config.vision_feature_layer]
        expected = llava.model.multi_modal_projector(hidden[:, 1:])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def pixels_per_patch(llava: Any) -> int:
    return llava.config.vision_config.patch_size


def test_the_tower_is_left_as_it_was(engine: EngineActor) -> None:
    def hooks(model: Any) -> int:
        return len(model.vision_tower.vision_model.embeddings.position_embedding._forward_hooks)

    engine.downsampler.embed([Image.new("RGB", (40, 40))], 3)
    assert engine.llm.apply_model(hooks) == [0]


def test_what_cannot_be_answered_becomes_a_row(engine: EngineActor, tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt.png"
    Image.open(QUESTIONS[0].image_path).save(corrupt)
    corrupt.write_bytes(corrupt.read_bytes()[:200])
    no_row = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": [b"no picture"]}), no_row)
    picture = str(QUESTIONS[0].image_path)
    bad = [
        Item("missing", "?", str(tmp_path / "nowhere.png"), {}),
        Item("corrupt", "?", str(corrupt), {}),
        Item("no row", "?", parquet_image(no_row, 7), {}),
        Item("no picture", "?", parquet_image(no_row, 0), {}),
        Item("long", "word " * 600, picture, {}),
    ]
    good = items()[:2]
    policies = "baseline,cliff=2"
    rows = ask(engine, [good[0], *bad, good[1]], policies)
    says = {
        "missing": "image unreadable: " + str(tmp_path / "nowhere.png: there is no such file"),
        "corrupt": "damaged or cut short (image file is truncated",
        "no row": "1 row, so no row 7",
        "no picture": "row 0, column 'image': no picture of a kind",
        "long": "refused: ",
    }
    for item in bad:
        for policy in ("baseline", "cliff=2"):
            row = rows[item.id, policy]
            assert row["answer"] is None and says[item.id] in row["error"], row["error"]
    undisturbed = ask(engine, good, policies)
    for key, row in undisturbed.items():
        assert rows[key]["answer"] == row["answer"]


def test_a_question_without_a_picture(engine: EngineActor) -> None:
    rows = ask(engine, [Item("x", "Is there a dog in the image?" + ANSWER_SUFFIX, None, {})])
    for row in rows.values():
        assert row["image_tokens"] == row["prefill_rows_saved"] == row["kv_bytes_saved"] == 0
    assert len({row["answer"] for row in rows.values()}) == 1


def test_positions_of_a_grid_with_and_without_class_token() -> None:
    square = torch.randn(1, 16, 5)
    extra = torch.randn(1, 1, 5)
    resized = interpolate(square, 2)
    assert resized.shape == (1, 4, 5)
    assert torch.equal(
        interpolate(torch.cat([extra, square], 1), 2), torch.cat([extra, resized], 1)
    )
    assert interpolate(square, 4) is square
    with pytest.raises(ValueError, match="18 positions"):
        interpolate(torch.randn(1, 18, 5), 2)


def test_sizes_of_reduced_pictures() -> None:
    assert reduced({"shortest_edge": 336, "height": None}, 12, 24) == {"shortest_edge": 168}
    assert reduced({"height": 384, "width": 384}, 6, 24) == {"height": 96, "width": 96}
    with pytest.raises(ValueError, match="cannot be reduced"):
        reduced({"height": 384, "width": 384}, 2, 27)


def test_reduced_pictures_of_several_sizes_go_through_one_step(
    engine: EngineActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, policies = under_new_names(items()[:3]), ("downsample=1", "downsample=3")
    alone = {key: row for one in policies for key, row in ask(engine, items()[:3], one).items()}
    (model,) = engine.llm.apply_model(lambda model: model)
    given: list[Any] = []

    def watched(taking: Any = model.embed_multimodal, **kwargs: Any) -> Any:
        given.append(kwargs["image_embeds"])
        return taking(**kwargs)

    monkeypatch.setattr(model, "embed_multimodal", watched)
    names = []
    for row in plan_work([TaskWork("t", asked, 4, "pad")], parse_policies(POLICIES, LAYERS), set()):
        for policy, side in zip(policies, (3, 6), strict=True):
            one = Ask(row, engine.policies[policy], Image.open(row["image"]).convert("RGB"), side)
            (embedding,) = engine.downsampler.embed([one.picture], side)
            engine.enqueue(one, {}, embedding, max_tokens=4)
            names.append((row["item_id"], policy))
    outputs = engine.llm.wait_for_completion(use_tqdm=False)
    assert {len(embedding) for embedding in given[0]} == {9, 36}, "not one step"
    found = [output.outputs[0].text.strip() for output in outputs]
    assert found == [alone[name]["answer"] for name in names]


def test_batches_side_by_side_are_answered_as_alone(engine: EngineActor) -> None:
    batches = [[item] for item in items()[:4]]
    alone = [ask(engine, batch) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda batch: ask(engine, batch), batches))
    kept = ("answer", "error", "output_tokens", "image_tokens", "kv_blocks", "prefill_rows_saved")
    for before, after in zip(alone, together, strict=True):
        assert before.keys() == after.keys()
        for key, row in before.items():
            assert {name: row[name] for name in kept} == {name: after[key][name] for name in kept}


@pytest.mark.parametrize("allowed", [False, True])
def test_code_of_a_model_runs_where_the_run_allows_it(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the engine and beside it, where the processor is read."""
    told: list[bool] = []
    monkeypatch.setattr("vllm.LLM", lambda **given: told.append(given["trust_remote_code"]))
    monkeypatch.setattr(model_facts, "read_processor", lambda path, trust: told.append(trust))
    for name in ("SharedEngine", "room_in"):
        monkeypatch.setattr(engine_actor, name, lambda *args: None)
    EngineActor(small_options("baseline", trust_remote_code=allowed), extension=False)
    assert told == [allowed, allowed]


@pytest.mark.parametrize(("asked", "told"), [(None, {}), (3, {"group_layers": 3})])
def test_groups_are_the_engines_unless_somebody_asked(
    asked: int | None, told: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which sizes there can be, it knows: of layers that keep states, of a pipeline, with a drafter."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("vllm.LLM", lambda **options: given.update(options))
    monkeypatch.setattr("vllm_flow.engine.inspect.scheduler_of", lambda llm: mock.MagicMock())
    for name in ("SharedEngine", "room_in"):
        monkeypatch.setattr(engine_actor, name, lambda *args: None)
    EngineActor(replace(small_options("baseline"), group_layers=asked, flow_settings={"a": 1}))
    assert given["additional_config"] == {"vllm_flow": {**told, "a": 1}}
