"""What a sweep costs, as ratios within one run: its policies, and Ray.

    python -m vllm_flow.eval.sweep.bench_driver                  # the small demo model, about 6 minutes

1. Ray: the same batches through the driver and through a plain loop over an engine in this
   process, for the first two policies. Both write every batch. Timed from the first batch's arrival
   to the last one's, so that starting engines, which both must, is left out; it is told apart.
2. Policies: every item under every policy, side by side in one engine, against as many requests to
   stock vLLM (this package's extension off) for the same items: side by side as well, and pass by
   pass as separate runs would send them.

3. Overlap: long-tailed requests (a caption of 96 tokens among seven answers of 2) in batches, answered side by side in
   one engine as a sweep does, and one batch after the other; against all of them enqueued at once.

Every item has a picture of its own, new to the engine in every round. One thread per engine.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from vllm_flow.counts import counted
from vllm_flow.eval.sweep import connection, driver
from vllm_flow.eval.sweep.engine_actor import EngineActor
from vllm_flow.eval.sweep.engine_options import EngineOptions
from vllm_flow.eval.sweep.model_facts import ModelFacts, read_facts
from vllm_flow.eval.sweep.policies import BASELINE, Policy, PolicySpecError, parse_policies
from vllm_flow.eval.sweep.records import Run
from vllm_flow.eval.sweep.settings import DEMO_POOL
from vllm_flow.eval.sweep.work import IN_FLIGHT, TaskWork, batches_of, plan_work
from vllm_flow.eval.tasks import Item
from vllm_flow.exits import Refused, run_module
from vllm_flow.options import positive


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_flow.eval.sweep.bench_driver",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="demo-small")
    parser.add_argument("--policies", help="default: the baseline and three cliffs, spread")
    parser.add_argument(
        "--items", type=positive, default=1000, help="items of the comparison with Ray"
    )
    parser.add_argument("--sweep-items", type=positive, default=192, help="items of the other one")
    parser.add_argument("--batch", type=positive, default=32, help="items of a batch")
    parser.add_argument("--rounds", type=positive, default=3, help="of each comparison")
    parser.add_argument("--part", choices=("ray", "policies", "overlap"), help="one of them alone")
    args = parser.parse_args(argv)
    if args.part in (None, "ray") and args.items <= args.batch:
        raise Refused("--items: more than one --batch, since the time of a batch is what is told")
    # Ray would give its engine a share of the cores, the loop's engine would take all of them.
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        facts = read_facts(args.model)
    except ValueError as error:
        raise Refused(str(error)) from error
    layers = facts.num_layers
    spread = sorted({layers // 4, layers // 2, 3 * layers // 4})
    spec = args.policies or ",".join(["baseline", *(f"cliff={cliff}" for cliff in spread)])
    try:
        policies = parse_policies(spec, layers)
    except PolicySpecError as error:
        raise Refused(f"--policies: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.model, facts, policies, args.batch, Path(folder))
        if args.part in (None, "ray"):
            bench.ray_against_loop(args.items, args.rounds)
        if args.part in (None, "policies"):
            bench.policies_against_stock(args.sweep_items, args.rounds)
        if args.part in (None, "overlap"):
            bench.overlap(args.sweep_items, args.rounds)


CAPTION, WORD = 96, 2
"""Tokens of a long and of a short answer."""


class Bench:
    """Engines, pictures and batches of the measurements."""

    def __init__(
        self,
        model: str,
        facts: ModelFacts,
        policies: Sequence[Policy],
        batch: int,
        folder: Path,
    ) -> None:
        self.policies, self.batch, self.folder = policies, batch, folder
        self.num_layers = facts.num_layers
        self.options = EngineOptions(
            model=model,
            dtype="float32",
            group_layers=None,
            block_size=32,
            conversation=facts.conversation.name,
            picture_mark=facts.conversation.mark,
            policies=tuple(policies),
            full_grid=facts.full_grid,
            max_model_len=512,
            kv_cache_bytes=DEMO_POOL,
        )
        print(
            f"model {model}, {counted(facts.num_layers, 'layer')}; policies: {', '.join(self.names)}"
        )
        # Kept to the end, both of them: vLLM's engines of a process share their process groups.
        self.stock: EngineActor | None = None
        self.engine = EngineActor(self.options)
        self.pictures = 0

    @property
    def names(self) -> list[str]:
        return [policy.name for policy in self.policies]

    def items(self, count: int) -> list[Item]:
        """Held-out questions over and over, each time with a picture of another name."""
        from vllm_flow.demo_model.heldout import ANSWER_SUFFIX, load_questions

        questions = load_questions("seen")
        items = []
        for number in range(count):
            question = questions[number % len(questions)]
            self.pictures += 1
            picture = self.folder / f"{self.pictures}{question.image_path.suffix}"
            picture.symlink_to(question.image_path)
            items.append(Item(str(number), question.text + ANSWER_SUFFIX, str(picture), {}))
        return items

    def work(self, count: int, policies: Sequence[Policy] | None = None) -> list[pa.Table]:
        """Batches of new items; the policies of an item may be one policy several times."""
        task = TaskWork("bench", self.items(count), 4, "pad")
        rows = plan_work([task], policies or self.policies, set())
        return batches_of(rows, self.batch)

    def ray_against_loop(self, count: int, rounds: int) -> None:
        """Print what Ray adds to a loop over the same batches."""
        began = time.perf_counter()
        pool = connection.connect(None, 1)
        start = time.perf_counter() - began
        loop, through, firsts, two = [], [], [], self.policies[:2]
        for _ in range(rounds):
            # An engine in this process is idle while Ray's computes.
            loop.append(self.arrivals(map(self.engine, self.work(count, two)))[1])
            first, seconds = self.arrivals(
                driver.answers(self.work(count, two), self.options, pool)
            )
            through.append(seconds)
            firsts.append(first)
        batches = -(-count // self.batch)
        added = (statistics.median(through) - statistics.median(loop)) / (batches - 1)
        print(
            f"\n1. {counted(count, 'item')} x {len(two)} policies in {counted(batches, 'batch', 'batches')}, "
            f"{counted(rounds, 'round')}\n"
            f"   through Ray, of the time of a plain loop  {ratio(through, loop)}\n"
            f"   loop {spread_of(loop)} s, Ray {spread_of(through)} s: {1000 * added:+.1f} ms a batch\n"
            f"   once: Ray starts in {start:.1f} s; first batch after {spread_of(firsts)} s, the "
            "engine's start included"
        )

    def policies_against_stock(self, count: int, rounds: int) -> None:
        """Print what the sweep takes of the time of as many stock requests."""
        stock = self.stock = EngineActor(self.options, extension=False)
        baseline = [BASELINE] * len(self.policies)

        def passes() -> Iterator[pa.Table]:
            # A separate run would have to read and encode every picture anew.
            for _ in self.policies:
                yield from map(stock, self.work(count, [BASELINE]))

        ways: dict[str, Callable[[], Iterable[pa.Table]]] = {
            "sweep": lambda: map(self.engine, self.work(count)),
            "baselines": lambda: map(self.engine, self.work(count, baseline)),
            "stock": lambda: map(stock, self.work(count, baseline)),
            "passes": passes,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        rows: dict[str, list[dict]] = {}
        shuffler, order = random.Random(0), list(ways)
        for number in range(rounds + 1):  # the first warms up
            shuffler.shuffle(order)
            for name in order:
                began = time.perf_counter()
                rows[name] = [row for table in ways[name]() for row in table.to_pylist()]
                if number:
                    times[name].append(time.perf_counter() - began)
        for found in rows.values():
            assert len(found) == count * len(self.policies), "requests are missing"
            assert not any(row["error"] for row in found), found
        computed = [
            r["prompt_tokens"] * self.num_layers - r["prefill_rows_saved"] for r in rows["sweep"]
        ]
        ideal = sum(computed) / sum(r["prompt_tokens"] * self.num_layers for r in rows["sweep"])
        print(
            f"\n2. {counted(count, 'item')} x {counted(len(self.policies), 'policy', 'policies')} = "
            f"{counted(count * len(self.policies), 'request')}, {counted(rounds, 'round')}\n"
            f"   the sweep takes, of the time of as many requests\n"
            f"   to stock vLLM, an item's side by side     {ratio(times['sweep'], times['stock'])}\n"
            f"   to stock vLLM, pass by pass               {ratio(times['sweep'], times['passes'])}\n"
            f"   to its own engine, all of them baselines  {ratio(times['sweep'], times['baselines'])}\n"
            f"   ideal for the decoder's prefill alone     {ideal:.3f} (rows x layers)\n"
            f"   one sweep: {statistics.median(times['sweep']):.1f} s; the extension on, baselines "
            f"only, against stock: {ratio(times['baselines'], times['stock'])}"
        )

    def overlap(self, count: int, rounds: int) -> None:
        """Print the throughput of batches side by side, and one after the other, against all requests at once."""
        lengths = [CAPTION if number % 8 == 0 else WORD for number in range(count)]

        def batches(size: int) -> list[pa.Table]:
            items = zip(self.items(count), lengths, strict=True)
            tasks = [TaskWork("bench", [item], length, "pad") for item, length in items]
            return batches_of(plan_work(tasks, [BASELINE], set()), size, size)

        def side_by_side() -> list[int]:
            with ThreadPoolExecutor(IN_FLIGHT) as threads:
                tables = list(threads.map(self.engine, batches(self.batch)))
            return [length for table in tables for length in table["output_tokens"].to_pylist()]

        ways: dict[str, Callable[[], list[int]]] = {
            "at once": lambda: self.enqueued(batches(count)),
            "side by side": side_by_side,
            "one by one": lambda: self.enqueued(batches(self.batch)),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        # Answers of exactly these lengths, so that every way computes the same.
        self.engine.sampling = {"ignore_eos": True}
        for number in range(rounds + 1):  # the first warms up
            for name in random.Random(number).sample(list(ways), len(ways)):
                began = time.perf_counter()
                got = ways[name]()
                if number:
                    times[name].append(time.perf_counter() - began)
                assert sorted(got) == sorted(lengths), "the lengths are not those asked for"
        self.engine.sampling = {}
        print(
            f"\n3. {counted(count, 'request')}, {lengths.count(CAPTION)} of {CAPTION} tokens, the others of {WORD}, in "
            f"batches of {self.batch}, {counted(rounds, 'round')}\n"
            f"   throughput, of that of all of them enqueued at once in one engine\n"
            f"   batches side by side, as sweeps run      "
            f"{ratio(times['at once'], times['side by side'])}\n"
            f"   one batch after the other                "
            f"{ratio(times['at once'], times['one by one'])}\n"
            f"   all at once: {spread_of(times['at once'])} s"
        )

    def enqueued(self, batches: Iterable[pa.Table]) -> list[int]:
        """Lengths of the answers to batch after batch, each enqueued whole before the engine's first step."""
        lengths = []
        for batch in batches:
            asks, _ = self.engine._asks(batch.to_pylist())
            for ask in asks:
                self.engine.enqueue(
                    ask, {}, max_tokens=ask.item["max_tokens"], **self.engine.sampling
                )
            outputs = self.engine.llm.wait_for_completion(use_tqdm=False)
            lengths += [len(output.outputs[0].token_ids) for output in outputs]
        return lengths

    def arrivals(self, tables: Iterable[pa.Table]) -> tuple[float, float]:
        """Seconds to the first batch, and from it to the last; every batch is written to a run."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            began = time.perf_counter()
            times: list[float] = []
            run = Run.create(Path(folder) / "run", {})
            driver.collect(
                run, tables, 0, lambda progress, batch: times.append(time.perf_counter())
            )
        return times[0] - began, times[-1] - times[0]


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    """Median of the rounds' ratios, with their range."""
    ratios = [top / bottom for top, bottom in zip(numerators, denominators, strict=True)]
    return f"{statistics.median(ratios):.3f}  [{min(ratios):.3f}, {max(ratios):.3f}]"


def spread_of(seconds: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):.1f} [{min(seconds):.1f}, {max(seconds):.1f}]"


if __name__ == "__main__":
    run_module("vllm_flow.eval.sweep.bench_driver", main)
