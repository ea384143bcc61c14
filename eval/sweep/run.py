"""From a command's arguments to a finished run, in one readable order.

Reads the model's facts and the tasks' items, opens or creates the run, plans what is left, and lets
the driver stream it through the engines. No Ray and no vLLM in here.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from vllm_flow.counts import counted
from vllm_flow.eval.statistics.power import forecast
from vllm_flow.eval.sweep import connection, driver, timing
from vllm_flow.eval.sweep.engine_args import check_engine_args, workers_of
from vllm_flow.eval.sweep.engine_options import EngineOptions
from vllm_flow.eval.sweep.model_facts import ModelError, ModelFacts, check_ranks, read_facts
from vllm_flow.eval.sweep.pictures import preparation
from vllm_flow.eval.sweep.policies import Policy, parse_policies
from vllm_flow.eval.sweep.records import Run
from vllm_flow.eval.sweep.resuming import opened_run
from vllm_flow.eval.sweep.settings import check_groups, engine_options, run_settings
from vllm_flow.eval.sweep.unread import check_read, check_said_once, compared, names_together
from vllm_flow.eval.sweep.work import TaskWork, batches_of, plan_work, requests_of, sample
from vllm_flow.eval.tasks import get_task
from vllm_flow.exits import keeping
from vllm_flow.outputs import check_folder, real


def evaluate(args: Namespace) -> int:
    """Run the evaluation that the arguments of `vllm-flow eval` describe; the number of failures.

    Raises:
        RunError, ValueError: (data, tasks, policies, the model) it cannot begin.
        CommandError: nothing can be written, there is no cluster, or it cannot go on.
    """
    check_said_once(args)
    check_folder(args.out)
    check_engine_args(args.engine_args)
    facts = read_facts(args.model, args.conversation, args.trust_remote_code)
    check_groups(args, facts)
    policies = checked_policies(args.policies, facts, args.model)
    before = Run.open(args.out).meta if (args.out / "run.json").exists() else None
    check_read(args, [policy.name for policy in policies], before)
    together = names_together([policy.name for policy in policies], before)
    tasks = [read_task(name, args, facts.conversation.name, args.limit) for name in args.tasks]
    kept = [name for name in args.tasks if get_task(name).asked_as(args.prompts) is get_task(name)]
    if args.prompts != "llava" and kept:
        print(f"{', '.join(kept)}: no prompts of {args.prompts} for these; asked as ever.")
    for task in tasks:
        if compared(together):
            told = forecast([item.picture_of for item in task.items], args.tolerance)
            print(f"{task.task}: {told}", flush=True)
    workers = workers_of(args.engine_args)
    with connection.connected(args.ray_address, args.engines, workers) as pool:
        gpus = pool.num_gpus > 0
        meta = run_settings(
            args, facts, tasks, policies, on_gpu=gpus, limit=args.limit, engines=pool.engines
        )
        meta |= {"hardware": connection.hardware(pool), "prompts": args.prompts}
        meta["tolerance"] = args.tolerance
        with (
            opened_run(args.out, meta, tasks, growing=True) as run,
            keeping(lambda: _kept(run)),
        ):
            answer_all(args, facts, policies, tasks, pool, run, meta)
            if args.time:
                options = engine_options(args, facts, meta, policies)
                timing.time_policies(run.path, tasks, options, pool, args.time, meta["hardware"])
        return report(run, [task.task for task in tasks], policies)


def _kept(run: Run) -> str | None:
    """What an end in between leaves behind; None where that is nothing."""
    if not run.done():
        return None
    return f"the answers so far are in {run.path}, and the same command goes on"


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
    check_ranks(policies, facts, model)
    return policies


def read_task(name: str, args: Namespace, conversation: str, limit: int | None) -> TaskWork:
    """A task's items under ``DATA/<task>``; a variant (`textvqa-no-ocr`) shares its task's folder.

    Args:
        args: of `vllm-flow eval` or `vllm-flow cliff`: data, seed, prompts, and what is done to pictures.
        conversation: the name of the model's.
    """
    task = get_task(name).asked_as(args.prompts)
    own = real(args.data) / name
    folder = own if os.path.exists(own) else own.with_name(name.partition("-")[0])
    items = sample(task.read(folder), limit, args.seed, task)
    prepared = preparation(args.image_preparation, task.image_preparation, conversation)
    return TaskWork(name, items, task.max_tokens, prepared, args.image_reading)


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
