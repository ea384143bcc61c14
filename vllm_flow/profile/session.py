"""One run of the profile: checkpoint, two engines, the measurements, tables, JSON and figure."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flow.counts import counted
from vllm_flow.demo_model.naming import resolve_model
from vllm_flow.exits import keeping
from vllm_flow.profile.findings import Results
from vllm_flow.profile.shape import PREFIX, LlavaShape
from vllm_flow.profile.subject import Subject, subject_of

if TYPE_CHECKING:
    from vllm_flow.profile.engines import EngineOptions, System

WIDTH = 280
"""Columns of a file or a pipe: what the widest table has, whose cells would be cut otherwise."""


def profile(args: argparse.Namespace, scratch: Path) -> Results:
    """Do what the command's arguments say; what was found is printed and written.

    Args:
        scratch: an empty folder, where the checkpoint of a shape is written.

    Raises:
        ValueError: arguments that do not fit the model or one another.
    """
    from vllm_flow.profile import engines

    engines.prepare_process()
    from rich.console import Console

    from vllm_flow.profile import rounds, speed_figure, speed_tables
    from vllm_flow.profile.load import Limits

    setup = settle(args, scratch)
    console = Console(width=WIDTH if not sys.stdout.isatty() else None)
    stock, flow = (
        engines.open_engine(setup.options, extension=on, num_layers=setup.subject.shape.layers)
        for on in (False, not args.control)
    )
    work = rounds.workload_of(
        stock, args.text_tokens, args.output_tokens, setup.subject, setup.image_tokens
    )
    limits = Limits(args.ttft_ms, args.tpot_ms)
    bench = rounds.Bench(stock, flow, setup.systems, setup.subject, work, args.text_tokens, limits)
    results = _empty(args, setup, bench)
    written: list[Path] = []
    # Each part is shown and kept as soon as it is there: a run may be cut short.
    with keeping(lambda: f"what was measured is in {written[-1]}" if written else None):
        for part, measured in _measurements(args, setup, bench):
            results = replace(results, **{part: measured})
            for made in speed_tables.tables(results, part):
                console.print(made)
            written.append(results.write(args.out))
    for note in results.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    paths = [results.write(args.out), *speed_figure.draw(results, args.out)]
    console.print(
        "Wrote " + ", ".join(str(path) for path in paths), highlight=False, soft_wrap=True
    )
    return results


@dataclass(frozen=True)
class Setup:
    """What a run's arguments mean for its model, settled before an engine starts."""

    spelled: str | None
    """The shape as the user wrote it, None for a checkpoint."""
    subject: Subject
    options: EngineOptions
    systems: tuple[System, ...]
    peer_cliff: int
    image_tokens: int
    contexts: tuple[int, ...]
    """Image tokens of the decode steps."""
    loads: tuple[tuple[int, int], ...]
    """(requests at once, requests) of each load."""


def settle(args: argparse.Namespace, scratch: Path) -> Setup:
    """Read the arguments beside the model they name; writes the checkpoint of a shape.

    Raises:
        ValueError: see :func:`profile`.
    """
    import torch

    from vllm_flow.grouping import DecoderLayers
    from vllm_flow.profile import engines

    if args.execution == "graphs" and not torch.cuda.is_available():
        raise ValueError("--execution graphs: CUDA graphs need a CUDA device; leave it out.")
    requests = args.requests or tuple(max(4, 2 * level) for level in args.concurrency)
    if len(requests) != len(args.concurrency):
        raise ValueError(
            f"--requests names {counted(len(requests), 'load')}, --concurrency {len(args.concurrency)}."
        )
    spelled = args.shape or (args.model if args.model.startswith(PREFIX) else None)
    model, load_format = _checkpoint(args, spelled, scratch)
    subject = _subject(args, model)
    shape = subject.shape
    systems = (
        engines.control_systems(args.policies, args.parts)
        if args.control
        else engines.parse_systems(args.policies, shape.layers)
    )
    peer = engines.peer_cliff(args.peer_cliff, shape.layers)
    decoder = DecoderLayers(shape.layers)
    groups = args.group_layers or decoder.default_group_layers()
    decoder.groups(groups)  # refuses sizes that vLLM would split
    image_tokens = args.image_tokens or subject.image_tokens
    contexts = args.decode_image_tokens or (image_tokens,)
    longest = max(image_tokens, *(contexts if "decode" in args.parts else ()), 0)
    options = engines.EngineOptions(
        model=model,
        dtype=args.dtype,
        load_format=load_format,
        trust_remote_code=args.trust_remote_code,
        max_model_len=longest + args.text_tokens + args.output_tokens + 64,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        kv_cache_bytes=int(args.kv_cache_gib * 2**30),
        group_layers=groups,
        images=subject.images_of(longest),
        execution=args.execution,
        stock_execution=args.stock_execution,
        prefix_caching=args.prefix_caching,
    )
    return Setup(
        spelled=spelled,
        subject=subject,
        options=options,
        systems=tuple(systems),
        peer_cliff=peer.layers_seen(shape.layers),
        image_tokens=image_tokens,
        contexts=tuple(contexts),
        loads=tuple(zip(args.concurrency, requests, strict=True)),
    )


def _checkpoint(args: argparse.Namespace, spelled: str | None, scratch: Path) -> tuple[str, str]:
    """(model, load format); peers need weights in files, vLLM can make its own up."""
    if spelled is None:
        return resolve_model(args.model), args.load_format
    from vllm_flow.profile.shape import write_folder, write_weights

    llava = LlavaShape.parse(spelled)
    if "peers" in args.parts:
        return str(write_weights(llava, scratch, args.dtype)), "auto"
    return str(write_folder(llava, scratch, args.dtype)), "dummy"


def _subject(args: argparse.Namespace, model: str) -> Subject:
    subject = subject_of(model, args.dtype, args.picture, args.trust_remote_code)
    if "peers" in args.parts and subject.shape.tower is None:
        raise ValueError(f"the peers are written for LLaVA; leave out peers for {model}.")
    return subject


def _measurements(
    args: argparse.Namespace, setup: Setup, bench: Any
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(part, what was found), one after the other."""
    from vllm_flow.profile import rounds, turns, under_load

    if "prefill" in args.parts:
        yield "prefill", rounds.prefill(bench, args.batch, args.rounds)
    if "load" in args.parts:
        yield (
            "load",
            tuple(
                row
                for level, count in setup.loads
                for row in under_load.under_load(bench, level, count, args.rounds)
            ),
        )
    if "capacity" in args.parts:
        yield "capacity", rounds.capacity(bench)
    if "decode" in args.parts:
        yield (
            "decode",
            tuple(
                row
                for tokens in setup.contexts
                for row in turns.decode(
                    bench.with_work(
                        replace(
                            bench.work,
                            image_tokens=tokens,
                            images=setup.subject.images_of(tokens),
                        )
                    ),
                    args.decode_batch,
                    args.rounds,
                )
            ),
        )
    if "peers" in args.parts:
        yield "peers", _peers(args, setup, bench)


def _empty(args: argparse.Namespace, setup: Setup, bench: Any) -> Results:
    """What is known of a run before anything is measured."""
    from vllm_flow.profile import ideal, speed_tables

    work, flops = bench.work, ideal.prefill_flops(bench.shape, bench.work, bench.shape.layers)
    tower = (
        "without the vision tower, whose FLOPs are not counted for this family"
        if bench.shape.tower is None
        else f"{flops.tower / 1e9:.1f} of them the vision tower"
    )
    engine = _engine_facts(bench.stock, setup.options)
    model = args.model if setup.spelled is None else f"{PREFIX}{LlavaShape.parse(setup.spelled)}"
    return Results(
        command=f"vllm-flow {shlex.join(sys.argv[1:])}",
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        model=model,
        shape=asdict(bench.shape),
        workload=asdict(work),
        engine=engine,
        limits=asdict(bench.limits),
        notes=(
            f"One request: {work.text_tokens} text + {work.image_tokens} image tokens, "
            f"{work.output_tokens} out; {flops.total / 1e9:.0f} GFLOP of prefill without a policy, "
            f"{tower}.",
            f"{model}; {engine['dtype']}; vLLM {engine['vllm']}, torch {engine['torch']}, "
            f"{engine['device']}, threads: {engine['threads']}; storage groups of "
            f"{counted(setup.options.group_layers, 'layer')}, blocks of {engine['block_size']} tokens; stock and "
            "extension are two engines of one process, rounds alternate, decode steps eight by eight; medians "
            "[lowest, highest].",
            speed_tables.interval_note(args.rounds),
        ),
    )


def _peers(args: argparse.Namespace, setup: Setup, bench: Any) -> Any:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor
    from transformers.utils.logging import disable_progress_bar

    from vllm_flow.profile import peer_bench

    disable_progress_bar()

    model = setup.options.model
    theirs = LlavaForConditionalGeneration.from_pretrained(
        model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    ).eval()
    return peer_bench.compare(
        bench,
        theirs,
        LlavaProcessor.from_pretrained(model),
        batches=(1, args.batch),
        cliff=setup.peer_cliff,
        rounds=args.rounds,
    )


def _engine_facts(llm: Any, options: EngineOptions) -> dict[str, Any]:
    import platform

    import torch
    import vllm

    return {
        **asdict(options),
        "model": None,  # a folder of this machine says nothing elsewhere
        "block_size": llm.llm_engine.vllm_config.cache_config.block_size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else _processor(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
            return next(names, "CPU")
    except OSError:
        return "CPU"
