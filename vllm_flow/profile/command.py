"""Profile eviction beside stock vLLM: time, throughput, memory, each with its ideal.

Opens a stock engine and one with the extension in this process, gives both the same work in
alternating rounds, and prints what was reached beside what the shapes allow.

    vllm-flow profile --model llava-hf/llava-1.5-7b-hf --concurrency 1,8,32

Of a shape, with random weights; what `make bench` runs; and all parts of a tiny shape, in about a minute:

    vllm-flow profile --shape layers=32,hidden=4096,heads=32,kv_heads=32,mlp=11008
    vllm-flow profile --preset cpu
    vllm-flow profile --preset quick
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from vllm_flow.exits import Refused
from vllm_flow.options import gib, pixels, positive, positive_number, positives
from vllm_flow.outputs import check_folder
from vllm_flow.profile.presets import PARTS, POLICIES, PRESETS
from vllm_flow.profile.shape import PREFIX
from vllm_flow.profile.unread import check_read, check_read_beside, unread
from vllm_flow.remote_code import add_option as add_trust
from vllm_flow.unread_options import parse


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
    what.add_argument("--model", help=f"a model's folder or hub name, demo, or {PREFIX}KEY=N,...")
    what.add_argument(
        "--shape", help="a LLaVA of this shape with random weights: layers=16,hidden=1024,..."
    )
    what.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="several runs, one after the other; other options given beside it replace those of each run",
    )
    add(
        "--parts",
        type=_parts,
        default=("prefill", "load", "capacity"),
        metavar="A,B",
        help=f"what to measure: {', '.join(PARTS)}; default: the first three",
    )
    add(
        "--policies",
        default=POLICIES,
        help="with the extension: as in `vllm-flow eval`, such as fastv or 0:64 uniform, and cliff=L/4, L being "
        "the number of layers; default: %(default)s",
    )
    add(
        "--concurrency",
        type=positives,
        default=(1, 8, 32),
        metavar="A,B",
        help="requests at once under load; default: 1,8,32",
    )
    add(
        "--requests",
        type=positives,
        default=None,
        metavar="A,B",
        help="requests per load, one number per concurrency; default: twice the concurrency, at least 4",
    )
    _add_work(parser)
    add(
        "--rounds",
        type=positive,
        default=3,
        help="counted rounds, after one to warm up; default: 3",
    )
    _add_engine(parser)
    add("--ttft-ms", type=positive_number, help="goodput: a request's TTFT must be within")
    add("--tpot-ms", type=positive_number, help="goodput: and its TPOT within")
    add(
        "--guard",
        action="store_true",
        help="exit with 1 where a figure is below half its ideal, or a count is not as predicted",
    )
    add("--out", type=Path, default=Path("out/profile"), help="default: %(default)s")


def _add_work(parser: argparse.ArgumentParser) -> None:
    """What each request is, and how many run at once."""
    add = parser.add_argument
    add("--text-tokens", type=positive, default=32, metavar="N", help="default: %(default)s")
    add(
        "--image-tokens",
        type=positive,
        default=None,
        metavar="N",
        help="per request, a multiple of the model's tokens per image; default: one image",
    )
    add(
        "--picture",
        type=pixels,
        metavar="WIDTHxHEIGHT",
        help="of the requests' pictures; default: as a tower of one square takes them, else 640x480",
    )
    add("--output-tokens", type=positive, default=16, metavar="N", help="default: %(default)s")
    add(
        "--batch", type=positive, default=8, metavar="N", help="requests of one prefill; default: 8"
    )
    add(
        "--decode-batch",
        type=positive,
        default=1,
        metavar="N",
        help="requests of a decode; default: 1",
    )
    add(
        "--decode-image-tokens",
        type=positives,
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


def _add_engine(parser: argparse.ArgumentParser) -> None:
    """How both engines are started."""
    add = parser.add_argument
    add(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights, so that a model's configuration and processor are enough; default: %(default)s",
    )
    add_trust(parser)
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="default: %(default)s",
    )
    add("--kv-cache-gib", type=gib, default=2.0, help="each engine's pool; default: %(default)s")
    add(
        "--block-size",
        type=positive,
        default=None,
        help="tokens per KV block; default: vLLM's choice",
    )
    add("--group-layers", type=positive, default=None, help="layers per storage group")
    add(
        "--execution",
        choices=("eager", "graphs", "default"),
        default="eager",
        help="of steps: as they come, decodes as CUDA graphs, or as vLLM does without any flag "
        "(compiled; minutes to start on a CPU); default: %(default)s",
    )
    add(
        "--stock-execution",
        choices=("same", "default"),
        default="same",
        help="stock vLLM's: the same, or what it does without any flag; default: %(default)s",
    )
    add(
        "--control",
        action="store_true",
        help="stock vLLM in the extension's place: what the two would differ by if they were the same "
        "(prefill and decode)",
    )
    add(
        "--prefix-caching",
        action="store_true",
        help="as vLLM does without any flag: what is computed is kept to be found, though no request finds any of it",
    )
    add("--max-num-batched-tokens", type=positive, default=8192, metavar="N", help="default: 8192")


def run(args: argparse.Namespace) -> int:
    """Profile; print the tables and write JSON and figures."""
    check_folder(args.out)
    if args.preset:
        return _preset(args)
    check_read(args)
    from vllm_flow.profile import guard, session

    try:
        with tempfile.TemporaryDirectory(prefix="vllm-flow-shape-") as scratch:
            results = session.profile(args, Path(scratch))
    except ValueError as error:
        raise Refused(str(error)) from error
    found = guard.regressions(results) if args.guard else []
    for sentence in found:
        print(f"regression: {sentence}", file=sys.stderr)
    return 1 if found else 0


def _preset(args: argparse.Namespace) -> int:
    """Each run in a process of its own: engines give their memory back only when it ends."""
    beside = _without(args.argv, ("preset", "out"))
    lines = {name: shlex.split(line) for name, line in PRESETS[args.preset]}
    runs = {name: _parsed([*line, *beside]) for name, line in lines.items()}
    check_read_beside(args, list(runs.values()))
    for name, line in lines.items():
        # What only other runs of the preset read would be refused in this one.
        own = [*line, *_without(beside, [n for n in unread(runs[name]) if n in args.given])]
        own += ["--out", str(args.out / name)]
        print(f"\n$ vllm-flow profile {shlex.join(own)}\n", flush=True)
        child = subprocess.Popen([sys.executable, "-m", "vllm_flow.cli", "profile", *own])
        try:
            status = child.wait()
        except KeyboardInterrupt:
            status = ended(child)
        if status:
            return status
    return 0


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a run of a preset."""
    parser = argparse.ArgumentParser(prog="vllm-flow profile")
    add_arguments(parser)
    return parse(parser, words)


def _without(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """A command's words without some options and their values."""
    known = argparse.ArgumentParser(add_help=False)
    add_arguments(known)
    flags = {action.dest for action in known._actions if action.nargs == 0}
    parser = argparse.ArgumentParser(add_help=False)
    for name in names:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, action="store_true" if name in flags else "store")
    return parser.parse_known_args(argv)[1]


def ended(child: subprocess.Popen[bytes], patience: float = 10) -> int:
    """The exit status of a run that Ctrl-C reached as well, and that says what it kept."""
    try:
        return child.wait(patience)
    except subprocess.TimeoutExpired:  # a signal for this process alone
        child.send_signal(signal.SIGINT)
        return child.wait()
