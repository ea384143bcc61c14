"""From a command's arguments to a finished run, in one readable order.

Reads the model's facts and the tasks' items, opens or creates the run, plans what is left, and lets
the driver stream it through the engines. No Ray and no vLLM in here.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from vllm_flow.counts import counted
from vllm_flow.demo_model.naming import DEMO_MODELS
from vllm_flow.eval.statistics.power import forecast
from vllm_flow.eval.sweep import connection, driver, timing
from vllm_flow.eval.sweep.engine_options import EngineOptions
from vllm_flow.eval.sweep.model_facts import ModelError, ModelFacts, read_facts
from vllm_flow.eval.sweep.pictures import background_of
from vllm_flow.eval.sweep.policies import Policy, parse_policies
from vllm_flow.eval.sweep.records import Run, RunError, difference
from vllm_flow.eval.sweep.versions import versions
from vllm_flow.eval.sweep.work import TaskWork, batches_of, plan_work, requests_of, sample
from vllm_flow.eval.tasks import get_task
from vllm_flow.exits import keeping
from vllm_flow.grouping import default_group_layers
from vllm_flow.outputs import check_folder, real

DEMO_CONTEXT = 2048
"""Tokens of the demo models' longest request: ScienceQA's 1024 answer tokens, and a prompt."""
DEMO_POOL = 1 << 28
"""KV-cache pool of an engine with a demo model, bytes; vLLM would take most of the memory."""


def evaluate(args: Namespace) -> int:
    """Run the evaluation that the arguments of `vllm-flow eval` describe; the number of failures.

    Raises:
        RunError, ValueError: (data, tasks, policies, the model) it cannot begin.
        CommandError: nothing can be written, there is no cluster, or it cannot go on.
    """
    check_folder(args.out)
    facts = read_facts(args.model, args.conversation, args.trust_remote_code)
    policies = checked_policies(args.policies, facts, args.model)
    preparation = None if args.image_preparation == "task" else args.image_preparation
    background_of(args.engine_args)  # refused here, not in every engine
    tasks = [
        read_task(
            name, args.data, args.limit, args.seed, preparation, args.image_reading, args.prompts
        )
        for name in args.tasks
    ]
    kept = [name for name in args.tasks if get_task(name).asked_as(args.prompts) is get_task(name)]
    if args.prompts != "llava" and kept:
        print(f"{', '.join(kept)}: no prompts of {args.prompts} for these; asked as ever.")
    for task in tasks:
        if len(policies) > 1:
            told = forecast([item.picture_of for item in task.items], args.tolerance / 100)
            print(f"{task.task}: {told}", flush=True)
    with connection.connected(args.ray_address, args.engines) as pool:
        meta = run_settings(
            args, facts, on_gpu=pool.num_gpus > 0, limit=args.limit, engines=pool.engines
        )
        meta |= {"hardware": connection.hardware(pool), "prompts": args.prompts}
        run = open_run(args.out, meta)
        with (
            run.writing(),
            keeping(lambda: f"the answers so far are in {run.path}, and the same command goes on"),
        ):
            answer_all(args, facts, policies, tasks, pool, run, meta)
            if args.time:
                options = engine_options(args, facts, meta, policies)
                timing.time_policies(run.path, tasks, options, pool, args.time, meta["hardware"])
        return report(run, [task.task for task in tasks], policies)


def run_settings(
    args: Namespace, facts: ModelFacts, *, on_gpu: bool, limit: int | None, engines: int
) -> dict[str, Any]:
    """What `run.json` says of a command that asks engines, `vllm-flow eval` or `vllm-flow cliff`."""
    return {
        "command": ["vllm-flow", *sys.argv[1:]],
        **engine_settings(args, facts, on_gpu),
        "prompt": facts.conversation.prompt("{text}", True),
        "image_preparation": args.image_preparation,
        "image_reading": args.image_reading,
        "data": str(real(args.data)),
        "limit": limit,
        "engines": engines,
        "versions": versions(),
        "tasks": [],
        "policies": [],
    }


def answer_all(
    args: Namespace,
    facts: ModelFacts,
    policies: tuple[Policy, ...],
    tasks: Sequence[TaskWork],
    pool: driver.Pool,
    run: Run,
    meta: Mapping[str, Any],
) -> None:
    """Get every answer that the run lacks; ``meta`` is what this command says of itself."""
    for task in tasks:
        run.write_items(task.task, task.items)
    failed = run.failed() if args.retry_errors else set()
    rows = plan_work(tasks, policies, run.done() - failed)
    session = {"started": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    session |= {name: meta[name] for name in ("command", "engines", "hardware", "versions")}
    run.extend(
        [task.task for task in tasks],
        [policy.as_json() for policy in policies],
        session if rows else None,
    )
    options = engine_options(args, facts, meta, policies)
    total = sum(len(task.items) for task in tasks) * len(policies)
    progress, barren = driver.Progress(), 0
    while True:
        try:
            stream(
                run, batches_of(rows, args.batch), options, pool, total, args.max_errors, progress
            )
            break
        except driver.MachineLost:
            # Errors of this command are not asked again, those that it is to retry are.
            left = plan_work(tasks, policies, run.done() - (failed & run.failed()))
            barren = barren + 1 if requests_of(left) == requests_of(rows) else 0
            if barren > driver.RETRIES:
                raise
            print("A machine of the cluster is gone.", flush=True)
            rows = left
    run.compact()


def checked_policies(spec: str, facts: ModelFacts, model: str) -> tuple[Policy, ...]:
    """The policies, if the model can take them all.

    Raises:
        PolicySpecError: one cannot be read.
        ModelError: the model cannot take one.
    """
    can = facts.no_downsampling is None
    policies = parse_policies(spec, facts.num_layers, facts.full_grid if can else None)
    if not can and "budget=" in spec:
        print(f"Without reduced pictures, since {facts.no_downsampling}.")
    reduced = [policy.name for policy in policies if policy.kind == "downsample"]
    if reduced and facts.no_downsampling is not None:
        raise ModelError(
            f"policy {reduced[0]!r}: {model} cannot take reduced pictures, since "
            f"{facts.no_downsampling}; leave it out."
        )
    return policies


def read_task(
    name: str,
    data: Path,
    limit: int | None,
    seed: int,
    preparation: str | None,
    reading: str = "server",
    prompts: str = "llava",
) -> TaskWork:
    """A task's items under ``data/<task>``; a variant (`textvqa-no-ocr`) shares its task's folder."""
    task = get_task(name).asked_as(prompts)
    own = real(data) / name
    folder = own if os.path.exists(own) else own.with_name(name.partition("-")[0])
    items = sample(task.read(folder), limit, seed, task)
    return TaskWork(name, items, task.max_tokens, preparation or task.image_preparation, reading)


def engine_settings(args: Namespace, facts: ModelFacts, on_gpu: bool) -> dict[str, Any]:
    """What of `run.json` decides how engines compute, with every default made explicit."""
    demo = args.model in DEMO_MODELS
    return {
        "model": args.model,
        "num_layers": facts.num_layers,
        "group_layers": args.group_layers or default_group_layers(facts.num_layers),
        "block_size": args.block_size or (16 if on_gpu else 32),  # vLLM's smallest
        "dtype": args.dtype or ("float32" if demo else facts.dtype),
        "seed": args.seed,
        "max_model_len": args.max_model_len or (DEMO_CONTEXT if demo else None),
        "conversation": facts.conversation.name,
        "trust_remote_code": args.trust_remote_code,
        "engine_args": dict(args.engine_args),
    }


def engine_options(
    args: Namespace, facts: ModelFacts, settings: Mapping[str, Any], policies: tuple[Policy, ...]
) -> EngineOptions:
    """How a command's engines are started; ``settings`` are those of :func:`engine_settings`."""
    return EngineOptions(
        model=args.model,
        dtype=settings["dtype"],
        group_layers=settings["group_layers"],
        block_size=settings["block_size"],
        conversation=settings["conversation"],
        policies=policies,
        full_grid=facts.full_grid,
        seed=args.seed,
        max_model_len=settings["max_model_len"],
        kv_cache_bytes=pool_bytes(args),
        picture_mark=facts.conversation.mark,
        trust_remote_code=args.trust_remote_code,
        engine_args=args.engine_args,
    )


def pool_bytes(args: Namespace) -> int | None:
    """Bytes of each engine's KV-cache pool, None to leave it to vLLM."""
    if args.kv_cache_gib is not None:
        return int(args.kv_cache_gib * 2**30)
    return DEMO_POOL if args.model in DEMO_MODELS else None


def open_run(path: Path, meta: dict[str, Any]) -> Run:
    """The run at `path`, created if it is not there.

    Raises:
        RunError: a run with other settings is there; names what differs.
    """
    if not (path / "run.json").exists():
        return Run.create(path, meta)
    run = Run.open(path)
    found = difference(run.meta, meta)
    if found:
        raise RunError(
            f"{path} was made with other settings: {'; '.join(found)}. Answers of both would be "
            "mixed: use the same settings, or another --out."
        )
    return run


def stream(
    run: Run,
    batches: Sequence[pa.Table],
    options: EngineOptions,
    pool: driver.Pool,
    total: int,
    max_errors: int,
    progress: driver.Progress,
) -> None:
    """Answer what is left, under a bar that shows the rate and the time left; `progress` goes on."""
    left = sum(map(requests_of, batches))
    if not left:
        print(
            f"Nothing left to ask: {run.path} has {counted(total, 'answer', 'answers, all of them')}."
        )
        return
    print(f"{left} of {counted(total, 'answer')} to get; {starting(pool)}.", flush=True)
    with tqdm(total=total, initial=total - left, unit="answer", dynamic_ncols=True) as bar:

        def tell(progress: driver.Progress, batch: pa.Table) -> None:
            if bar.n == bar.initial:
                bar.unpause()  # the engines' start is not part of the rate
            if progress.errors:
                bar.set_postfix(errors=progress.errors, refresh=False)
            bar.update(batch.num_rows)

        limit = None if max_errors < 0 else max_errors
        # Closed at once where a batch cannot be kept, so that Ray ends its work.
        with closing(driver.answers(batches, options, pool)) as answers:
            driver.collect(run, answers, limit, tell, progress)


def starting(pool: driver.Pool) -> str:
    """Which engines start, as a clause; those without room wait for it."""
    now = driver.room(pool)
    if now == pool.engines:
        return f"starting {counted(now, 'engine')}"
    return f"starting {now} of {pool.engines} engines, more when a machine with room for one joins"


def report(run: Run, tasks: Sequence[str], policies: Sequence[Policy]) -> int:
    """Say what the run holds; the number of rows that are errors."""
    asked = pc.field("task").isin(list(tasks)) & pc.field("policy").isin([p.name for p in policies])
    found = driver.Progress()
    found.count(run.answers().filter(asked))
    answers = counted(found.answered - found.errors, "answer")
    print(f"{answers} and {counted(found.errors, 'error')} in {run.path}.")
    if found.errors:
        print(driver.most_frequent(found))
    return found.errors
