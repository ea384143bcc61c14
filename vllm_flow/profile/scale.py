"""From one GPU to a fleet, by arithmetic: requests per GPU, KV transfer, cost per million requests.

``python -m vllm_flow.profile.scale`` prints the table of docs/scale.md. Nothing here is measured:
every figure follows from :mod:`vllm_flow.profile.ideal` and the assumptions, which are options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

from vllm_flow.counts import counted
from vllm_flow.exits import run_module
from vllm_flow.options import count, positive, positive_number, positives
from vllm_flow.profile import ideal
from vllm_flow.profile.dimensions import ModelShape, TowerShape, Workload

PICTURE = (1024, 768)
"""Width and height, in pixels, of the pictures given to models that take them at their own size."""

# Shapes as their config.json on the hub states them.
_CLIP_L_336 = TowerShape(layers=23, hidden=1024, mlp=4096, patches=576, patch_values=588)
# A patch is 14 x 14 pixels of two frames, both of them the picture; 37 x 27 squares of 2 x 2 are tokens.
_QWEN_2_5 = TowerShape(
    layers=32, hidden=1280, mlp=3420, patches=37 * 27 * 4, patch_values=2 * 588, class_rows=0,
    merged=4, projector=4 * 1280, gated=True, window=64, whole_layers=4,
)  # fmt: skip
# Twelve tiles of 448 x 448 pixels, and the picture whole.
_INTERN_300M = TowerShape(
    layers=24, hidden=1024, mlp=4096, patches=1024, patch_values=588, passes=12 + 1, merged=4
)
MODELS = {
    "llava-1.5-7b": ModelShape(32, 4096, 32, 32, 128, 11008, 32064, _CLIP_L_336),
    "llava-1.5-13b": ModelShape(40, 5120, 40, 40, 128, 13824, 32064, _CLIP_L_336),
    "qwen2.5-vl-7b": ModelShape(28, 3584, 28, 4, 128, 18944, 152064, _QWEN_2_5),
    "internvl3-8b": ModelShape(28, 3584, 28, 4, 128, 18944, 151674, _INTERN_300M),
}


@dataclass(frozen=True)
class Assumptions:
    """What the arithmetic takes for granted; the defaults are one H200 at its data sheet's peaks."""

    tflops: float = 989.0
    """Dense bfloat16 peak."""
    flops_used: float = 0.5
    """Share of the peak that a prefill reaches."""
    memory_gb: float = 141.0
    memory_used: float = 0.9
    """Share of the memory for weights and KV cache."""
    bandwidth_gbs: float = 4800.0
    bandwidth_used: float = 0.7
    """Share of the memory bandwidth that a decode reaches."""
    network_gbs: float = 50.0
    """Between nodes, per GPU: 400 Gbit/s."""
    dollars_per_hour: float = 3.0
    batch: int = 256
    """Requests decoded at once, where memory allows."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name}={value}: it must be positive.")


@dataclass(frozen=True)
class FleetRow:
    """One cliff on one kind of GPU."""

    cliff: int
    prefill_ms: float
    """Vision tower, decoder rows and attention of one request, FLOP-bound."""
    kv_mib: float
    """One request's keys and values at its end."""
    resident: int
    """Requests whose keys and values fit beside the weights."""
    step_ms: float
    """A decode step at ``batch`` requests or as many as fit, bandwidth-bound."""
    requests_per_s: float
    """One GPU doing both prefill and decode."""
    transfer_ms: float
    """Moving one prompt's keys and values from a prefill to a decode node."""
    prefill_gbs: float
    """What one GPU that only does prefill sends per second, in GB/s."""
    decode_per_prefill: float
    """Decode GPUs that one prefill GPU keeps busy."""
    dollars_per_million: float


def fleet_row(shape: ModelShape, work: Workload, cliff: int, given: Assumptions) -> FleetRow:
    """The arithmetic for one cliff.

    Raises:
        ValueError: the weights, or one request, do not fit.
    """
    weights = (
        shape.layers * shape.layer_parameters + 2 * shape.head_parameters
    ) * shape.value_bytes
    room = given.memory_gb * 1e9 * given.memory_used - weights
    each = ideal.kv_bytes(shape, work, cliff)
    resident = int(room // each)
    if resident < 1:
        raise ValueError(f"{given.memory_gb:g} GB hold the weights and no request beside them.")
    batch = min(resident, given.batch)
    prefill = ideal.prefill_flops(shape, work, cliff).total / (
        given.tflops * 1e12 * given.flops_used
    )
    step = ideal.decode_step_bytes(shape, work, cliff, batch) / (
        given.bandwidth_gbs * 1e9 * given.bandwidth_used
    )
    decode = (work.output_tokens - 1) * step / batch  # GPU seconds of one request
    prompt_bytes = ideal.stored_tokens(shape, work, cliff, work.prompt_tokens) * shape.token_bytes
    rate = 1 / (prefill + decode)
    return FleetRow(
        cliff=cliff,
        prefill_ms=1e3 * prefill,
        kv_mib=each / 2**20,
        resident=resident,
        step_ms=1e3 * step,
        requests_per_s=rate,
        transfer_ms=1e3 * prompt_bytes / (given.network_gbs * 1e9),
        prefill_gbs=prompt_bytes / prefill / 1e9,
        decode_per_prefill=decode / prefill,
        dollars_per_million=given.dollars_per_hour / 3600 * 1e6 / rate,
    )


def markdown(rows: Sequence[FleetRow], num_layers: int) -> str:
    """The rows as a Markdown table, the baseline first."""
    head = (
        "cliff", "prefill ms", "KV MiB", "requests resident", "decode step ms", "requests/s per GPU",
        "×", "transfer ms", "GB/s sent per prefill GPU", "decode GPUs per prefill GPU",
        "$ per million",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for row in rows:
        lines.append(
            f"| {'none' if row.cliff == num_layers else row.cliff} | {row.prefill_ms:.1f} "
            f"| {row.kv_mib:.0f} | {row.resident} | {row.step_ms:.1f} | {row.requests_per_s:.1f} "
            f"| {row.requests_per_s / rows[0].requests_per_s:.2f} | {row.transfer_ms:.2f} "
            f"| {row.prefill_gbs:.1f} | {row.decode_per_prefill:.2f} "
            f"| {row.dollars_per_million:.1f} |"
        )
    return "\n".join(lines)


def _cliffs(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table per number of images."""
    parser = argparse.ArgumentParser(prog="python -m vllm_flow.profile.scale", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="llava-1.5-7b")
    parser.add_argument(
        "--images", type=positives, default="1,5", help="per request; default: %(default)s"
    )
    parser.add_argument("--cliffs", type=_cliffs, default="22,16,8,2", help="default: %(default)s")
    parser.add_argument("--text-tokens", type=positive, default=64)
    parser.add_argument("--output-tokens", type=positive, default=64)
    for field in fields(Assumptions):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=positive if isinstance(field.default, int) else positive_number,
            default=field.default,
            help="assumed; default: %(default)s",
        )
    args = parser.parse_args(argv)
    shape = MODELS[args.model]
    assert shape.tower is not None
    size = "" if args.model.startswith("llava") else f" of {PICTURE[0]} x {PICTURE[1]} pixels"
    try:
        given = Assumptions(**{f.name: getattr(args, f.name) for f in fields(Assumptions)})
        cliffs = [shape.layers, *args.cliffs]
        if max(cliffs) > shape.layers:
            raise ValueError(
                f"--cliffs {max(cliffs)}: {args.model} has {shape.layers} decoder layers; write numbers from 0 to "
                f"{shape.layers}."
            )
        for images in args.images:
            work = Workload(
                args.text_tokens, images * shape.tower.tokens, args.output_tokens, images
            )
            print(
                f"\n{args.model}, {counted(images, 'image')}{size} = {counted(work.image_tokens, 'image token')}, "
                f"{counted(work.text_tokens, 'text token')}, {work.output_tokens} out\n"
            )
            rows = [fleet_row(shape, work, cliff, given) for cliff in cliffs]
            print(markdown(rows, shape.layers))
    except ValueError as error:
        parser.error(str(error))
    print("\nAssumed: " + ", ".join(f"{f.name} {getattr(given, f.name):g}" for f in fields(given)))
    return 0


if __name__ == "__main__":
    run_module("vllm_flow.profile.scale", main)
