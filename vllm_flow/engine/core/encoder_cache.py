"""Keeps every picture that a step needs computable: no step may find an encoder output missing.

Seams: ``Scheduler._allocate_encoder_inputs``, ``EncoderCacheManager``, ``SchedulerOutput`` with a
field of ours (`wire`), and the request states of Model Runner V1. vLLM 0.32 ends the engine with "Encoder
cache miss" where scheduler and worker disagree about a picture, which happens in two ways:

- *A picture's data was never sent.* A request whose first prefix hit covers a picture reaches the
  worker without its data. Preempted, it may find less in the prefix cache, and then the encoder has
  to run. A request with a policy waits for the one that computes its prefix, so most of its first
  hits cover the picture. The data now come with the step that encodes it. Model Runner V2 is sent a
  preempted request anew, with all it needs.
- *An output is booked that nobody computes.* Under priority scheduling, a request may be preempted
  by a later one of the same step, after the encoder's output was booked. Another request of the step
  that needs it now computes it; else the booking goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_flow.engine.wire import PICTURES_FIELD, pictures_of

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class Booking:
    """Who computes an encoder output in the step being scheduled."""

    request_id: str
    input_id: int


def settle(
    output: SchedulerOutput,
    booked: Mapping[str, Booking],
    cache: EncoderCacheManager,
    requests: Mapping[str, Request],
    *,
    with_pictures: bool,
) -> None:
    """Make the step compute what is booked, and give it the data it takes.

    Args:
        output: the finished step, changed in place.
        booked: of the step, hash of the picture -> who computes it.
        requests: the scheduler's live requests.
        with_pictures: whether preempted requests may lack pictures, as under Model Runner V1.
    """
    for mm_hash, booking in booked.items():
        if booking.request_id in output.num_scheduled_tokens:
            continue
        heir = _heir(output, mm_hash, cache, requests)
        if heir is None:
            _forget(mm_hash, cache)
        else:
            inputs = output.scheduled_encoder_inputs.setdefault(heir.request_id, [])
            inputs.append(heir.input_id)
    pictures = _pictures(output, requests) if with_pictures else {}
    if pictures:
        setattr(output, PICTURES_FIELD, pictures)


def restore(states: Mapping[str, Any], output: SchedulerOutput) -> None:
    """Give the worker's requests the pictures that this step encodes and that it was never sent."""
    for request_id, pictures in pictures_of(output).items():
        state = states[request_id]
        # A new list: in one process, the old one may be the scheduler's own.
        state.mm_features = [
            pictures.get(index, feature) if feature.data is None else feature
            for index, feature in enumerate(state.mm_features)
        ]


def begun(
    cache: EncoderCacheManager, request: Request, num_computed: int, num_scheduled: int, ahead: int
) -> int:
    """Tokens of a chunk from ``num_computed`` on, cut where a picture begins in it; of one that has begun, all.

    Begun is one that the request keeps, and one right behind it: of that, a drafter reads before the other ends.

    Args:
        ahead: tokens behind a chunk whose embeddings a drafter reads.
    """
    held, begun_until = cache.get_cached_input_ids(request), -ahead
    for index, feature in enumerate(request.mm_features):
        start = feature.mm_position.offset
        stop = start + feature.mm_position.length
        if stop <= num_computed:
            continue
        if start < num_computed or index in held or start < begun_until + ahead:
            begun_until = stop
            continue
        return max(min(num_scheduled, start - ahead - num_computed), 0)
    return num_scheduled


def give_back(
    cache: EncoderCacheManager, request: Request, first: int, end: int | None
) -> set[int]:
    """Let go of a request's pictures of which its chunk computes nothing.

    Of a picture that is computed, vLLM lets go once the tokens are that a drafter reads behind it, and those may be
    another picture's.

    Args:
        first, end: of the chunk, with what a drafter reads behind it; equal for none. Where ``end`` is None there is
            none either, and pictures that have not begun stay with the request.

    Returns:
        Indices of the others.
    """
    needed = set[int]()
    for index, feature in enumerate(request.mm_features):
        start = feature.mm_position.offset
        stop = start + feature.mm_position.length
        if start >= first if end is None else first < end and start < end and first < stop:
            needed.add(index)
    for index in cache.get_cached_input_ids(request) - needed:
        cache.free_encoder_input(request, index)
    return needed


def _heir(
    output: SchedulerOutput,
    mm_hash: str,
    cache: EncoderCacheManager,
    requests: Mapping[str, Request],
) -> Booking | None:
    """A scheduled request that counts on an output which the preempted one would have computed."""
    for request_id in cache.cached.get(mm_hash, ()):
        if request_id not in output.num_scheduled_tokens:
            continue
        for input_id in cache.get_cached_input_ids(requests[request_id]):
            if requests[request_id].mm_features[input_id].identifier == mm_hash:
                return Booking(request_id, input_id)
    return None


def _forget(mm_hash: str, cache: EncoderCacheManager) -> None:
    """Take a booking back, as if it had never been made."""
    holders = cache.cached.pop(mm_hash, None)
    if holders is None:
        return  # evicted later in the same step
    embeds = cache.num_embeds_by_hash.pop(mm_hash)
    if cache.freeable.pop(mm_hash, None) is None:
        cache.num_freeable_slots += embeds
    cache.num_free_slots += embeds
    cache.freed.append(mm_hash)  # the worker may hold what was evicted and booked anew in one step


def _pictures(
    output: SchedulerOutput, requests: Mapping[str, Request]
) -> dict[str, dict[int, MultiModalFeatureSpec]]:
    """Pictures that the step encodes for requests which the worker got to know before this step.

    Only a preempted request can lack one. Items that are addresses in shared memory are always
    sent, once, since the sender counts who has read them.
    """
    if not output.scheduled_encoder_inputs:
        return {}
    new = {request.req_id for request in output.scheduled_new_reqs}
    found: dict[str, dict[int, MultiModalFeatureSpec]] = {}
    for request_id, inputs in output.scheduled_encoder_inputs.items():
        request = requests[request_id]
        if request_id in new or not request.num_preemptions:
            continue
        features = {index: request.mm_features[index] for index in inputs}
        found[request_id] = {
            index: feature
            for index, feature in features.items()
            if feature.data is not None and "address" not in feature.data
        }
    return found
