"""Which options a run of the profile would not read, as it was called. (pure)"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence

from vllm_flow.profile.presets import PARTS
from vllm_flow.profile.shape import PREFIX
from vllm_flow.unread_options import refuse_unread

READ_BY: Mapping[str, Collection[str]] = {
    "batch": ("prefill", "peers"),
    "rounds": ("prefill", "load", "decode", "peers"),
    "concurrency": ("load",),
    "requests": ("load",),
    "ttft_ms": ("load",),
    "tpot_ms": ("load",),
    "decode_batch": ("decode",),
    "decode_image_tokens": ("decode",),
    "peer_cliff": ("peers",),
    "policies": ("prefill", "load", "capacity", "decode"),
    "guard": ("prefill", "load", "capacity", "decode"),
}
"""Options that only some parts read; every other one is read by all."""
OF_CHECKPOINTS = ("load_format", "trust_remote_code")
"""Options that mean nothing of a shape, whose weights are random and whose code is transformers' own."""


def unread(args: argparse.Namespace) -> dict[str, str]:
    """Options without effect as the command was called, whether written or not: name -> why, after "has no effect"."""
    found = {
        name: f"without {' or '.join(parts)} among --parts"
        for name, parts in READ_BY.items()
        if not set(parts) & set(args.parts)
    }
    if args.shape or (args.model or "").startswith(PREFIX):
        found |= dict.fromkeys(OF_CHECKPOINTS, "on a shape, which has no checkpoint")
    return found


def check_read(args: argparse.Namespace) -> None:
    """Refuse what was written and would not be read.

    Raises:
        Refused: names the first such option.
    """
    for name, why in unread(args).items():
        refuse_unread(args, (name,), why)


def check_read_beside(args: argparse.Namespace, runs: Sequence[argparse.Namespace]) -> None:
    """The same for options beside a preset: one of its runs must read each.

    Args:
        args: the preset's own command.
        runs: the arguments of its runs, with the options beside it.

    Raises:
        Refused: names the first that no run reads.
    """
    every = [unread(run) for run in runs]
    for name in every[0]:
        if all(name in one for one in every):
            parts = [part for part in PARTS if any(part in run.parts for run in runs)]
            what = "is of a shape" if name in OF_CHECKPOINTS else f"measures {', '.join(parts)}"
            refuse_unread(args, (name,), f"with --preset {args.preset}, which {what}")
