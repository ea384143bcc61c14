"""A request that the front end ends, by a stop string or an abort, is reported and counted as any other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.sampling_params import BeamSearchParams
from vllm.v1.request import RequestStatus

from tests.engine.bare_prompts import prompt
from tests.engine.bare_scheduler import OpenBare
from tests.engine.cases import GQA, Ask, one_image, text_only, two_images
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import BLOCK_SIZE, Engine
from tests.engine.tiny_llava import SPECIALS, WORDS
from vllm_flow.block_counts import Geometry
from vllm_flow.engine.core.footprints import Footprint
from vllm_flow.engine.inspect import footprints
from vllm_flow.engine.report import OUTLINE_KEY, REPORT_KEY, Outline, report_from
from vllm_flow.engine.report import report as report_of

WORD_IDS = list(range(len(SPECIALS), len(SPECIALS) + len(WORDS)))
"""Whose text is not skipped."""
LENGTHS = (1, 2, 31, 32, 33, 34, 64, 65)
"""Of answers: they end before, at and after a block's last slot."""
SAVED = ("image_tokens_evicted", "prefill_rows_saved", "kv_blocks_saved", "kv_bytes_saved")


def answer(engine: Engine, ask: Ask, **params: Any) -> Any:
    settings = SamplingParams(
        temperature=0,
        ignore_eos=True,
        allowed_token_ids=WORD_IDS,
        extra_args=ask.extra_args,
        **params,
    )
    [out] = engine.llm.generate(engine.prompt(ask), settings, use_tqdm=False)
    return out


def answers(engine: Engine, ask: Ask, lengths: Sequence[int]) -> list[Any]:
    """The same request with several lengths, side by side."""
    settings = [
        SamplingParams(
            temperature=0,
            ignore_eos=True,
            allowed_token_ids=WORD_IDS,
            extra_args=ask.extra_args,
            max_tokens=length,
        )
        for length in lengths
    ]
    return engine.llm.generate([engine.prompt(ask)] * len(lengths), settings, use_tqdm=False)


def piece(engine: Engine, ask: Ask, share: float) -> str:
    """Two letters of the answer of 40 tokens, after that share of it: a stop string that is met."""
    text = answer(engine, ask, max_tokens=40).outputs[0].text
    assert len(text) > 40
    return text[int(share * len(text)) :][:2]


def report(out: Any) -> dict[str, Any] | None:
    return (out.kv_transfer_params or {}).get(REPORT_KEY)


def counted(policy: str) -> dict[str, float]:
    """vLLM-Flow's counters, the requests' of one policy."""
    names = {f"vllm_flow:{name}_total": {} for name in SAVED}
    names["vllm_flow:requests_total"] = {"policy": policy}
    found = dict.fromkeys(names, 0.0)
    for family in REGISTRY.collect():
        for sample in family.samples:
            wanted = names.get(sample.name)
            if wanted is not None and wanted.items() <= sample.labels.items():
                found[sample.name] += sample.value
    return found


@pytest.mark.parametrize(
    "ask",
    [one_image(51, 2), two_images(52, 0), replace(one_image(51, 2), late=True)],
    ids=["cliff-2", "cliff-0", "cliff-2-late"],
)
def test_a_stop_string_ends_a_request_as_its_length_would(
    open_engine: OpenEngine, ask: Ask
) -> None:
    engine = open_engine(GQA, 2)
    lengths = set()
    for share in (0, 0.3, 0.6, 0.9):
        word = piece(engine, ask, share)
        stopped = answer(engine, ask, max_tokens=40, stop=[word])
        length = len(stopped.outputs[0].token_ids)
        assert stopped.outputs[0].stop_reason == word
        assert report(stopped) == report(answer(engine, ask, max_tokens=length))
        lengths.add(length)
    assert len(lengths) > 1


@pytest.mark.parametrize(("held", "saved"), [((2, 3), 0), ((3, 3), 0), ((2, 1), 1), ((3, 1), 1)])
def test_blocks_for_refused_drafts_are_not_saved_less(held: tuple[int, ...], saved: int) -> None:
    """Two blocks a group without a policy; counters take nothing negative, and would end the engine."""
    geometry = Geometry(4, (0, 2), 16, 100)
    found = report_of(Footprint(3, 20, 8, 32, held, ((3, 8),)), geometry)
    assert (found["kv_blocks_saved"], found["kv_bytes_saved"]) == (saved, 100 * saved)
    assert found["kv_blocks"] == list(held)


def test_the_front_ends_numbers_are_the_engines(open_engine: OpenEngine) -> None:
    """Over lengths that end before, at and after a block's last slot."""
    engine = open_engine(GQA, 2)
    scheduler = engine.scheduler
    for cliff, late in itertools.product(range(GQA.layers), (False, True)):
        ask = replace(two_images(53, cliff), late=late)
        outputs = answers(engine, ask, LENGTHS)
        latest = {name.rpartition("-")[0]: one for name, one in footprints(engine.llm).items()}
        for length, out in zip(LENGTHS, outputs, strict=True):
            footprint = latest[out.request_id]
            outline = Outline(
                geometry=list(astuple(scheduler.flow_geometry)),
                evicted=[(cliff, footprint.image_tokens)],
                image_tokens=footprint.image_tokens,
                late=late,
                logged_layers=0,
            )
            prompt = len(out.prompt_token_ids)
            assert report_from(outline, prompt, length) == report(out)


def test_a_request_that_is_preempted_with_its_last_token_on_its_way(bare: OpenBare) -> None:
    """An asynchronous scheduler may give its blocks to another one in the step before the token comes: of one of these
    prompts, the answer goes on in a new block just then."""
    tokens, said, ends = prompt(10, 64, 40), [7] * 9, []
    for length in range(12 * BLOCK_SIZE - 16, 12 * BLOCK_SIZE):
        engine = bare(2, 0, asynchronous=True, enable_prefix_caching=False)
        engine.add("grows", [9] * length, None, [7] * 40)
        request = engine.add("ends", tokens, 3, said)
        engine.drain()
        ends.append(request.status is RequestStatus.FINISHED_LENGTH_CAPPED)
        found = engine.scheduler.flow_footprints.latest["ends"]
        if request.num_preemptions and not request.num_computed_tokens:
            break
    else:
        raise AssertionError("of none")
    assert all(ends) and engine.answers["ends"] == said
    computed = len(tokens) + len(said) - 1
    assert found.computed_tokens == computed
    # Two groups with the picture, one without.
    assert found.blocks == tuple(-(-n // BLOCK_SIZE) for n in (computed, computed, computed - 64))


def test_every_end_is_counted_once(open_engine: OpenEngine) -> None:
    engine = open_engine(GQA, 2)
    ask = one_image(54, 1)
    word = piece(engine, ask, 0.2)
    before = counted("cliff=1")
    ends = ({"max_tokens": 5}, {"max_tokens": 40, "stop": [word]}, {"max_tokens": 1})
    reports = [report(answer(engine, ask, **end)) for end in ends]
    grown = {name: value - before[name] for name, value in counted("cliff=1").items()}
    assert grown.pop("vllm_flow:requests_total") == len(ends)
    for name in SAVED:
        assert grown[f"vllm_flow:{name}_total"] == sum(one[name] for one in reports)


@pytest.mark.parametrize(
    ("ask", "label"),
    [
        (one_image(55), "baseline"),
        (one_image(55, GQA.layers), "baseline"),
        (text_only(56, 1), "no-image"),
    ],
)
def test_what_evicts_nothing_is_the_baseline(open_engine: OpenEngine, ask: Ask, label: str) -> None:
    engine = open_engine(GQA, 2)
    word = piece(engine, ask, 0.2)
    before = counted(label)
    stopped = answer(engine, ask, max_tokens=40, stop=[word])
    assert stopped.outputs[0].stop_reason == word and stopped.kv_transfer_params is None
    grown = {name: value - before[name] for name, value in counted(label).items()}
    assert {name: value for name, value in grown.items() if value} == {
        "vllm_flow:requests_total": 1
    }


def test_several_answers_that_stop(open_engine: OpenEngine) -> None:
    engine = open_engine(GQA, 2)
    ask = one_image(57, 2)
    word = piece(engine, ask, 0.2)
    before = counted("cliff=2")
    settings = SamplingParams(
        temperature=1,
        top_k=1,
        n=3,
        stop=[word],
        max_tokens=40,
        ignore_eos=True,
        allowed_token_ids=WORD_IDS,
        extra_args=ask.extra_args,
    )
    [out] = engine.llm.generate(engine.prompt(ask), settings, use_tqdm=False)
    assert [one.stop_reason for one in out.outputs] == [word] * 3
    assert report(out)["cliff"] == 2
    grown = {name: value - before[name] for name, value in counted("cliff=2").items()}
    assert grown["vllm_flow:requests_total"] == 3
    assert grown["vllm_flow:image_tokens_evicted_total"] == 3 * GQA.image_tokens


@pytest.mark.parametrize("cliff", [None, 2])
def test_the_log_of_a_request_that_stops(
    open_engine: OpenEngine, tmp_path: Path, cliff: int | None
) -> None:
    flow = {"group_layers": 2, "attention_log": str(tmp_path)}
    engine = open_engine(GQA, 2, additional_config={"vllm_flow": flow})
    ask = Ask(one_image(58).prompt, (58,), cliff, log=(1, 3))
    word = piece(engine, ask, 0.2)
    stopped = answer(engine, ask, max_tokens=40, stop=[word])
    ended = answer(engine, ask, max_tokens=len(stopped.outputs[0].token_ids))
    assert report(stopped) == report(ended)
    assert report(stopped)["attention_rows"] == 2 * len(stopped.outputs[0].token_ids)


def test_no_outline_reaches_a_client(open_engine: OpenEngine) -> None:
    engine = open_engine(GQA, 2)
    settings = SamplingParams(
        temperature=0, max_tokens=4, ignore_eos=True, extra_args={"flow_cliff": 2}
    )
    engine.llm.llm_engine.add_request("seen", engine.prompt(one_image(59)), settings)
    carried = []
    while engine.llm.llm_engine.has_unfinished_requests():
        carried += [out.kv_transfer_params for out in engine.llm.llm_engine.step()]
    assert len(carried) == 4 and carried[:-1] == [None] * 3
    assert OUTLINE_KEY not in carried[-1][REPORT_KEY]


@pytest.mark.parametrize("allowed", [True, False])
def test_beams_carry_the_operators_policy(open_engine: OpenEngine, allowed: bool) -> None:
    """vLLM makes the beams' requests, several of one parameter object; a client's keys never get there."""
    flow = {
        "group_layers": 2,
        "default_policy": {"flow_cliff": 1},
        "allow_request_policy": allowed,
    }
    engine = open_engine(GQA, 2, additional_config={"vllm_flow": flow})
    before = counted("cliff=1")
    params = BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True)
    [out] = engine.llm.beam_search([engine.prompt(one_image(60))], params)
    assert len(out.sequences) == 2
    grown = {name: value - before[name] for name, value in counted("cliff=1").items()}
    assert grown["vllm_flow:requests_total"] == 1 + 2 + 2
    assert grown["vllm_flow:image_tokens_evicted_total"] == 5 * GQA.image_tokens
