"""A KV connector that hands whole prompts from one engine to another as files: prefill here, decode there.

Like vLLM's own for this, it pairs blocks by storage group and place. Named to vLLM by its module and class; knows
nothing of the extension but what it says of itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

BlocksOf = dict[str, tuple[list[int], ...]]
"""Request -> ids of its blocks, by storage group."""


@dataclass
class Orders(KVConnectorMetadata):
    send: BlocksOf = field(default_factory=dict)
    receive: dict[str, tuple[str, tuple[list[int], ...]]] = field(default_factory=dict)
    """Request -> whose file, and the blocks to fill."""


class HandingConnector(KVConnectorBase_V1, SupportsHMA):
    """Sends when a prompt is computed; receives while the engine goes on, or (``wait``) before a step."""

    flow_packed_blocks = True

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = self._kv_transfer_config.get_from_extra_config
        self.folder, self.wait = Path(extra("folder", "")), extra("wait", False)
        self.groups = [group.layer_names for group in kv_cache_config.kv_cache_groups]
        self.sending: dict[str, Any] = {}
        self.orders = Orders()
        self.received: set[str] = set()
        self.bytes: dict[str, int] = {}
        """Of each request that was sent."""
        self.given: dict[str, tuple[int, ...]] = {}
        """Blocks of each request that was received, by storage group."""
        self.computed: Counter[str] = Counter()
        """Tokens of each request that steps computed."""

    def on_new_request(self, request: Any) -> None:
        if (request.kv_transfer_params or {}).get("do_remote_decode"):
            self.sending[request.request_id] = request

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if not (request.kv_transfer_params or {}).get("do_remote_prefill"):
            return 0, False
        last = 1 if self.wait else 0  # computed anew for its logits, which vLLM sees to otherwise
        return request.num_prompt_tokens - last - num_computed_tokens, not self.wait

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            source = request.kv_transfer_params["remote_request_id"]
            request.kv_transfer_params = None  # once
            held = blocks.get_block_ids()
            self.orders.receive[request.request_id] = (source, held)
            self.given[request.request_id] = tuple(map(len, held))

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        orders, self.orders = self.orders, Orders()
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            self.computed[request_id] += tokens
            request = self.sending.get(request_id)
            if request and request.num_computed_tokens + tokens >= request.num_prompt_tokens:
                state = scheduler_output.kv_connector_block_state
                orders.send[request_id] = state.get_block_ids(request_id)
                del self.sending[request_id]
        return orders

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if not (request.kv_transfer_params or {}).get("do_remote_decode"):
            return False, None
        return False, {"do_remote_prefill": True, "remote_request_id": request.request_id}

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.caches = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for request_id, (source, held) in self._get_connector_metadata().receive.items():
            stored = torch.load(self.folder / source)
            for layers, ids in zip(self.groups, held, strict=True):
                for layer in layers:
                    count = min(len(ids), len(stored[layer]))
                    self.caches[layer][ids[:count]] = stored[layer][:count]
            self.received.add(request_id)

    def wait_for_save(self) -> None:
        for request_id, held in self._get_connector_metadata().send.items():
            found = {
                layer: self.caches[layer][ids]
                for layers, ids in zip(self.groups, held, strict=True)
                for layer in layers
            }
            torch.save(found, self.folder / request_id)
            self.bytes[request_id] = sum(rows.nbytes for rows in found.values())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        received, self.received = self.received, set()
        return None, None if self.wait else received

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        return
