"""Checks that a policy fits a request: its prompt, its parameters, and the engine's steps.

What is wrong with a policy's keys by themselves is `policy_keys`'; this is what only the prompt shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_flow.counts import counted
from vllm_flow.engine import fitting_ranks, obstacles, states
from vllm_flow.engine.connectors import LAYOUT_KEY, REMOTE_BLOCKS, REMOTE_PREFILL
from vllm_flow.engine.obstacles import Misfit, Obstacle
from vllm_flow.engine.requests import (
    evictable,
    image_ranges,
    layout_of,
    unreached_modality,
)
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.layout import TokenLayout
from vllm_flow.log_keys import HEAT_KEY, LOG_KEY, parse_log
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_bounds import check_bound
from vllm_flow.policy_keys import CLIFF_KEY, KEEP_KEY, WHEN_KEY
from vllm_flow.ranks import RANKS, PositionRank
from vllm_flow.registry import PluginError

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest


def fitted(
    request: EngineCoreRequest,
    policy: FlowPolicy,
    settings: FlowSettings,
    keys: Mapping[str, Any],
) -> TokenLayout | None:
    """The request's layout under a policy; None where nothing would be evicted.

    Args:
        keys: the request's own keys, without those of an operator's policy.

    Raises:
        Obstacle: the policy does not fit.
    """
    if request.prompt_embeds is not None:
        raise Obstacle(
            Misfit.EMBEDDINGS,
            "a prompt given as embeddings does not say which of them are a picture's; leave out "
            "the policy, or send text and pictures.",
        )
    features = request.mm_features or ()
    strange = unreached_modality(features)
    if strange is not None:
        raise Obstacle(
            Misfit.MODALITY,
            f"no policy reaches inputs of the modality {strange!r}; leave out the policy.",
        )
    totals = [image.mm_position.get_num_embeds() for image in evictable(features)]
    _check_images(policy, totals, keys)
    if not totals:
        return None
    prompt_tokens = len(request.prompt_token_ids or ())
    _check_places(image_ranges(features), prompt_tokens)
    fitting_ranks.check_added(policy, settings)
    try:
        layout = layout_of(policy, features, settings.num_layers, prompt_tokens)
    except PluginError as error:
        raise Obstacle(Misfit.ENGINE, f"{error}.") from None
    if layout is None:
        return None
    if request.resumable:
        raise Obstacle(
            Misfit.STREAMING, "streaming input may bring images later; leave out the policy."
        )
    _check_log(layout, keys, settings.num_layers)
    _check_late(layout, settings)
    fitting_ranks.check(policy, layout, settings, evictable(features))
    if settings.connected:
        _check_transfer(request, layout, settings)
    _check_step(layout, settings)
    _check_pieces(layout, settings)
    if layout.late:  # the prompt's rows are all there
        return layout
    if layout.spans.end >= prompt_tokens:
        raise Obstacle(
            Misfit.PROMPT_END,
            "the prompt ends with an image token, and the first answer token would be read from "
            "an evicted row; put text (or the chat template's turn end) after the image.",
        )
    return layout


def check_bounds(
    request: EngineCoreRequest, policy: FlowPolicy, bound: FlowPolicy, num_layers: int
) -> None:
    """Refuse a client's policy that evicts more of this prompt than the operator allows.

    Raises:
        PolicyError: see :func:`vllm_flow.policy_bounds.check_bound`.
    """
    totals = [image.mm_position.get_num_embeds() for image in evictable(request.mm_features or ())]
    check_bound(policy, bound, totals, num_layers)


def _check_images(policy: FlowPolicy, totals: list[int], keys: Mapping[str, Any]) -> None:
    for key in (CLIFF_KEY, KEEP_KEY):
        value = keys.get(key)
        if isinstance(value, (list, tuple)) and len(value) != len(totals):
            raise Obstacle(
                Misfit.PICTURE,
                f"it has {counted(len(value), 'value')} and the prompt has {counted(len(totals), 'image')}; "
                "give one value per image, in the order of the prompt, or a single one for all of them, no list.",
                key,
            )
    for image, total in enumerate(totals):
        stages = policy.stages_of(image)
        for before, after in zip(stages, stages[1:], strict=False):
            if after.kept(total) > before.kept(total):
                raise Obstacle(
                    Misfit.PICTURE,
                    f"of an image of {counted(total, 'token')}, stage {str(after)!r} keeps {after.kept(total)} and "
                    f"{str(before)!r} left {before.kept(total)}; tokens that are gone do not come back.",
                )


def _check_places(images: Iterable[Sequence[tuple[int, int]]], prompt_tokens: int) -> None:
    """Clients of ``/inference/v1/generate`` say themselves where their pictures are."""
    places = [(ranges[0][0], ranges[-1][1]) for ranges in images if ranges]
    past = 0
    for start, end in places:
        if start < past or end > prompt_tokens:
            raise Obstacle(
                Misfit.PICTURE,
                f"one of its pictures is at tokens {start} to {end} of a prompt of {counted(prompt_tokens, 'token')}, "
                "beyond its end or in another picture; send the places that rendering gave.",
            )
        past = end


def _check_late(layout: TokenLayout, settings: FlowSettings) -> None:
    """What the engine, or its workers, cannot do once a prompt is computed."""
    if not layout.late:
        return
    forgets = states.late_reason(settings.attending if settings.keep_states else ())
    if forgets is not None:
        raise Obstacle(
            Misfit.ENGINE,
            f"images cannot leave this model after the prefill: {forgets}; leave it out.",
            WHEN_KEY,
        )
    if settings.connected:
        raise Obstacle(
            Misfit.ENGINE,
            "this engine has a KV connector, which may fill blocks that were given back before what "
            "stays is copied out of them; leave this key out, or the connector.",
            WHEN_KEY,
        )
    reason = settings.obstacles.get(obstacles.LATE)
    if reason is not None:
        raise Obstacle(
            Misfit.ENGINE,
            f"what stays after the prefill cannot be moved in this engine's KV cache: {reason}; leave "
            f"this key out, {fitting_ranks.ANOTHER_BACKEND}",
            WHEN_KEY,
        )


def _check_transfer(
    request: EngineCoreRequest, layout: TokenLayout, settings: FlowSettings
) -> None:
    """Blocks that are asked for, or wanted elsewhere, are not those of a request that evicts.

    But where the connector pairs blocks by their place, and both engines store the prompt alike.
    """
    asked = transfer_of(request.sampling_params.extra_args)
    if not asked:
        return
    if not settings.hands_over:
        raise Obstacle(
            Misfit.KV_TRANSFER,
            "the KV cache of a request that evicts stays in its engine; leave out kv_transfer_params, "
            "or the policy.",
        )
    if asked.get(REMOTE_BLOCKS) and not asked.get(REMOTE_PREFILL):
        raise Obstacle(
            Misfit.KV_TRANSFER,
            "the blocks that kv_transfer_params names are an earlier turn's, to be read back as so many "
            f"tokens, which packed blocks are not; leave out {REMOTE_BLOCKS}.",
        )
    if asked.get(REMOTE_PREFILL) and asked.get(LAYOUT_KEY) != layout.name(settings.group_layers):
        raise Obstacle(
            Misfit.KV_TRANSFER,
            "its prompt was prefilled without this policy, or by an engine with other storage groups; "
            "send what the prefill was sent, and give both engines the same group_layers.",
        )


def transfer_of(keys: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A request's ``kv_transfer_params``, empty where it has none."""
    found = (keys or {}).get("kv_transfer_params")
    return found if isinstance(found, Mapping) else {}


def _check_step(layout: TokenLayout, settings: FlowSettings) -> None:
    """What must be computed in one step must fit one, or the request would wait for ever."""
    longest = max((stop - start for start, stop in layout.atomic), default=layout.last_step_tokens)
    if settings.step_tokens is None or longest <= settings.step_tokens:
        return
    by_place = [name for name, rank in RANKS.usable().items() if isinstance(rank, PositionRank)]
    raise Obstacle(
        Misfit.STEP,
        f"its rank must see {longest} tokens in one step, and a step of this engine has room for "
        f"{settings.step_tokens}; rank by {' or '.join(map(repr, by_place))}, or have the server "
        "started with a greater max_num_batched_tokens, a smaller max_num_seqs or without "
        "long_prefill_token_threshold.",
    )


def _check_pieces(layout: TokenLayout, settings: FlowSettings) -> None:
    """The tokens of a piece see one another, and the host says where those that stay are stored."""
    asked = [choice for stage in layout.stages for choice in stage.choices]
    if settings.mutual_pictures and not layout.late and any(choice.text for choice in asked):
        by_place = [name for name, rank in RANKS.usable().items() if isinstance(rank, PositionRank)]
        raise Obstacle(
            Misfit.PICTURE,
            "the tokens of a picture see one another, piece by piece where it is cut into crops, and how many "
            "of each piece stay is chosen on the device; rank by "
            f"{' or '.join(map(repr, by_place))}, or leave out do_pan_and_scan.",
        )


def _check_log(layout: TokenLayout, keys: Mapping[str, Any], num_layers: int) -> None:
    """A log of single tokens needs to know which are there, which only the device does."""
    log = parse_log(keys, num_layers)
    if log is None or not layout.chooses:
        return
    if log.heat:
        raise Obstacle(
            Misfit.LOG,
            "which image tokens stay is chosen on the device, so their shares have no places in the "
            "picture; leave this key out, or rank by place.",
            HEAT_KEY,
        )
    if any(choice.text for stage in layout.stages for choice in stage.choices):
        raise Obstacle(
            Misfit.LOG,
            "this model has text between the tokens of a picture, and which of them come before it is "
            "chosen on the device; leave this key out, or rank by place.",
            LOG_KEY,
        )
