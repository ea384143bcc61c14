"""What the attention log costs per decode step: ``python -m vllm_flow.profile.attention_cost``.

Two engines in one process, one without a log directory and one with. Rounds are interleaved: in each,
every mode decodes the same batch of requests, and its steps are timed one by one. A round's figure is
the median over its steps; printed are the median over rounds, and the median over rounds of the ratio
to the engine without a log in the same round, so that a machine's moods cancel.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_flow.counts import counted
from vllm_flow.engine.settings import KERNELS
from vllm_flow.exits import Refused, run_module
from vllm_flow.model_names import why_unread
from vllm_flow.options import count, positive

if TYPE_CHECKING:
    from vllm import LLM

DTYPES = ("float32", "bfloat16", "float16")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FILLER = "The picture was taken on a quiet day and nobody remembers who was there. "


@dataclass
class Mode:
    """One way to serve the batch, and how long its decode steps took."""

    name: str
    llm: LLM
    keys: dict[str, Any] | None
    seconds: list[float] = field(default_factory=list)
    """A decode step's median, per round."""
    writing: list[float] = field(default_factory=list)
    """What the writer's thread took afterwards, per decode step, per round."""


def answer_tokens(text: str) -> int:
    """For argparse: the first step is the prefill, the second warms up, and what is left is timed."""
    tokens = count(text)
    if tokens < 3:
        raise argparse.ArgumentTypeError(f"{tokens}: at least 3, of which the last is timed")
    return tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_flow.profile.attention_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="demo", help="folder of a LLaVA, or demo (default)")
    parser.add_argument("--batch", type=positive, default=4, help="requests that decode together")
    parser.add_argument(
        "--tokens", type=answer_tokens, default=12, help="answer tokens per request"
    )
    parser.add_argument(
        "--rounds", type=positive, default=20, help="rounds that are timed (default: 20)"
    )
    parser.add_argument("--filler", type=count, default=12, help="sentences before the question")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--swap",
        action="store_true",
        help="build the logging engine first: tells its cost from that of being built second",
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: time of all of the process's threads, for a CPU that others use as well",
    )
    parser.add_argument(
        "--kernel",
        choices=KERNELS,
        default="auto",
        help="attention_log_kernel of the logging engine: on CUDA compare triton with torch",
    )
    arguments = parser.parse_args(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with tempfile.TemporaryDirectory(prefix="vllm-flow-") as directory:
        measure(arguments, directory)


def measure(arguments: argparse.Namespace, directory: str) -> None:
    """Run all modes and print what they took."""
    from vllm_flow.demo_model.naming import resolve_model
    from vllm_flow.models import read_config

    try:
        model = resolve_model(arguments.model)
        read_config(model)
    # Transformers reads foreign files and raises what it likes.
    except Exception as error:
        raise Refused(f"--model {arguments.model}: {why_unread(arguments.model, error)}") from error
    logs = {"attention_log": directory, "attention_log_kernel": arguments.kernel}
    flows: list[dict[str, Any]] = [{}, logs]
    if arguments.swap:
        flows.reverse()
    engines = {bool(flow): _engine(model, arguments.dtype, flow) for flow in flows}
    plain, logging = engines[False], engines[True]
    layers = plain.llm_engine.vllm_config.model_config.get_total_num_hidden_layers()
    chosen = sorted({0, layers // 2, layers - 1})
    modes = [
        Mode("no log directory", plain, None),
        Mode("log directory, no request logs", logging, None),
        Mode(
            f"every request logs {counted(len(chosen), 'layer')}",
            logging,
            {"flow_log_attention": chosen},
        ),
        Mode(f"every request logs all {layers} layers", logging, {"flow_log_attention": True}),
        Mode(
            f"all {layers} layers and the heat",
            logging,
            {"flow_log_attention": True, "flow_log_attention_heat": True},
        ),
    ]
    context = 0
    for number in range(arguments.rounds + 1):
        # Another order each round, so that no mode always follows the same one.
        for mode in modes[number % len(modes) :] + modes[: number % len(modes)]:
            seconds, context = _decode(mode, arguments, f"{number}-{mode.name}")
            writing = _flush(logging, arguments)
            if number:  # the first round warms up, and fills the prefix cache
                mode.seconds.append(statistics.median(seconds))
                mode.writing.append(writing / arguments.tokens)
    _print(modes, arguments, context, _log_of(logging).take_dropped())


def _log_of(llm: LLM) -> Any:
    from vllm_flow.engine.inspect import attention_log

    return attention_log(llm)


def _flush(llm: LLM, arguments: argparse.Namespace) -> float:
    """Seconds that the writer takes for what a round left, so that it disturbs no other's steps."""
    clock = CLOCKS[arguments.clock]
    start = clock()
    _log_of(llm).flush()
    return clock() - start


def _engine(model: str, dtype: str, flow: dict[str, Any]) -> LLM:
    import vllm

    return vllm.LLM(
        model=model,
        dtype=dtype,
        max_model_len=2048,
        block_size=32,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
        enable_prefix_caching=True,  # rounds cost no prefill; decode steps are the same
        limit_mm_per_prompt={"image": 1},
        use_tqdm_on_load=False,
        additional_config={"vllm_flow": flow},
    )


def _decode(mode: Mode, arguments: argparse.Namespace, name: str) -> tuple[list[float], int]:
    """Seconds of each decode step of the whole batch, and the tokens each request had before."""
    from PIL import Image
    from vllm import SamplingParams

    from vllm_flow.demo_model.heldout import build_prompt, load_questions

    engine = mode.llm.llm_engine
    questions = load_questions("seen")[: arguments.batch]
    for number, question in enumerate(questions):
        prompt = {
            "prompt": build_prompt(FILLER * arguments.filler + question.text),
            "multi_modal_data": {"image": Image.open(question.image_path).convert("RGB")},
        }
        params = SamplingParams(
            temperature=0, max_tokens=arguments.tokens, ignore_eos=True, extra_args=mode.keys
        )
        engine.add_request(f"{name}-{number}", prompt, params)
    clock = CLOCKS[arguments.clock]
    seconds, context = [], 0
    while engine.has_unfinished_requests():
        start = clock()
        outputs = engine.step()
        took = clock() - start
        lengths = [len(out.outputs[0].token_ids) for out in outputs]
        # Steps that prefill have no second token of every request yet.
        if len(lengths) == len(questions) and 1 < min(lengths) < arguments.tokens:
            seconds.append(took)
            context = len(outputs[0].prompt_token_ids)
    return seconds, context


def _print(modes: list[Mode], arguments: argparse.Namespace, context: int, dropped: int) -> None:
    import torch
    import vllm
    from vllm.platforms import current_platform

    device = current_platform.get_device_name()
    if current_platform.is_cpu():
        from cpuinfo import get_cpu_info  # vLLM requires it

        device = get_cpu_info()["brand_raw"]
    print(
        f"vLLM {vllm.__version__}, torch {torch.__version__}, {arguments.dtype}, "
        f"{device}, {counted(torch.get_num_threads(), 'thread')}.\n"
        f"{counted(arguments.batch, 'request')} of {context} prompt tokens decode together; "
        f"{counted(arguments.rounds, 'interleaved round')} of {counted(arguments.tokens - 2, 'timed step')}; "
        f"{counted(dropped, 'row')} dropped.\n"
    )
    print(
        f"| mode | ms ({arguments.clock}) per decode step | ratio | middle half of the ratios "
        "| writer's thread, ms per step |"
    )
    print("|---|---:|---:|---:|---:|")
    for mode in modes:
        pairs = zip(mode.seconds, modes[0].seconds, strict=True)
        low, middle, high = statistics.quantiles([own / base for own, base in pairs], n=4)
        print(
            f"| {mode.name} | {statistics.median(mode.seconds) * 1e3:.1f} | {middle:.2f} "
            f"| {low:.2f} to {high:.2f} | {statistics.median(mode.writing) * 1e3:.2f} |"
        )


if __name__ == "__main__":
    run_module("vllm_flow.profile.attention_cost", main)
