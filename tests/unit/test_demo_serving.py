"""The demo's requests, against an engine that only looks: what is sent, in which order, what comes of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.synthetic import ENGINE, IMAGE_TOKENS
from vllm_flow.block_counts import predict_blocks
from vllm_flow.demo import material, results_table
from vllm_flow.demo.command import write_all
from vllm_flow.demo.kinds import BY_KEY
from vllm_flow.demo.measurements import Answer, Question
from vllm_flow.demo.rows import spread, summarise
from vllm_flow.demo.serving import LONG, MIXED, Asker
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans

CLIFFS = [0, 10, 20, 30]
FEW = [0, 30]


class Onlooker:
    """Stands where `vllm.LLM` stands; says the cliff, and remembers what it was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int, int]] = []
        self.batches: list[list[int]] = []
        self.footprints: dict[str, Any] = {}

    def generate(self, prompts: Any, sampling: Any, use_tqdm: bool) -> list[Any]:
        self.batches.append([])
        self.footprints = {}
        outputs = []
        for prompt, (cliff, tokens) in zip(prompts, sampling, strict=True):
            assert prompt["multi_modal_data"]["image"].mode == "RGB"
            number = str(len(self.sent))
            self.sent.append((prompt["prompt"], cliff, tokens))
            self.batches[-1].append(cliff)
            self.footprints[f"{number}-12345678"] = footprint(cliff)
            text = SimpleNamespace(text=f" {cliff}\n")
            outputs.append(SimpleNamespace(request_id=number, outputs=[text]))
        return outputs


def footprint(cliff: int) -> Any:
    """As an engine would report it: blocks as predicted."""
    layout = None
    if cliff < ENGINE.num_layers:
        layout = TokenLayout.of(
            FlowPolicy.withdrawal(cliff), ImageSpans.from_ranges([(0, IMAGE_TOKENS)])
        )
    return SimpleNamespace(
        prompt_tokens=180,
        image_tokens=IMAGE_TOKENS,
        computed_tokens=181,
        blocks=predict_blocks(181, layout, ENGINE.group_starts, ENGINE.block_size),
    )


@pytest.fixture(scope="module")
def asked(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Onlooker, list[Question], list[Answer]]:
    questions = material.held_out(12, tmp_path_factory.mktemp("questions"))
    llm = Onlooker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_flow.engine.inspect.footprints", lambda llm: llm.footprints)
        patch.setattr(Asker, "sampling", lambda self, cliff, tokens: (cliff, tokens))
        asker = Asker(llm, ENGINE, lambda text: f"<{text}>")
        steps = list(asker.ask(questions, CLIFFS, FEW))
        assert [done for done, _ in steps] == [[30, 20], [10, 0]], "the baseline, then the deepest"
        for done, found in steps:
            assert {answer.cliff for answer in found} == set(done)
        return llm, questions, [answer for _, found in steps for answer in found]


def test_every_question_is_sent_once_per_cliff(
    asked: tuple[Onlooker, list[Question], list[Answer]],
) -> None:
    llm, questions, answers = asked
    expected = Counter(
        (f"<{q.item.text}>", cliff, BY_KEY[q.kind].max_tokens)
        for q in questions
        for cliff in (CLIFFS if BY_KEY[q.kind].every_cliff else FEW)
    )
    assert Counter(llm.sent) == expected
    assert len({(a.question_id, a.cliff) for a in answers}) == len(answers) == len(llm.sent)


def test_answers_belong_to_their_requests(
    asked: tuple[Onlooker, list[Question], list[Answer]],
) -> None:
    _, questions, answers = asked
    by_id = {question.id: question for question in questions}
    for answer in answers:
        assert answer.said == str(answer.cliff)
        assert answer.blocks == footprint(answer.cliff).blocks
        assert answer.reading == material.read_answer(by_id[answer.question_id], answer.said)


def test_batches_mix_cliffs_and_part_long_answers(
    asked: tuple[Onlooker, list[Question], list[Answer]],
) -> None:
    llm, _, _ = asked
    assert sum(len(set(batch)) == MIXED for batch in llm.batches) >= 2
    first = 0
    for batch in llm.batches:
        tokens = [tokens for _, _, tokens in llm.sent[first : first + len(batch)]]
        assert tokens == sorted(tokens, key=lambda count: count > LONG)
        first += len(batch)


def test_requests_come_in_the_same_mixed_order_every_time(
    asked: tuple[Onlooker, list[Question], list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, questions, _ = asked
    again = Onlooker()
    monkeypatch.setattr("vllm_flow.engine.inspect.footprints", lambda llm: llm.footprints)
    monkeypatch.setattr(Asker, "sampling", lambda self, cliff, tokens: (cliff, tokens))
    for _ in Asker(again, ENGINE, lambda text: f"<{text}>").ask(questions, CLIFFS, FEW):
        pass
    assert again.sent == llm.sent
    cliffs = [cliff for _, cliff, _ in llm.sent[:20]]
    assert cliffs != sorted(cliffs) and cliffs != sorted(cliffs, reverse=True)


def test_rows_can_be_told_before_the_last_cliff_is_asked(
    asked: tuple[Onlooker, list[Question], list[Answer]],
) -> None:
    _, questions, answers = asked
    first = [answer for answer in answers if answer.cliff in (20, 30)]
    results = summarise(ENGINE, questions, first, {30: [1.0, 1.0], 20: [1.2, 2.9]})
    assert [row.cliff for row in results.rows] == [20, 30]
    shallow, baseline = (results_table.line(row, results) for row in results.rows)
    assert baseline.startswith("cliff 30: yes/no") and "prefill × 1.00 [1.00, 1.00]" in baseline
    assert "prefill × disturbed [1.20, 2.90]" in shallow and "captions" not in shallow


def test_a_run_becomes_results(
    asked: tuple[Onlooker, list[Question], list[Answer]], tmp_path: Path
) -> None:
    _, questions, answers = asked
    results = summarise(ENGINE, questions, answers, {})
    assert [row.cliff for row in results.rows] == CLIFFS
    assert all(row.blocks_equal == row.requests for row in results.rows)
    assert results.cliffs_of("captions") == FEW
    assert all(path.is_file() for path in write_all(results, tmp_path))


class Clock:
    """Stands where `vllm.LLM` stands and takes as long as a batch's cliff wants, but once."""

    def __init__(self, disturbed: int) -> None:
        self.now = 0.0
        self.cliffs: list[int] = []
        self.disturbed = disturbed
        """Number of the batch that takes twice as long."""

    def generate(self, prompts: Any, sampling: tuple[int, int], use_tqdm: bool) -> list[Any]:
        took = (1 + sampling[0]) * (2.0 if len(self.cliffs) == self.disturbed else 1.0)
        self.cliffs.append(sampling[0])
        began, self.now = self.now, self.now + took
        times = SimpleNamespace(scheduled_ts=began, first_token_ts=self.now)
        return [SimpleNamespace(metrics=times) for _ in prompts]


@pytest.mark.parametrize("disturbed", range(2 + 3 * 6))
def test_one_disturbed_batch_spoils_one_cliff_at_most(
    monkeypatch: pytest.MonkeyPatch, disturbed: int
) -> None:
    monkeypatch.setattr(Asker, "sampling", lambda self, cliff, tokens: (cliff, tokens))
    monkeypatch.setattr(Asker, "prompt", lambda self, question: question)
    llm: Any = Clock(disturbed)
    found = Asker(llm, ENGINE, str).time_prefill(["a question"], CLIFFS, 3)  # type: ignore[list-item]
    assert [len(ratios) for ratios in found.values()] == [3] * len(CLIFFS)
    spoilt = [cliff for cliff, ratios in found.items() if not spread(ratios).agrees]
    at = llm.cliffs[disturbed]
    warm_up = disturbed < 2
    assert spoilt == ([] if warm_up or at == ENGINE.num_layers else [at])
    for cliff in CLIFFS:
        assert spread(found[cliff]).median == pytest.approx(31 / (1 + cliff))
