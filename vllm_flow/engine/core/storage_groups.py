"""The storage groups of an engine, as the parts of a scheduler share them.

The scheduler, vLLM's KV-cache manager and its coordinator read one such object; requests come and go in the live
mapping of layouts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_flow.engine import adoption
from vllm_flow.engine.core.findable import FindableBlocks
from vllm_flow.engine.core.state_blocks import FlowStateManager
from vllm_flow.engine.core.storage import FlowAttentionManager
from vllm_flow.engine.states import is_state
from vllm_flow.layout import TokenLayout


@dataclass(frozen=True)
class StorageGroups:
    """The managers of an engine's storage groups, and whose tokens they store how."""

    layouts: Mapping[str, TokenLayout]
    """By id of the request, live; none of a request that evicts nothing."""
    managers: Sequence[FlowAttentionManager]
    """The shallowest group first."""
    states: Sequence[FlowStateManager] = ()
    """Of groups of states, which linear attention has."""
    drafts: bool = False
    """Whether the engine drafts."""
    in_flight: set[BlockHash] = field(default_factory=set)
    """Prefixes of requests with a layout that the step being scheduled computes; found from the next step on."""

    @classmethod
    def of(
        cls, managers: Collection[Any], layouts: Mapping[str, TokenLayout], drafts: bool
    ) -> StorageGroups:
        """Those of all KV-cache groups' managers, which must be ours; vLLM's of states become ours.

        A drafter's own group, though before all others, is vLLM's last.

        Raises:
            RuntimeError: vLLM, which would silently fold groups it thinks equal, built other managers.
        """
        states = [manager for manager in managers if is_state(manager.kv_cache_spec)]
        ours = [manager for manager in managers if manager not in states]
        if not all(isinstance(manager, FlowAttentionManager) for manager in ours):
            kinds = sorted({type(manager).__name__ for manager in ours})
            raise RuntimeError(
                f"vLLM built the KV-cache managers {kinds} instead of storage groups; "
                "please report this with your vLLM version."
            )
        for manager in states:
            adoption.adopt(manager, FlowStateManager)
        for manager in ours:
            manager.use_layouts(layouts)
        ours.sort(key=lambda manager: manager.spec.first_layer)
        return cls(layouts, ours, states, drafts)

    @property
    def block_size(self) -> int:
        """Tokens of a block, in every group."""
        return self.managers[0].block_size

    @property
    def every(self) -> tuple[FlowAttentionManager | FlowStateManager, ...]:
        """Managers of storage groups, then of states."""
        return (*self.managers, *self.states)

    @cached_property
    def findable(self) -> Sequence[FindableBlocks]:
        """Per storage group, what of it can be found."""
        return [manager.findable for manager in self.managers]
