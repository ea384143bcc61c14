"""From a vLLM request to its token layout: the same few lines in front end, scheduler and worker.

Seam: ``SamplingParams.extra_args`` and ``MultiModalFeatureSpec.mm_position``, which vLLM carries
from the front end to the workers, so no process has to tell another what it decided.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING

from vllm_flow.attention import KeySpans, LoggedRequest
from vllm_flow.layout import TokenLayout
from vllm_flow.log_keys import AttentionLog, parse_log
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_keys import parse_policy
from vllm_flow.spans import ImageSpans

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.request import Request


EVICTABLE_MODALITIES = ("image", "video", "vision_chunk")
"""A chunk is what Kimi-K2.5 calls a picture, and a few frames of a video."""
KEPT_MODALITIES = ("audio",)
"""Stay whatever the policy, like text."""


def image_spans(features: Iterable[MultiModalFeatureSpec]) -> ImageSpans:
    """Spans of the embedding positions of image and video placeholders.

    The text tokens around them (start and end markers, row breaks) are not embedding positions
    and stay.
    """
    return ImageSpans.from_ranges(span for image in image_ranges(features) for span in image)


def image_ranges(features: Iterable[MultiModalFeatureSpec]) -> list[list[tuple[int, int]]]:
    """The same spans image by image (a video counts as one), in the order of the prompt."""
    return [_ranges(feature) for feature in evictable(features)]


def _ranges(feature: MultiModalFeatureSpec) -> list[tuple[int, int]]:
    return [(start, last + 1) for start, last in feature.mm_position.extract_embeds_range()]


def unreached_modality(features: Iterable[MultiModalFeatureSpec]) -> str | None:
    """A modality of which nobody decided whether it is evicted or kept, None if there is none."""
    known = (*EVICTABLE_MODALITIES, *KEPT_MODALITIES)
    return next((found.modality for found in features if found.modality not in known), None)


def evictable(features: Iterable[MultiModalFeatureSpec]) -> list[MultiModalFeatureSpec]:
    """The images and videos, in the order of the prompt."""
    return sorted(
        (feature for feature in features if feature.modality in EVICTABLE_MODALITIES),
        key=lambda feature: feature.mm_position.offset,
    )


def layout_of(
    policy: FlowPolicy | None,
    features: Iterable[MultiModalFeatureSpec],
    num_layers: int,
    prompt_tokens: int,
) -> TokenLayout | None:
    """What a prompt stores where under a policy, None where it evicts nothing of it.

    Raises:
        ValueError: a policy for another number of images.
    """
    if policy is None:
        return None
    images = evictable(features)
    return TokenLayout.of(
        policy.within(num_layers),
        [ImageSpans.from_ranges(_ranges(image)) for image in images],
        prompt_tokens,
        [image.identifier or "" for image in images],
    )


def token_layout(
    params: SamplingParams | None,
    features: Iterable[MultiModalFeatureSpec],
    num_layers: int,
    prompt_tokens: int,
) -> TokenLayout | None:
    """The request's layout, None where it evicts nothing.

    Raises:
        ValueError: the request carries a policy that the front end would have refused.
    """
    policy = parse_policy(params.extra_args if params is not None else None, num_layers)
    return layout_of(policy, features, num_layers, prompt_tokens)


def with_digest(layout: TokenLayout, request: Request) -> TokenLayout:
    """The layout of a request whose kept tokens depend on the whole prompt, which it names.

    Not in the salt, so that text before the first image is shared with other prompts.
    """
    content = sha256(array("q", request.prompt_token_ids or ()).tobytes())
    for feature in request.mm_features:
        # Placeholders look alike, whatever the picture.
        content.update(f"{feature.mm_position.offset} {feature.identifier}\n".encode())
    return replace(layout, digest=content.digest())


def requested_log(request: Request | NewRequestData, num_layers: int) -> AttentionLog | None:
    """What a request asks to log of its attention, None if nothing."""
    params = request.sampling_params
    return parse_log(params.extra_args if params is not None else None, num_layers)


def logged_request(
    request: NewRequestData, num_layers: int, layout: TokenLayout | None
) -> LoggedRequest | None:
    """A request that reaches a worker, as far as its attention is logged; None if it is not."""
    log = requested_log(request, num_layers)
    if log is None:
        return None
    prompt_tokens = len(request.prompt_token_ids)
    images = image_ranges(request.mm_features)
    return LoggedRequest(
        log, prompt_tokens, KeySpans.of(prompt_tokens, images, single=log.heat), layout
    )
