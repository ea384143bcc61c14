"""A KV connector that keeps whole blocks of prompts as files: the smallest one that supports several groups.

Named to vLLM by its module and class; knows nothing of the extension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

Blocks = list[tuple[str, list[int]]]
"""Per block of tokens a file's name and, per group, the id of the block."""


@dataclass
class Orders(KVConnectorMetadata):
    load: Blocks = field(default_factory=list)
    save: Blocks = field(default_factory=list)


class FileConnector(KVConnectorBase_V1, SupportsHMA):
    """Loads before a step and saves after it, both while the engine waits."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.folder = Path(self._kv_transfer_config.get_from_extra_config("folder", ""))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.block_size = vllm_config.cache_config.block_size
        self.groups = [group.layer_names for group in kv_cache_config.kv_cache_groups]
        self.known: dict[str, Any] = {}
        """Every request that the scheduler told of."""
        self.loads: Blocks = []
        self.loaded = 0

    def _file(self, name: str) -> Path:
        return self.folder / name

    def on_new_request(self, request: Any) -> None:
        self.known[request.request_id] = request

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        assert request.request_id in self.known
        first = last = num_computed_tokens // self.block_size
        limit = (request.num_tokens - 1) // self.block_size
        hashes = request.block_hashes[:limit]
        while last < len(hashes) and self._file(hashes[last].hex()).exists():
            last += 1
        return (last - first) * self.block_size, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert request.request_id in self.known
        if not num_external_tokens:
            return
        held = blocks.get_block_ids()
        whole = range(len(request.block_hashes))
        for index in whole[: (request.num_tokens - 1) // self.block_size]:
            name = request.block_hashes[index].hex()
            if self._file(name).exists():
                self.loads.append((name, [ids[index] for ids in held]))

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        orders = Orders(load=self.loads)
        self.loads = []
        self.loaded += len(orders.load)
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            request = self.known[request_id]
            held = scheduler_output.kv_connector_block_state.get_block_ids(request_id)
            whole = (request.num_computed_tokens + tokens) // self.block_size
            for index, name in enumerate(request.block_hashes[:whole]):
                if not self._file(name.hex()).exists():
                    orders.save.append((name.hex(), [ids[index] for ids in held]))
        return orders

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert request.request_id in self.known
        return False, None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.caches = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for name, ids in self._get_connector_metadata().load:
            stored = torch.load(self._file(name))
            for layers, block in zip(self.groups, ids, strict=True):
                for layer in layers:
                    self.caches[layer][block] = stored[layer]

    def wait_for_save(self) -> None:
        for name, ids in self._get_connector_metadata().save:
            found = {
                layer: self.caches[layer][block].clone()
                for layers, block in zip(self.groups, ids, strict=True)
                for layer in layers
            }
            torch.save(found, self._file(name))

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        return
