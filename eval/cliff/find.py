"""From the arguments of `vllm-flow cliff` to the profile's entry, in one readable order.

Reads the questions, starts one engine, lets the search ask it, and gathers what was found. The decisions
are in `vllm_flow.eval.cliff.search`.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_flow.cliff_file import FORMAT, check_joins
from vllm_flow.eval.cliff import search
from vllm_flow.eval.cliff.bounds import smallest_tolerance
from vllm_flow.eval.cliff.engine import CliffEngine
from vllm_flow.eval.cliff.evidence import Evidence
from vllm_flow.eval.cliff.ladder import ladder_of
from vllm_flow.eval.cliff.questions import make_plan, read_questions
from vllm_flow.eval.cliff.record import recording
from vllm_flow.eval.cliff.search import Ask, Finding, Plan
from vllm_flow.eval.cliff.unlabelled import attention, check_pictures, unlabelled
from vllm_flow.eval.sweep.engine_actor import EngineActor
from vllm_flow.eval.sweep.engine_args import check_engine_args, workers_of
from vllm_flow.eval.sweep.model_facts import check_ranks, read_facts
from vllm_flow.eval.sweep.settings import check_groups, engine_options, engine_settings
from vllm_flow.eval.sweep.versions import brought, versions
from vllm_flow.eval.sweep.work import TaskWork
from vllm_flow.eval.tasks import Task


def find(
    args: Namespace,
    before: Mapping[str, Any] | None = None,
    begun: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """A profile with one task, as `vllm_flow.cliff_file` describes it.

    Args:
        before: the profile that it is to join; one that it cannot is refused before an engine starts.
        begun: called once answers are kept from which the same command goes on.

    Raises:
        CliffError, ValueError: (of data, tasks, models and profiles) it cannot begin or go on.
    """
    check_engine_args(args.engine_args)  # refused here, not by the engine
    facts = read_facts(args.model, args.conversation, args.trust_remote_code)
    check_groups(args, facts)
    if before is not None:
        check_joins(before, {"model": args.model, "num_layers": facts.num_layers})
    work, task = read_questions(args, facts.conversation.name)
    if args.unlabelled:
        check_pictures(work.items, args.kl_rule)
    ladder = ladder_of(args, facts.num_layers)
    check_ranks(ladder.policies, facts, args.model)
    plan = None if args.unlabelled else make_plan(args, work.items, ladder.top)
    with (
        recording(args, facts, work, ladder.policies, on_gpu(), begun) as record,
        started(args, facts, work) as (engine, folder),
    ):
        engine.record = record
        if len(record):
            print(
                f"Going on from what is in {record.run.path}, answers and measurements: {len(record)}."
            )
        if plan is not None and task is not None:
            entry = labelled(engine, plan, task, args)
        else:
            entry = unlabelled(engine, args)
        if folder is not None and (read := attention(engine, folder, args.mass_share)):
            entry["evidence"]["attention"] = read
        asked = {"conversation": facts.conversation.name, "image_preparation": work.preparation}
        asked |= {"image_reading": work.reading, "seed": args.seed}
        entry["evidence"] |= {**asked, **ladder.about()}
        entry = {**ladder.keys(entry["evidence"]["rung"], facts.num_layers), **entry}
    installed = {name: version for name, version in versions().items() if name != "ray"}
    return {
        "format": FORMAT,
        "model": args.model,
        "architecture": facts.architecture,
        "num_layers": facts.num_layers,
        "tasks": {args.task: entry},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": installed | brought(ladder.policies, [args.task]),
    }


def on_gpu() -> bool:
    """Whether the engine will run on one."""
    import torch

    return torch.cuda.is_available()


@contextmanager
def started(
    args: Namespace, facts: Any, work: TaskWork
) -> Iterator[tuple[CliffEngine, Path | None]]:
    """The engine, and the folder of its attention log if it keeps one; ended on leaving."""
    settings = engine_settings(args, facts, on_gpu())
    ladder = ladder_of(args, facts.num_layers)
    options = engine_options(args, facts, settings, ladder.policies)
    with tempfile.TemporaryDirectory(prefix="vllm-flow-cliff-") as folder:
        # The log sees the heads of one worker only.
        alone = workers_of(args.engine_args) == 1
        wanted = alone and not args.no_attention and not ladder.given
        log = {"attention_log": folder} if wanted else {}
        more = {"max_logprobs": -1} if args.unlabelled else {}
        actor = EngineActor(
            replace(options, engine_args={**more, **args.engine_args}, flow_settings=log)
        )
        try:
            yield CliffEngine(actor, work, options.policies), Path(folder) if log else None
        finally:
            actor.llm.llm_engine.engine_core.shutdown()


def labelled(engine: CliffEngine, plan: Plan, task: Task, args: Namespace) -> dict[str, Any]:
    """Run the search; with --exhaustive also ask everything and say what the full sweep says."""
    evidence = Evidence(task, engine.work.items, plan.num_layers)
    with tqdm(unit=" answers", desc="asking", dynamic_ncols=True) as bar:
        steps = search.search(plan, evidence.loss)
        try:
            while True:
                ask = next(steps)
                bar.set_postfix_str(f"{ask.why} layer {ask.layer}", refresh=False)
                answer(engine, evidence, ask, bar.update)
        except StopIteration as stop:
            finding: Finding = stop.value
        requests = engine.requests
        entry = labelled_entry(plan, evidence, finding, requests)
        if args.exhaustive:
            for layer in range(plan.num_layers):
                bar.set_postfix_str(f"sweep layer {layer}", refresh=False)
                answer(engine, evidence, Ask(layer, 0, plan.items, "complete"), bar.update)
            entry["evidence"]["sweep"] = {
                "flow_cliff": search.exhaustive_answer(plan, evidence.loss),
                "curve": curve(plan, evidence),
            }
    return entry


def answer(engine: CliffEngine, evidence: Evidence, ask: Ask, tell: Any) -> None:
    """Get what an ask still lacks, the baseline's answers included."""
    layers = (evidence.num_layers, ask.layer)
    lacks = {layer: set(evidence.missing(layer, ask.first, ask.last)) for layer in layers}
    wanted = [
        (at, [layer for layer in layers if at in lacks[layer]])
        for at in range(ask.first, ask.last)
        if any(at in lacking for lacking in lacks.values())
    ]
    for item_id, layer, text, error in engine.answers(wanted, tell):
        evidence.add(item_id, layer, text, error)


def labelled_entry(
    plan: Plan, evidence: Evidence, finding: Finding, requests: int
) -> dict[str, Any]:
    """The profile's entry of a finished search."""
    test = finding.evidence
    found = None if test is None else asdict(test.loss)
    return {
        "evidence": {
            "method": "labelled",
            "rung": finding.layer,
            "metric": evidence.task.headline,
            "items": plan.items - len(evidence.left_out),
            "pictures": evidence.pictures(),
            "items_left_out": len(evidence.left_out),
            "explored": plan.explored,
            "tolerance": plan.tolerance,
            "confidence": plan.confidence,
            "smallest_tolerance": smallest_tolerance(
                evidence.pictures(plan.explored), plan.confidence
            ),
            "baseline": evidence.score(plan.num_layers),
            "loss": None if found is None else found["value"],
            "interval": None if found is None else [found["low"], found["high"]],
            "proposed": finding.proposed,
            "tests": [
                {"layer": one.layer, "passed": one.passed, **asdict(one.loss)}
                for one in finding.tests
            ],
            "curve": curve(plan, evidence),
            "requests": requests,
            "requests_of_a_sweep": search.exhaustive_requests(plan),
        },
    }


def curve(plan: Plan, evidence: Evidence) -> list[dict[str, Any]]:
    """Per layer that was asked: score and loss on all its questions, with their number."""
    return [
        {
            "layer": layer,
            "score": evidence.score(layer),
            **asdict(evidence.all_asked(layer, plan.confidence)),
        }
        for layer in evidence.layers
        if layer < plan.num_layers
    ]
