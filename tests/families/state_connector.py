"""A KV connector that keeps blocks of prompts as files, and of states those at whose end one was kept.

As vLLM's own for such models, it is told by the scheduler which blocks hold a state that a prefix needs, and loads
while the engine goes on: a state is copied to where the next step wants it before a connector is asked to load.
Named to vLLM by its module and class; knows nothing of the extension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.v1.kv_cache_interface import MambaSpec

Blocks = list[tuple[str, int, int]]
"""Name of a prefix, KV-cache group, id of the block."""


@dataclass
class Orders(KVConnectorMetadata):
    save: Blocks = field(default_factory=list)
    load: dict[str, Blocks] = field(default_factory=dict)
    """Request -> what it waits for."""


class StateConnector(KVConnectorBase_V1, SupportsHMA):
    """Saves behind a step, while the engine waits."""

    flow_packed_blocks = True
    """Has no effect beside states."""
    supports_divergent_local_hybrid_hits = True
    """vLLM may find more blocks than states for it, as for NIXL."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.folder = Path(self._kv_transfer_config.get_from_extra_config("folder", ""))
        self.block_size = vllm_config.cache_config.block_size
        groups = kv_cache_config.kv_cache_groups
        self.names = [group.layer_names for group in groups]
        self.of_states = {
            index
            for index, group in enumerate(groups)
            if isinstance(group.kv_cache_spec, MambaSpec)
        }
        self.known: dict[str, Any] = {}
        """Every request that the scheduler told of."""
        self.orders = Orders()
        self.loaded: list[tuple[str, int]] = []
        """Requests that loaded, and how many tokens."""
        self.received: set[str] = set()

    def _file(self, name: str, group: int) -> Path:
        return self.folder / f"{name}-{group}"

    def _has(self, name: str, groups: Any) -> bool:
        return all(self._file(name, group).exists() for group in groups)

    def on_new_request(self, request: Any) -> None:
        self.known[request.request_id] = request

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        assert request.request_id in self.known
        first = num_computed_tokens // self.block_size
        of_keys = set(range(len(self.names))) - self.of_states
        longest = first
        names = [name.hex() for name in request.block_hashes]
        for index in range(first, (request.num_tokens - 1) // self.block_size):
            if not self._has(names[index], of_keys):
                break
            if self._has(names[index], self.of_states):
                longest = index + 1
        return (longest - first) * self.block_size, longest > first

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert request.request_id in self.known
        if not num_external_tokens:
            return
        held = blocks.get_block_ids()
        # Called with all of its blocks, those found here before.
        end = max(len(ids) for group, ids in enumerate(held) if group not in self.of_states)
        first = end - num_external_tokens // self.block_size
        names = [name.hex() for name in request.block_hashes]
        load: Blocks = []
        for group, ids in enumerate(held):
            wanted = [end - 1] if group in self.of_states else range(first, end)
            load += [(names[index], group, ids[index]) for index in wanted]
        assert all(block for _, _, block in load), "the null block is nobody's"
        self.orders.load[request.request_id] = load
        self.loaded.append((request.request_id, num_external_tokens))

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        orders, self.orders = self.orders, Orders()
        state = scheduler_output.kv_connector_block_state
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            request = self.known[request_id]
            held = state.get_block_ids(request_id)
            whole = (request.num_computed_tokens + tokens) // self.block_size
            for index, name in enumerate(request.block_hashes[:whole]):
                orders.save += [
                    (name.hex(), group, ids[index])
                    for group, ids in enumerate(held)
                    if group not in self.of_states
                ]
        for request_id, offers in state.boundary_state_offloads.items():
            hashes = self.known[request_id].block_hashes
            orders.save += [
                (hashes[tokens // self.block_size - 1].hex(), group, block)
                for group, block, tokens in offers
                if tokens % self.block_size == 0
            ]
        return orders

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert request.request_id in self.known
        return False, None

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.caches = kv_caches

    def _tensors(self, group: int) -> list[torch.Tensor]:
        """Of a group's layers, one after the other; a layer with states has two."""
        found = [self.caches[name] for name in self.names[group]]
        return [part for one in found for part in (one if isinstance(one, list | tuple) else [one])]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for request_id, blocks in self._get_connector_metadata().load.items():
            for name, group, block in blocks:
                stored = torch.load(self._file(name, group))
                for tensor, part in zip(self._tensors(group), stored, strict=True):
                    tensor[block] = part
            self.received.add(request_id)

    def wait_for_save(self) -> None:
        for name, group, block in self._get_connector_metadata().save:
            if not self._file(name, group).exists():
                found = [tensor[block].clone() for tensor in self._tensors(group)]
                torch.save(found, self._file(name, group))

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        received, self.received = self.received, set()
        return None, received or None

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        return
