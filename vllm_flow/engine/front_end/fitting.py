"""Checks that a policy fits a request: its prompt, its parameters, and the engine's steps.

What is wrong with a policy's keys by themselves is `policy_keys`', what no prompt could have in this engine
`fitting_engine`'s; this is what only the prompt shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_flow.counts import counted
from vllm_flow.engine import frames
from vllm_flow.engine.core.connectors import LAYOUT_KEY, REMOTE_BLOCKS, REMOTE_PREFILL
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.front_end import fitting_engine
from vllm_flow.engine.obstacles import Misfit, Obstacle
from vllm_flow.engine.requests import (
    evictable,
    image_ranges,
    layout_of,
    unreached_modality,
)
from vllm_flow.engine.scored_pictures import PIXELS
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.layout import TokenLayout
from vllm_flow.log_keys import HEAT_KEY, LOG_KEY, parse_log
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_bounds import check_bound
from vllm_flow.policy_keys import CLIFF_KEY, KEEP_KEY
from vllm_flow.ranks import RANKS, FrameRank, PositionRank, TowerRank
from vllm_flow.registry import PluginError

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
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
    unfit = next(fitting_engine.unfit(policy, settings.engine), None)
    if unfit is not None:
        raise Obstacle(Misfit.ENGINE, unfit.sentence, unfit.key)
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
    check_encoded(layout, settings.engine, evictable(features))
    if settings.engine.connected:
        _check_transfer(request, layout, settings)
    _check_step(layout, settings.engine)
    _check_pieces(layout, settings.engine)
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
    request: EngineCoreRequest,
    policy: FlowPolicy,
    bound: FlowPolicy,
    num_layers: int,
    keys: Mapping[str, Any],
) -> None:
    """Refuse a client's policy that evicts more of this prompt than the operator allows.

    Raises:
        PolicyError: see :func:`vllm_flow.policy_bounds.check_bound`.
    """
    totals = [image.mm_position.get_num_embeds() for image in evictable(request.mm_features or ())]
    check_bound(policy, bound, totals, num_layers, keys)


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


def check_encoded(
    layout: TokenLayout, engine: EngineFacts, pictures: Iterable[MultiModalFeatureSpec]
) -> None:
    """Refuse ranks by the vision tower of what has been through no tower of this engine, or as a video's frames.

    Raises:
        Obstacle: of frames, which nobody has compared, or of a picture that came as embeddings; a rank by frames of
            what has none.
    """
    ranks = {choice.rank for stage in layout.stages for choice in stage.choices}
    pictures = [*pictures]
    _check_frames(ranks, engine, pictures)
    name = min((rank for rank in ranks if isinstance(RANKS[rank], TowerRank)), default=None)
    if name is None:
        return
    reads = f"{name!r} reads the {RANKS[name].score.value}"
    remedy = f"rank by {fitting_engine.possible(engine, reading_tower=False)}."
    for picture in pictures:
        if picture.modality == "video":
            raise Obstacle(
                Misfit.VIDEO,
                f"{reads}, and nobody has tested how those of a video's frames compare; send frames as single "
                f"pictures, or {remedy}",
            )
        if engine.mm_embeds and not _has_pixels(picture.data):
            raise Obstacle(
                Misfit.EMBEDDINGS,
                f"{reads}, and a picture of this prompt came as embeddings, which no tower of this engine has "
                f"seen; send its pixels, or {remedy}",
            )


def _check_frames(
    ranks: Iterable[str], engine: EngineFacts, pictures: Iterable[MultiModalFeatureSpec]
) -> None:
    """Refuse ranks by frames of pictures, and of a video that came as embeddings and does not say how many it has."""
    name = min((rank for rank in ranks if isinstance(RANKS[rank], FrameRank)), default=None)
    if name is None:
        return
    remedy = f"rank by {fitting_engine.possible(engine, of_frames=False)}."
    for picture in pictures:
        if picture.modality != "video":
            raise Obstacle(
                Misfit.PICTURE,
                f"{name!r} goes by the frames of a video, and this prompt has a picture that is none; {remedy}",
            )
        if engine.mm_embeds and not frames.there(picture.data or {}):
            raise Obstacle(
                Misfit.EMBEDDINGS,
                f"{name!r} goes by the frames of a video, and one of this prompt came as embeddings, which do not say "
                f"how many it has; send its pixels, or {remedy}",
            )


def _has_pixels(item: Any) -> bool:
    """Whether the tower is given what a picture's item holds; not known of one that lies elsewhere."""
    return item is not None and any(name in item for name in PIXELS)


def _check_transfer(
    request: EngineCoreRequest, layout: TokenLayout, settings: FlowSettings
) -> None:
    """Blocks that are asked for, or wanted elsewhere, are not those of a request that evicts.

    But where the connector pairs blocks by their place, and both engines store the prompt alike.
    """
    asked = transfer_of(request.sampling_params.extra_args)
    if not asked:
        return
    if not settings.engine.hands_over:
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
    if asked.get(REMOTE_PREFILL) and asked.get(LAYOUT_KEY) != layout.fingerprint(
        settings.group_layers
    ):
        raise Obstacle(
            Misfit.KV_TRANSFER,
            "its prompt was prefilled without this policy, or by an engine with other storage groups; "
            "send what the prefill was sent, and give both engines the same group_layers.",
        )


def transfer_of(keys: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A request's ``kv_transfer_params``, empty where it has none."""
    found = (keys or {}).get("kv_transfer_params")
    return found if isinstance(found, Mapping) else {}


def _check_step(layout: TokenLayout, engine: EngineFacts) -> None:
    """What must be computed in one step must fit one, or the request would wait for ever."""
    longest = max((stop - start for start, stop in layout.atomic), default=layout.last_step_tokens)
    if engine.step_tokens is None or longest <= engine.step_tokens:
        return
    raise Obstacle(
        Misfit.STEP,
        f"its rank must see {longest} tokens in one step, and a step of this engine has room for "
        f"{engine.step_tokens}; rank by {_by_place()}, or have the server started with a greater "
        "max_num_batched_tokens (and max_num_scheduled_tokens, if that is set), a smaller max_num_seqs or without "
        "long_prefill_token_threshold.",
    )


def _check_pieces(layout: TokenLayout, engine: EngineFacts) -> None:
    """The tokens of a piece see one another, and the host says where those that stay are stored."""
    asked = [choice for stage in layout.stages for choice in stage.choices]
    if engine.mutual_pictures and not layout.late and any(choice.text for choice in asked):
        raise Obstacle(
            Misfit.PICTURE,
            "the tokens of a picture see one another, piece by piece where it is cut into crops or is a video, and how "
            f"many of each piece stay is chosen on the device; rank by {_by_place()}, or, of Gemma 3, leave out "
            "do_pan_and_scan.",
        )


def _by_place() -> str:
    """The ranks that look at nothing, to be read."""
    return " or ".join(
        repr(name) for name, rank in RANKS.usable().items() if isinstance(rank, PositionRank)
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
