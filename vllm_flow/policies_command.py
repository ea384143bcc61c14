"""Which ranks and presets there are, what each keeps and shares in the prefix cache, and how far it is as published.

Without a name two Markdown tables, those of docs/ranks.md and docs/presets.md; ranks of other packages that are
installed come last. With names, what there is to know of each. With a model's number of decoder layers, what each
preset becomes for it, and what it costs.

    vllm-flow policies
    vllm-flow policies fastv
    vllm-flow policies --layers 28
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

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
    "Method",
    "Stages, of 32 layers",
    "Image tokens per layer, of 576",
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
        "names",
        nargs="*",
        type=_name,
        metavar="NAME",
        help="a rank or a preset, to be described; without one, the tables of all",
    )
    parser.add_argument(
        "--layers",
        type=_layers,
        metavar="N",
        help="what each preset becomes in a decoder of so many layers",
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables, sections of what is named, or what the presets become in a decoder of --layers."""
    if args.names and args.layers is not None:
        raise CommandError("--layers shows all presets; leave out the names, or --layers")
    if args.layers is not None:
        print("\n".join(of_depth(args.layers)))
        return 0
    print("\n".join(described(args.names) if args.names else tables()).rstrip())
    faults = RANKS.faults()
    if faults and not args.names:
        raise CommandError("; ".join(faults))
    return 0


def tables() -> Iterator[str]:
    """The ranks and the presets as two Markdown tables."""
    yield _row(RANK_COLUMNS)
    yield _row(["---"] * len(RANK_COLUMNS))
    for name, rank in RANKS.usable().items():
        yield _row((f"`{name}`", _title(name), looks_at(rank), ONE_STEP[rank.needs], shared(rank)))
    yield ""
    yield _row(PRESET_COLUMNS)
    yield _row(["---"] * len(PRESET_COLUMNS))
    for preset in PRESETS.values():
        yield _row((f"`{preset.name}`", preset.method, _published(preset), _average(preset)))


def described(names: Iterable[str]) -> Iterator[str]:
    """A Markdown section for each of the names; two for a name of a preset and of a rank."""
    for name in names:
        if name in PRESETS:
            yield from preset_section(PRESETS[name])
            yield ""
        if name in RANKS.usable():
            yield from rank_section(name)
            yield ""


def preset_section(preset: Preset) -> Iterator[str]:
    """Markdown: a preset's stages and source, what is as published, and what is not."""
    paper = preset.paper
    where = f", {paper.where}" if paper.where else ""
    code = f" Code: [{paper.code}](https://github.com/{paper.code})." if paper.code else ""
    yield f"### {preset.name}"
    yield ""
    yield f"{preset.method}: {_published(preset)}; image tokens per layer, of 576: {_average(preset)}."
    yield f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}){where}.{code}"
    for head, sentences in (("As published", preset.same), ("Different here", preset.different)):
        yield ""
        yield f"{head}:"
        yield ""
        yield from (f"- {sentence}" for sentence in sentences)


def rank_section(name: str) -> Iterator[str]:
    """Markdown: what a rank keeps, needs and shares."""
    rank = RANKS[name]
    yield f"### rank {name}"
    yield ""
    yield f"- Keeps: {_title(name)}."
    yield f"- Looks at: {looks_at(rank)}."
    yield f"- Computed in one step: {ONE_STEP[rank.needs]}."
    yield f"- Shared in the prefix cache: {shared(rank)}."


def _title(name: str) -> str:
    """What a rank keeps, and the package that brings it where it is not this one."""
    title = RANKS[name].title
    return title if name in RANKS.own else f"{title} ({RANKS.added[name][0].distribution})"


def _published(preset: Preset) -> str:
    return f"`{stages_text(preset.published)}`"


def _average(preset: Preset) -> str:
    return f"{average(preset, PUBLISHED_LAYERS):.1f}"


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


def _name(text: str) -> str:
    if text not in PRESETS and text not in RANKS.usable():
        known = ", ".join((*PRESETS, *(n for n in RANKS.usable() if n not in PRESETS)))
        raise argparse.ArgumentTypeError(f"{text!r} is no rank or preset; those are {known}")
    return text


def _layers(text: str) -> int:
    number = whole_number(text) or 0
    if not 0 < number <= MOST_LAYERS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of decoder layers")
    return number


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
