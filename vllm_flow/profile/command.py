"""Profile eviction beside stock vLLM: time, throughput, memory, each with its ideal.

Opens a stock engine and one with the extension in this process, gives both the same work in
alternating rounds, and prints what was reached beside what the shapes allow.

  vllm-flow profile --model llava-hf/llava-1.5-7b-hf --concurrency 1,8,32
  vllm-flow profile --shape layers=32,hidden=4096,heads=32,kv_heads=32,mlp=11008   (random weights)
  vllm-flow profile --preset cpu                                                  (what `make bench` runs)
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vllm_flow.profile.shape import PREFIX, LlavaShape

PARTS = ("prefill", "load", "capacity", "decode", "peers")
TINY_LLAMA = "layers=22,hidden=2048,heads=32,kv_heads=4,mlp=5632"

PRESETS: dict[str, tuple[tuple[str, str], ...]] = {
    "cpu": (
        (
            "llava-16",
            "--shape layers=16,hidden=1024,heads=16,kv_heads=16,mlp=2816 --parts prefill,load,capacity "
            "--rounds 2 --requests 4,16,32 --block-size 32 --kv-cache-gib 1.25 --ttft-ms 10000 --tpot-ms 500",
        ),
        (
            "decode",
            "--shape layers=16,hidden=1024,heads=16,kv_heads=16,mlp=2816 --parts decode "
            "--decode-image-tokens 576,2880 --decode-batch 4 --rounds 2 --output-tokens 24 "
            "--block-size 32 --kv-cache-gib 1",
        ),
        (
            "tinyllama-22",
            f"--shape {TINY_LLAMA} --parts prefill --batch 2 --rounds 2 --group-layers 2 "
            "--block-size 32 --kv-cache-gib 0.25",
        ),
        (
            "peers",
            "--shape layers=16,hidden=1024,heads=16,kv_heads=16,mlp=2816 --parts peers --rounds 1 "
            "--dtype float32 --block-size 32 --kv-cache-gib 1",
        ),
    ),
    "quick": (
        (
            "quick",
            "--shape layers=8,hidden=256,heads=4,kv_heads=4,mlp=704,image_tokens=144,vocab=2000 "
            f"--parts {','.join(PARTS)} --concurrency 1,4 --requests 2,8 --rounds 2 --batch 4 "
            "--decode-image-tokens 144,720 --kv-cache-gib 0.05",
        ),
    ),
}


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers such as 1,8,32") from None
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers must be at least 1")
    return found


def _parts(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    strange = [part for part in found if part not in PARTS]
    if strange:
        raise argparse.ArgumentTypeError(f"{strange[0]!r}: choose from {', '.join(PARTS)}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help=f"a model's folder or hub name, or {PREFIX}KEY=N,...")
    what.add_argument(
        "--shape", help="a LLaVA of this shape with random weights: layers=16,hidden=1024,..."
    )
    what.add_argument("--preset", choices=sorted(PRESETS), help="several runs, one after the other")
    add(
        "--parts",
        type=_parts,
        default=("prefill", "load", "capacity"),
        metavar="A,B",
        help=f"what to measure: {', '.join(PARTS)}; default: %(default)s",
    )
    add(
        "--policies",
        default="baseline,cliff=2,cliff=L/4,cliff=L/2",
        help="with the extension; L is the number of layers; default: %(default)s",
    )
    add(
        "--concurrency",
        type=_numbers,
        default=(1, 8, 32),
        metavar="A,B",
        help="requests at once under load; default: 1,8,32",
    )
    add(
        "--requests",
        type=_numbers,
        default=None,
        metavar="A,B",
        help="requests per load, one number per concurrency; default: twice the concurrency, at least 4",
    )
    add("--text-tokens", type=int, default=32, metavar="N", help="default: %(default)s")
    add(
        "--image-tokens",
        type=int,
        default=None,
        metavar="N",
        help="per request, a multiple of the model's tokens per image; default: one image",
    )
    add("--output-tokens", type=int, default=16, metavar="N", help="default: %(default)s")
    add("--batch", type=int, default=8, metavar="N", help="requests of one prefill; default: 8")
    add("--decode-batch", type=int, default=1, metavar="N", help="requests of a decode; default: 1")
    add(
        "--decode-image-tokens",
        type=_numbers,
        default=None,
        metavar="A,B",
        help="contexts of the decode steps; default: those of --image-tokens",
    )
    add(
        "--peer-cliff",
        default="cliff=L/4",
        metavar="CLIFF",
        help="the cliff of mask, VTW and ours among the peers; default: %(default)s",
    )
    add("--rounds", type=int, default=3, help="counted rounds, after one to warm up; default: 3")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="default: %(default)s",
    )
    add("--kv-cache-gib", type=float, default=2.0, help="each engine's pool; default: %(default)s")
    add("--block-size", type=int, default=None, help="tokens per KV block; default: vLLM's choice")
    add("--group-layers", type=int, default=None, help="layers per storage group")
    add("--max-num-batched-tokens", type=int, default=8192, metavar="N", help="default: 8192")
    add("--ttft-ms", type=float, default=None, help="goodput: a request's TTFT must be within")
    add("--tpot-ms", type=float, default=None, help="goodput: and its TPOT within")
    add("--out", type=Path, default=Path("out/profile"), help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Profile; print the tables and write JSON and figures."""
    if args.preset:
        return _preset(args)
    try:
        with tempfile.TemporaryDirectory(prefix="vllm-flow-shape-") as scratch:
            _profile(args, Path(scratch))
    except ValueError as error:
        print(f"vllm-flow profile: {error}", file=sys.stderr)
        return 2
    return 0


def _preset(args: argparse.Namespace) -> int:
    """Each run in a process of its own: engines give their memory back only when it ends."""
    for name, line in PRESETS[args.preset]:
        own = [*shlex.split(line), "--out", str(args.out / name)]
        print(f"\n$ vllm-flow profile {shlex.join(own)}\n", flush=True)
        status = subprocess.run([sys.executable, "-m", "vllm_flow.cli", "profile", *own]).returncode
        if status:
            return status
    return 0


def _profile(args: argparse.Namespace, scratch: Path) -> None:
    from vllm_flow.profile import engines

    engines.prepare_process()
    from rich.console import Console
    from transformers import AutoConfig

    from vllm_flow.plan import default_group_layers, storage_groups
    from vllm_flow.profile import figure, ideal, measure, table
    from vllm_flow.profile.load import Limits
    from vllm_flow.profile.records import Results
    from vllm_flow.profile.shape import shape_of, write_folder, write_weights

    requests = args.requests or tuple(max(4, 2 * level) for level in args.concurrency)
    if len(requests) != len(args.concurrency):
        raise ValueError(
            f"--requests names {len(requests)} loads, --concurrency {len(args.concurrency)}."
        )
    spelled = args.shape or (args.model if args.model.startswith(PREFIX) else None)
    model, load_format = args.model, "auto"
    if spelled is not None:
        llava = LlavaShape.parse(spelled)
        if "peers" in args.parts:
            model = str(write_weights(llava, scratch, args.dtype))
        else:
            model, load_format = str(write_folder(llava, scratch, args.dtype)), "dummy"
    config = AutoConfig.from_pretrained(model)
    shape = shape_of(config, args.dtype)
    if shape.tower is None:
        raise ValueError(f"{model} has no vision tower; profile a vision-language model.")
    systems = engines.parse_systems(args.policies, shape.layers)
    (peer,) = engines.parse_systems(args.peer_cliff, shape.layers)[1:]
    groups = args.group_layers or default_group_layers(shape.layers)
    storage_groups(shape.layers, groups)  # refuses a size that does not divide

    def images_of(tokens: int) -> int:
        if tokens % shape.tower.patches:
            raise ValueError(
                f"{tokens} image tokens: one image has {shape.tower.patches}; use a multiple."
            )
        return tokens // shape.tower.patches

    image_tokens = args.image_tokens or shape.tower.patches
    contexts = args.decode_image_tokens or (image_tokens,)
    longest = max(image_tokens, *(contexts if "decode" in args.parts else ()), 0)
    options = engines.EngineOptions(
        model=model,
        dtype=args.dtype,
        load_format=load_format,
        max_model_len=longest + args.text_tokens + args.output_tokens + 64,
        max_num_batched_tokens=args.max_num_batched_tokens,
        block_size=args.block_size,
        kv_cache_bytes=int(args.kv_cache_gib * 2**30),
        group_layers=groups,
        images=images_of(longest),
    )
    console = Console(width=200 if not sys.stdout.isatty() else None)
    stock, flow = (
        engines.open_engine(options, extension=on, num_layers=shape.layers) for on in (False, True)
    )
    work = measure.workload_of(stock, args.text_tokens, args.output_tokens, images_of(image_tokens))
    limits = Limits(args.ttft_ms, args.tpot_ms)
    bench = measure.Bench(stock, flow, systems, shape, work, limits)
    found: dict[str, Any] = {}
    if "prefill" in args.parts:
        found["prefill"] = measure.prefill(bench, args.batch, args.rounds)
    if "load" in args.parts:
        found["load"] = tuple(
            row
            for level, count in zip(args.concurrency, requests, strict=True)
            for row in measure.under_load(bench, level, count, args.rounds)
        )
    if "capacity" in args.parts:
        found["capacity"] = measure.capacity(bench)
    if "decode" in args.parts:
        found["decode"] = tuple(
            row
            for tokens in contexts
            for row in measure.decode(
                bench.with_work(replace(work, image_tokens=tokens, images=images_of(tokens))),
                args.decode_batch,
                args.rounds,
            )
        )
    if "peers" in args.parts:
        found["peers"] = _peers(bench, model, args, peer.layers_seen(shape.layers))
    flops = ideal.prefill_flops(shape, work, shape.layers)
    results = Results(
        command=f"vllm-flow {shlex.join(sys.argv[1:])}",
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        model=f"{PREFIX}{LlavaShape.parse(spelled)}" if spelled is not None else args.model,
        shape=asdict(shape),
        workload=asdict(work),
        engine=_engine_facts(stock, options, groups),
        limits=asdict(limits),
        notes=(
            f"One request: {work.text_tokens} text + {work.image_tokens} image tokens, "
            f"{work.output_tokens} out; {flops.total / 1e9:.0f} GFLOP of prefill without a policy, "
            f"{flops.tower / 1e9:.1f} of them the vision tower.",
        ),
        **found,
    )
    results = replace(results, notes=(*results.notes, _describe(results)))
    table.show(results, console)
    paths = [results.write(args.out), *figure.draw(results, args.out)]
    console.print("Wrote " + ", ".join(str(path) for path in paths), highlight=False)


def _peers(bench: Any, model: str, args: argparse.Namespace, cliff: int) -> Any:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor
    from transformers.utils.logging import disable_progress_bar

    from vllm_flow.profile import peer_bench

    disable_progress_bar()

    theirs = LlavaForConditionalGeneration.from_pretrained(
        model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    ).eval()
    return peer_bench.compare(
        bench,
        theirs,
        LlavaProcessor.from_pretrained(model),
        batches=(1, args.batch),
        cliff=cliff,
        rounds=args.rounds,
    )


def _engine_facts(llm: Any, options: Any, groups: int) -> dict[str, Any]:
    import platform

    import torch
    import vllm

    return {
        **asdict(options),
        "model": None,  # a folder of this machine says nothing elsewhere
        "group_layers": groups,
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


def _describe(results: Any) -> str:
    engine = results.engine
    return (
        f"{results.model}; {engine['dtype']}; vLLM {engine['vllm']}, torch {engine['torch']}, "
        f"{engine['device']}, {engine['threads']} threads; storage groups of {engine['group_layers']} "
        f"layers, blocks of {engine['block_size']} tokens; stock and extension are two engines of "
        "one process, rounds alternate; medians [lowest, highest]."
    )
