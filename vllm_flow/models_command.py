"""Which model families can evict, and what leaves and what stays; with a model, whether that one can.

Without a model a table, which is Markdown (that of docs/models.md) where it goes to a file or a pipe. With
one (a folder, or a name of the hub) its configuration is built as the server builds it; no weights are
loaded. Exit status 1 where the model would be refused, with the reason.

    vllm-flow models
    vllm-flow models Qwen/Qwen2.5-VL-7B-Instruct --picture 1024x768
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from vllm_flow.analysis.cam_names import READ, UNREAD
from vllm_flow.counts import counted
from vllm_flow.demo_model.naming import resolve_model
from vllm_flow.engine.families.family import Family
from vllm_flow.engine.families.known import FAMILIES
from vllm_flow.engine.process import hush
from vllm_flow.exits import CommandError, Refused
from vllm_flow.options import pixels
from vllm_flow.remote_code import add_option as add_trust
from vllm_flow.unread_options import refuse_unread

COLUMNS = (
    "Family",
    "Language model in vLLM",
    "A picture becomes",
    "Stays as text",
    "LLaVA-CAM",
    "Verified at every cliff, with random weights",
)
NOT_READ = "transformers has no model of this layout, or it was not tested with it"
LETTERS = ("AC", "DG", "HK", "LM", "NP", "QZ")
"""First and last letter of the families on a line of the README."""
MARKER = re.compile(r"<[^ ,]+>|\[[A-Z_]+\]")
"""A token of text around pictures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "model", nargs="?", help="look at this model: a folder, a hub name, or demo"
    )
    parser.add_argument(
        "--picture",
        type=pixels,
        metavar="WIDTHxHEIGHT",
        help="with a model: its tokens for a picture of this size, and what each cliff saves",
    )
    add_trust(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table, or what is true of one model; 1 where it would be refused."""
    if args.model is None and args.picture is not None:
        raise Refused(
            "--picture needs a model: its processor decides how many tokens a picture becomes"
        )
    if args.model is None:
        refuse_unread(args, ("trust_remote_code",), "without a model")
        show_table()
        return 0
    # vLLM logs how it comes to its choices, which would drown what is said here.
    hush()
    try:
        for line in about(args.model, args.picture, args.trust_remote_code):
            print(line)
    except (ValueError, OSError) as error:
        raise CommandError(f"{args.model}: {error}") from error
    return 0


def show_table() -> None:
    """Print the registry: for people on a terminal, else as Markdown."""
    # rich comes with vllm-flow[eval].
    if not sys.stdout.isatty() or find_spec("rich") is None:
        print("\n".join(table()))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    shown = Table(*(Column(name, overflow="fold") for name in COLUMNS), show_lines=True)
    for family in FAMILIES:
        shown.add_row(*(escape(cell) for cell in cells(family)))
    Console().print(shown)


def table() -> Iterator[str]:
    """The registry as a Markdown table, a row per family."""
    yield _row(COLUMNS)
    yield _row(["---"] * len(COLUMNS))
    for family in FAMILIES:
        _, decoders, layout, stays, cam, compared = cells(family)
        name = f"{family.name} (`{'`, `'.join(family.architectures)}`)"
        yield _row((name, decoders, layout, MARKER.sub(_as_code, stays), cam, compared))


def cells(family: Family) -> tuple[str, ...]:
    """A family's row."""
    return (
        f"{family.name} ({', '.join(family.architectures)})",
        ", ".join(family.decoders) or "any",
        family.layout,
        family.stays,
        read_by_cam(family),
        verified(family),
    )


def _as_code(marker: re.Match[str]) -> str:
    """As HTML: a bar within backticks would end the cell, or be shown with what escapes it."""
    return f"<code>{html.escape(marker[0]).replace('|', '&#124;')}</code>"


def read_by_cam(family: Family) -> str:
    """Whether `vllm-flow cam` and the attention reference read a family: yes, no, or all but some."""
    left = [name for name in family.architectures if name not in READ]
    if len(left) == len(family.architectures):
        return "no"
    return f"yes, but for {', '.join(left)}" if left else "yes"


def names() -> str:
    """The families by their first letters, as in the README: a line for some letters each, and any other's last."""
    by_name = sorted((family.name for family in FAMILIES if family.decoders), key=str.lower)
    lines = [
        f"- {first} to {last}: " + "; ".join(n for n in by_name if first <= n[0].upper() <= last)
        for first, last in LETTERS
    ]
    rest = next(family.name for family in FAMILIES if not family.decoders)
    return "\n".join([*lines, f"- {rest}"])


def verified(family: Family) -> str:
    """How a family was verified: what ran, and what its answers were compared with."""
    kinds = len(family.checkpoints)
    made = "a tiny checkpoint" if kinds == 1 else f"{kinds} tiny checkpoints"
    text = f"{made}, against {family.compared}"
    return f"{text}; {family.beyond}" if family.beyond else text


def about(
    model: str, picture: tuple[int, int] | None = None, trust_remote_code: bool = False
) -> Iterator[str]:
    """Lines about one model, and about a picture of a width and height.

    Args:
        trust_remote_code: whether code that comes with the model may run, as vLLM's option says.

    Raises:
        ValueError: it would be refused; names the reason and the remedy.
        OSError: there is no such model.
    """
    from vllm_flow.engine import families
    from vllm_flow.engine.engine_facts import EngineFacts
    from vllm_flow.engine.settings import FlowSettings
    from vllm_flow.profile.picture_cost import read_config

    config = read_config(resolve_model(model), trust_remote_code=trust_remote_code)
    families.check_supported(config)
    family = families.family_of(config.architecture)
    assert family is not None, "check_supported refuses what has no row"
    settings = FlowSettings.read({}, EngineFacts.of_model(config))
    layers = settings.num_layers
    yield f"{config.architecture} is supported: {family.name}"
    yield f"  language model   {config.hf_text_config.model_type}, {counted(layers, 'layer')}: flow_cliff 0 to {layers}"
    yield f"  storage          {settings.storage}, if group_layers is left out"
    yield f"  a picture        {family.layout}"
    yield f"  stays as text    {family.stays}"
    if config.architecture in READ:
        yield "  LLaVA-CAM        yes"
    else:
        yield f"  LLaVA-CAM        no: {UNREAD.get(config.architecture, NOT_READ)}"
    yield f"  verified         {verified(family)}"
    if picture is not None:
        yield from _about_picture(config, picture, settings.group_starts)


def _about_picture(
    model_config: Any, picture: tuple[int, int], group_starts: Sequence[int]
) -> Iterator[str]:
    from vllm_flow.profile.picture_cost import TEXT_TOKENS, decoder_shape, picture_tokens, savings

    tokens = picture_tokens(model_config, *picture)
    yield ""
    yield (
        f"A picture of {picture[0]} x {picture[1]} pixels: {counted(tokens.evicted, 'token leaves', 'tokens leave')} "
        f"at the cliff, {tokens.kept} around them stay."
    )
    shape = decoder_shape(model_config)
    if shape is None:
        yield "What a cliff saves is not counted for mixtures of experts, sliding windows and layers that keep states."
        return
    yield f"Saved of a prefill with {TEXT_TOKENS} tokens of text (language model only):"
    yield "  flow_cliff    FLOPs   KV bytes"
    for cliff, flops, stored in savings(shape, tokens.evicted, group_starts):
        yield f"  {cliff:10}   {flops:6.1%}     {stored:6.1%}"
    yield "These are where storage groups begin; a cliff in between saves as many KV bytes as the next one."


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
