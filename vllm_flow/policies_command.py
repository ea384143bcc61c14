"""Which ranks and presets there are: what each keeps, what it shares in the prefix cache, and its source.

Two Markdown tables, those of docs/policies.md; ranks of other packages that are installed come last. With a
model's number of decoder layers, what each preset becomes for it, and what it costs.

    vllm-flow policies
    vllm-flow policies --layers 28
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from vllm_flow.exits import CommandError
from vllm_flow.policy import FlowPolicy, stages_text
from vllm_flow.presets import PRESETS, PUBLISHED_LAYERS, PUBLISHED_TOKENS, Preset
from vllm_flow.ranks import (
    RANKS,
    AttentionRank,
    FrameRank,
    HiddenRank,
    PictureRank,
    QuestionRank,
    Rank,
    TileRank,
    TowerRank,
    UnrotatedRank,
)
from vllm_flow.ranks.base import Needs
from vllm_flow.user_text import whole_number

RANK_COLUMNS = (
    "`flow_rank`",
    "Keeps",
    "Looks at",
    "Computed in one step",
    "Shared in the prefix cache",
)
PRESET_COLUMNS = (
    "`flow_preset`",
    "Stages, of 32 layers",
    "Image tokens per layer, of 576",
    "As published",
    "Different here",
    "Source",
)
ONE_STEP = {
    Needs.NOTHING: "nothing",
    Needs.IMAGE: "the image",
    Needs.PROMPT: "from the first image to the end of the prompt",
}
MOST_LAYERS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--layers",
        type=_layers,
        metavar="N",
        help="what each preset becomes in a decoder of so many layers",
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables; with --layers, the presets as a model of that depth gets them."""
    lines = tables() if args.layers is None else of_depth(args.layers)
    print("\n".join(lines))
    faults = RANKS.faults() if args.layers is None else []
    if faults:
        raise CommandError("; ".join(faults))
    return 0


def tables() -> Iterator[str]:
    """The ranks and the presets as two Markdown tables."""
    yield _row(RANK_COLUMNS)
    yield _row(["---"] * len(RANK_COLUMNS))
    for name, rank in RANKS.usable().items():
        title = (
            rank.title
            if name in RANKS.own
            else f"{rank.title} ({RANKS.added[name][0].distribution})"
        )
        yield _row((f"`{name}`", title, looks_at(rank), ONE_STEP[rank.needs], shared(rank)))
    yield ""
    yield _row(PRESET_COLUMNS)
    yield _row(["---"] * len(PRESET_COLUMNS))
    for preset in PRESETS.values():
        yield _row(
            (
                f"`{preset.name}`",
                f"`{stages_text(preset.published)}`",
                f"{average(preset, PUBLISHED_LAYERS):.1f}",
                preset.same,
                preset.different,
                preset.source,
            )
        )


def of_depth(num_layers: int) -> Iterator[str]:
    """A line per preset: its stages in a decoder of so many layers, and the share of image tokens left."""
    width = max(map(len, PRESETS))
    for preset in PRESETS.values():
        stages = stages_text(preset.stages(num_layers)) or "nothing is evicted"
        share = average(preset, num_layers) / PUBLISHED_TOKENS
        yield f"{preset.name:{width}}  {share:6.1%} of the image tokens per layer  {stages}"


def average(preset: Preset, num_layers: int) -> float:
    """Image tokens per layer, of 576, on average over the layers."""
    stages = preset.stages(num_layers)
    if not stages:
        return float(PUBLISHED_TOKENS)
    policy = FlowPolicy((stages,))
    kept = [policy.kept(layer, 0, PUBLISHED_TOKENS) for layer in range(num_layers)]
    return sum(kept) / num_layers


def looks_at(rank: Rank) -> str:
    """What a rank needs to know."""
    if isinstance(rank, HiddenRank):
        return "hidden states where the stage begins, keys of the layer before"
    if isinstance(rank, UnrotatedRank):
        return "queries and keys of the layer before, not yet turned"
    if isinstance(rank, QuestionRank) and rank.weights is not None:
        return "embeddings, and attention in the layer before, over all heads"
    if isinstance(rank, AttentionRank):
        return "attention in the layer before, over all heads"
    if isinstance(rank, FrameRank):
        return "the video's embeddings, frame by frame"
    if isinstance(rank, PictureRank):
        return "the image's embeddings"
    if isinstance(rank, TileRank):
        return f"{rank.score.value}, over all heads, there and in the first layer, tile by tile"
    if isinstance(rank, TowerRank):
        keys = ", and the keys there" if rank.merge is not None else ""
        return f"{rank.score.value}, over all heads{keys}"
    return "places alone"


def shared(rank: Rank) -> str:
    """What two requests with one policy and different prompts can share of a prefix that holds the image."""
    return {
        Needs.NOTHING: "any prefix",
        Needs.IMAGE: "any prefix that does not end inside an image",
        Needs.PROMPT: "what is before the first image; all of it for the same prompt",
    }[rank.needs]


def _layers(text: str) -> int:
    number = whole_number(text) or 0
    if not 0 < number <= MOST_LAYERS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of decoder layers")
    return number


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
