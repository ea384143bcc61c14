"""What an answer must be where part of a picture stays: the oracle's forward, whose masks follow its own choice.

As in `oracle`, nothing is changed but the attention mask of transformers' layers: from a stage's layer on, the keys of
the tokens that it does not keep are hidden. One picture per prompt; text may stand between its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tests.engine import kept_oracle
from tests.families import oracle
from tests.families.making import Checkpoint


class Masks:
    """Hides keys layer by layer, and chooses which from the layer before."""

    def __init__(
        self, prompt: oracle.Prompt, length: int, stages: str, windows: Mapping[int, int]
    ) -> None:
        self.windows = windows
        self.image = prompt.is_image_T.nonzero()[:, 0].tolist()
        self.alive = list(self.image)
        self.last = len(prompt.ids) - 1
        self.stages = kept_oracle.parse(stages)
        self.length = length
        self.embeddings: torch.Tensor | None = None
        self.attention: torch.Tensor | None = None
        self.gap = 1.0

    def before(self, layer: int, hidden_1TH: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The mask of a layer, 1 x 1 x T x T."""
        if self.embeddings is None:
            self.embeddings = hidden_1TH[0].double()
        if layer in self.stages:
            self._choose(layer, *self.stages[layer])
        gone = torch.zeros(self.length, dtype=torch.bool)
        gone[[p for p in self.image if p not in self.alive]] = True
        return oracle.without(mask, gone, self.windows.get(layer))

    def _choose(self, layer: int, amount: str, rank: str | None) -> None:
        keep = kept_oracle.count(amount, len(self.image))
        if keep >= len(self.alive):
            return
        assert self.embeddings is not None
        place = {position: position for position in range(self.length)}
        scores = kept_oracle.scores_of(
            rank, self.alive, self.image, keep, (0, 0, layer), self.embeddings.numpy(),
            self.attention, place, self.last,
        )  # fmt: skip
        order = sorted(range(len(scores)), key=lambda at: -scores[at])
        if keep and rank in ("last_image", "last_prompt"):
            last, first = scores[order[keep - 1]], scores[order[keep]]
            self.gap = min(self.gap, (last - first) / last)
        self.alive = sorted(self.alive[at] for at in order[:keep])


@contextmanager
def _hooked(layers: Sequence[Any], masks: Masks) -> Iterator[None]:
    def hide(index: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"]
            assert mask.dtype == torch.float32 and mask.dim() == 4, "attention must be eager"
            hidden = args[0] if args else kwargs["hidden_states"]
            return args, {**kwargs, "attention_mask": masks.before(index, hidden, mask)}

        return hook

    def note(_module: Any, _args: Any, result: Any) -> None:
        masks.attention = result[1][0].mean(0)

    hooks = [
        layer.register_forward_pre_hook(hide(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    hooks += [layer.self_attn.register_forward_hook(note) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def logprobs(
    checkpoint: Checkpoint, prompt: oracle.Prompt, answer: Sequence[int], stages: str
) -> tuple[torch.Tensor, float]:
    """As :func:`tests.families.oracle.logprobs`; and the smallest gap between scores, see `kept_oracle`."""
    decoder = checkpoint.decoder(checkpoint.model)
    masks = Masks(prompt, len(prompt.ids) + len(answer), stages, checkpoint.windows)
    with _hooked(decoder.layers, masks):
        logits = oracle.forward(checkpoint, prompt, answer)
    return logits[len(prompt.ids) - 1 :].log_softmax(-1), masks.gap
