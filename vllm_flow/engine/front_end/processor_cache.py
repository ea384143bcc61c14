"""The front end's half of vLLM's cache of processed pictures, which changes only when a request is sent.

vLLM keeps processed pictures in the engine, and in the front end a list of what it expects to be there,
updated as a prompt is rendered. A request that is refused or abandoned after that never reaches the
engine, or reaches it in another order; the two then disagree, and whoever sends one of the pictures
next is answered with an error. Here rendering only reads. The list is updated where a request is
handed to the engine, by the engine's own rules, so that both halves see the same requests in the same
order, and what is refused leaves nothing behind.

For that, the front end keeps the pictures themselves and not only their sizes: one that the engine
evicts between rendering and sending goes out with the request.

Seams: ``vllm.multimodal.cache`` (``patches/renderer.py`` puts this one in the place of vLLM's) and
``EngineCoreClient`` (``patches/core_client.py`` has each request pass through :meth:`SentPictures.send`).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cachetools
from vllm.multimodal.cache import (
    BaseMultiModalProcessorCache,
    LruKeyReplicatedReceiverCache,
    LruKeyReplicatedSenderCache,
    MultiModalCacheMissError,
    MultiModalProcessorOnlyCache,
)
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem
from vllm.utils.cache import CacheInfo


def in_place_of(cache: Any, model_config: Any) -> Any:
    """The cache that the front end uses where vLLM would use ``cache``.

    The one in shared memory stays: its content is the same for both sides by construction.
    """
    if type(cache) is LruKeyReplicatedSenderCache:
        return SentPictures(model_config, engine_keeps=True)
    if type(cache) is MultiModalProcessorOnlyCache:
        return SentPictures(model_config, engine_keeps=False)
    return cache


class SentPictures(BaseMultiModalProcessorCache):
    """Processed pictures of the requests that were sent, the least recently sent evicted first.

    Args:
        engine_keeps: whether the engine has the other half. If not (several servers before one
            engine, or several engines), pictures go out with every request.
    """

    def __init__(self, model_config: Any, *, engine_keeps: bool) -> None:
        super().__init__()
        self.engine_keeps = engine_keeps
        # The engine's own class and capacity: what it evicts is evicted here.
        self.held = LruKeyReplicatedReceiverCache(model_config)
        # Rendered for a request that is still on its way: others with the same picture need not
        # process it again. Gone with the request, sent or not.
        self._unsent: weakref.WeakValueDictionary[str, MultiModalKwargsItem] = (
            weakref.WeakValueDictionary()
        )
        # How an item changes the prompt, by the item's id, for as long as the item lives. Not on the
        # item, which an engine in this process would send to its workers.
        self._updates: dict[int, Any] = {}
        # Prompts are rendered in threads of their own, requests are sent from the event loop.
        self._lock = threading.RLock()
        self._promised = threading.local()
        self._hits = self._total = 0
        self._reported = CacheInfo(hits=0, total=0)

    def send(self, features: Sequence[MultiModalFeatureSpec]) -> list[MultiModalFeatureSpec]:
        """What goes to the engine, and the change that receiving it means for the engine's half.

        Returns:
            The same features, without data where the engine holds that very item.
        """
        with self._lock:
            for feature in features:
                self.held.touch_receiver_cache_item(_key(feature))
            sent = [self._send_one(feature) for feature in features]
        return sent if self.engine_keeps else list(features)

    def _send_one(self, feature: MultiModalFeatureSpec) -> MultiModalFeatureSpec:
        item = None if self._peek(_key(feature)) is feature.data else feature.data
        # Missed is a client's feature without data, which the engine will not find either.
        with contextlib.suppress(MultiModalCacheMissError):
            self.held.get_and_update_item(item, _key(feature))
        return replace(feature, data=item)

    def _peek(self, mm_hash: str) -> MultiModalKwargsItem | None:
        """The item in the engine's half, without making it the most recent."""
        try:
            return cachetools.Cache.__getitem__(self.held._cache, mm_hash)
        except KeyError:
            return None

    def _find(self, mm_hash: str) -> MultiModalKwargsItem | None:
        """An item that rendering can use: what clients send processed says nothing of the prompt."""
        with self._lock:
            for item in (self._peek(mm_hash), self._unsent.get(mm_hash)):
                if item is not None and self._updates.get(id(item)):
                    return item
        return None

    def is_cached_item(self, mm_hash: str) -> bool:
        item = self._find(mm_hash)
        # A rendering that failed in this thread kept none of its promises.
        self._promises().pop(mm_hash, None)
        if item is not None:
            # vLLM processes only what is missing and then comes back for this one, which another
            # request may have evicted meanwhile.
            self._promises()[mm_hash] = item
        return item is not None

    def get_and_update_item(self, mm_item: Any, mm_hash: str) -> Any:
        self._total += 1
        known = self._promises().get(mm_hash)
        if known is None and mm_item is None:
            known = self._find(mm_hash)
        if known is not None:
            self._hits += 1
            return known, self._updates[id(known)]
        assert mm_item is not None, f"Expected a cached item for {mm_hash=}"
        item, updates = mm_item
        with self._lock:
            self._updates[id(item)] = updates
            weakref.finalize(item, self._updates.pop, id(item), None).atexit = False
            self._unsent[mm_hash] = item
        return item, updates

    def touch_sender_cache_item(self, mm_hash: str) -> None:
        """Nothing: rendering changes no order."""

    def release_sender_touches(self) -> None:
        self._promises().clear()

    def _promises(self) -> dict[str, MultiModalKwargsItem]:
        found: dict[str, MultiModalKwargsItem] = self._promised.__dict__.setdefault("items", {})
        return found

    def invalidate(self, mm_hash: str) -> None:
        with self._lock:
            self.held._cache.pop(mm_hash, None)
            self._unsent.pop(mm_hash, None)

    def clear_cache(self) -> None:
        with self._lock:
            self.held.clear_cache()
            self._unsent.clear()
        self._hits = self._total = 0
        self._reported = CacheInfo(hits=0, total=0)

    def make_stats(self, *, delta: bool = False) -> CacheInfo:
        info = CacheInfo(hits=self._hits, total=self._total)
        if not delta:
            return info
        grown = info - self._reported
        self._reported = info
        return grown


def _key(feature: MultiModalFeatureSpec) -> str:
    return feature.mm_hash or feature.identifier


def pass_through(client: Any, renderer: Any) -> None:
    """Have every request that ``client`` sends pass through the renderer's cache.

    Args:
        client: vLLM's ``EngineCoreClient`` of any kind.
    """
    cache = getattr(renderer, "mm_processor_cache", None)
    if not isinstance(cache, SentPictures) or hasattr(client, "flow_pictures"):
        return
    client.flow_pictures = cache
    reference = weakref.ref(client)  # the client is to be freed as soon as it is dropped

    def through(method: Any) -> Any:
        def add_request(request: Any) -> Any:
            client = reference()
            if request.mm_features:
                _check_can_be_sent(client, request)
                # A list of its own: the n answers to one request share theirs.
                request.mm_features = cache.send(request.mm_features)
            return method(client, request)

        return add_request

    for name in ("add_request", "add_request_async"):
        setattr(client, name, through(getattr(type(client), name)))


def _check_can_be_sent(client: Any, request: Any) -> None:
    """Raise now what sending would raise: a request that cannot be encoded reaches no engine.

    Clients bring that about, with an integer of 70 bits or half a surrogate pair in a field that vLLM
    does not look at.
    """
    encoder = getattr(client, "encoder", None)
    if encoder is None:  # the engine is in this process
        return
    features, request.mm_features = request.mm_features, None
    try:
        encoder.encode(request)
    finally:
        request.mm_features = features
