"""Policies of equal cost: the same image tokens per layer, on average, by different methods. (pure)

A budget B of an image's N tokens is B tokens in each of L layers: B x L rows of a prefill. A cliff spends them
on all tokens of the first layers, a selection on few tokens of every layer, a reduced picture on fewer
patches. No method here spends more than the budget, and each as much of it as whole tokens allow; only a
square of patches may have to miss it, so that there are two: the largest below it, the smallest above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from vllm_flow.counts import counted
from vllm_flow.policy import FlowPolicy, Stage
from vllm_flow.presets import PUBLISHED_LAYERS
from vllm_flow.ranks import OWN, RANKS, merges
from vllm_flow.registry import PluginError

DEFAULT = ("cliff", "uniform", "random", "diversity", "downsample")
"""Methods of a budget that names none."""
SEEDS = (0, 1, 2)
"""Of `random`, where a budget names none."""
DOWNSAMPLE = "downsample"
ATTENTION_FROM = 2
"""Layers of 32 that see all tokens before attention ranks them: FastV's K."""
HORIZON = 20
"""Layers of 32 after which nothing is left of what `horizon` chose."""


class BudgetError(ValueError):
    """A method cannot meet a budget; says why."""


def average_tokens(policy: FlowPolicy, num_layers: int, image_tokens: int) -> Fraction:
    """Image tokens that a layer computes in prefill, on average over the layers, of one image."""
    return Fraction(image_rows(policy, num_layers, image_tokens), num_layers)


def image_rows(policy: FlowPolicy, num_layers: int, image_tokens: int) -> int:
    """Image tokens x layers of one image's prefill; all of them where it leaves before decoding only."""
    if policy.when == "decode":
        return image_tokens * num_layers
    return sum(policy.kept(layer, 0, image_tokens) for layer in range(num_layers))


def stages_at(
    method: str, share: Fraction, num_layers: int, image_tokens: int | None = None
) -> tuple[Stage, ...]:
    """A method's stages at a budget.

    Args:
        method: one of `methods`.
        share: the budget's part of the image's tokens, above 0 and below 1.
        image_tokens: of the image, where whole tokens are wanted; None gives shares of any image.

    Raises:
        BudgetError: the method cannot meet it, or is a package's rank that cannot be used.
    """

    def keep(part: Fraction) -> int | Fraction:
        return part if image_tokens is None else math.floor(part * image_tokens)

    found = (METHODS.get(method) or _of_rank(method))(share, num_layers, keep)
    return tuple(stage for stage in found if stage.layer < num_layers)


def attention_from(num_layers: int) -> int:
    """Layers with the whole image before attention ranks it, in a decoder of so many."""
    return max(1, round(Fraction(ATTENTION_FROM * num_layers, PUBLISHED_LAYERS)))


def sides_at(share: Fraction, full_grid: int) -> tuple[int, ...]:
    """Sides of the squares of patches around a budget: one where a square meets it, else two."""
    below = math.isqrt(math.floor(share * full_grid * full_grid))
    sides = [below] if below * below == share * full_grid * full_grid else [below, below + 1]
    return tuple(side for side in sides if 1 <= side <= full_grid)


Keep = Callable[[Fraction], "int | Fraction"]


def _cliff(share: Fraction, num_layers: int, keep: Keep) -> tuple[Stage, ...]:
    # Between two layers: what is left over lets some tokens, evenly spaced, see one layer more.
    whole, rest = divmod(share * num_layers, 1)
    left = keep(Fraction(rest))
    last = (Stage(whole, left, "uniform"),) if left else ()
    return (*last, Stage(whole + len(last)))


def _before(rank: str) -> Callable[[Fraction, int, Keep], tuple[Stage, ...]]:
    def at(share: Fraction, num_layers: int, keep: Keep) -> tuple[Stage, ...]:
        return (_kept(0, keep(share), rank),)

    return at


def _attended(rank: str) -> Callable[[Fraction, int, Keep], tuple[Stage, ...]]:
    def at(share: Fraction, num_layers: int, keep: Keep) -> tuple[Stage, ...]:
        first = attention_from(num_layers)
        left = keep((share * num_layers - first) / max(1, num_layers - first))
        if left <= 0:
            raise BudgetError(
                f"{rank} needs {counted(first, 'layer')} with the whole image before it ranks, which alone cost as much"
            )
        return (_kept(first, left, rank),)

    return at


def _horizon(share: Fraction, num_layers: int, keep: Keep) -> tuple[Stage, ...]:
    last = max(1, round(Fraction(HORIZON * num_layers, PUBLISHED_LAYERS)))
    part = share * num_layers / last
    if part >= 1:
        raise BudgetError(f"all tokens up to layer {last} cost less")
    return (_kept(0, keep(part), "diversity"), Stage(last))


def _kept(layer: int, left: int | Fraction, rank: str) -> Stage:
    if not left:
        raise BudgetError(f"{rank} has no token left to keep")
    return Stage(layer, left, rank)


METHODS: Mapping[str, Callable[[Fraction, int, Keep], tuple[Stage, ...]]] = {
    "cliff": _cliff,
    "uniform": _before("uniform"),
    "random": _before("random"),
    "diversity": _before("diversity"),
    "cls_attention": _before("cls_attention"),
    "cls_diverse": _before("cls_diverse"),
    "received_attention": _before("received_attention"),
    **{name: _before(name) for name in ("scope", "holov", "holov_received", "hired")},
    **{name: _before(name) for name, rank in OWN.items() if merges(rank)},
    **{name: _attended(name) for name, rank in OWN.items() if rank.reads_layer},
    "horizon": _horizon,
}
"""Ways to spend a budget on an image's tokens; `downsample` spends it on fewer patches."""


def methods() -> tuple[str, ...]:
    """Names of all ways: those of `METHODS`, `downsample`, and ranks of other packages."""
    return (*METHODS, DOWNSAMPLE, *(name for name in RANKS.added if name not in METHODS))


def draws(method: str) -> bool:
    """Whether seeds matter to a method; not known of a package's rank that cannot be used."""
    try:
        rank = RANKS.get(method)
    except PluginError:
        return False
    return rank is not None and rank.draws


def _of_rank(name: str) -> Callable[[Fraction, int, Keep], tuple[Stage, ...]]:
    """Of another package's rank: at layer 0, or behind FastV's layers where it looks at the layer before."""
    try:
        rank = RANKS[name]
    except PluginError as error:
        raise BudgetError(str(error)) from None
    return (_attended if rank.reads_layer else _before)(name)
