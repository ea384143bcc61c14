"""The layouts of the requests that a process knows of: the scheduler's, and each worker's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_flow.engine.requests import token_layout
from vllm_flow.layout import TokenLayout
from vllm_flow.spans import Range

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.sampling_params import SamplingParams

    from vllm_flow.engine.mutual_attention import RangesOf


class LayoutBook:
    """The layouts of the requests a process knows of; requests that evict nothing are not in it.

    Args:
        num_layers: of the decoder.
        mutual_of: what reads off a request which ranges of its prompt see one another, see
            ``mutual_attention.py``; None where a model has none.
    """

    def __init__(self, num_layers: int, mutual_of: RangesOf | None = None) -> None:
        self.num_layers = num_layers
        self.mutual: dict[str, tuple[Range, ...]] = {}
        """Mutual ranges, of all requests that have some: those that evict share steps with the others."""
        self._mutual_of = mutual_of
        self.layouts: dict[str, TokenLayout] = {}

    def add(
        self,
        request_id: str,
        params: SamplingParams | None,
        features: Iterable[MultiModalFeatureSpec],
        prompt_tokens: int,
    ) -> TokenLayout | None:
        """Read a request's layout and keep it until :meth:`remove`; None if it evicts nothing."""
        features = list(features)
        if self._mutual_of is not None and (mutual := self._mutual_of(features)):
            self.mutual[request_id] = mutual
        layout = token_layout(params, features, self.num_layers, prompt_tokens)
        if layout is not None:
            self.layouts[request_id] = layout
        return layout

    def may_lose_rows(self, request_id: str, computed: int) -> bool:
        """Whether tokens of a request behind the ``computed`` first ones are a picture's that leaves."""
        layout = self.layouts.get(request_id)
        return layout is not None and computed < layout.spans.end

    def remove(self, request_id: str) -> None:
        self.layouts.pop(request_id, None)
        self.mutual.pop(request_id, None)
