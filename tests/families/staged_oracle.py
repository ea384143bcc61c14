"""What an answer must be where part of a picture stays: the oracle's forward, whose masks follow its own choice.

As in `oracle`, nothing is changed but the attention mask of transformers' layers: from a stage's layer on, the keys of
the tokens that it does not keep are hidden; where layers keep states, their rows leave. But where what stays takes in
what goes, the embeddings that enter the first layer are changed, too. One picture per prompt; text
may stand between its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from tests.engine import diverse_oracle, kept_oracle, merge_oracle, row_oracle, share_oracle
from tests.families import leaving_rows, oracle, tower_oracle
from tests.families.making import Checkpoint


class Masks:
    """Hides keys layer by layer, and chooses which from the layer before."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompt: oracle.Prompt,
        length: int,
        stages: str,
        frames: int = 1,
    ) -> None:
        self.frames = frames // max(1, checkpoint.seen_together)
        """Of the video, as the model sees it."""
        self.windows, self.local = checkpoint.windows, checkpoint.local
        self.image = prompt.is_image_T.nonzero()[:, 0].tolist()
        self.alive = list(self.image)
        self.last = len(prompt.ids) - 1
        self.stages = kept_oracle.parse(stages)
        self.length = length
        self.embeddings: torch.Tensor | None = None
        self.attention: torch.Tensor | None = None
        self.scores: dict[str, list[float]] = {}
        """Rank of the vision tower -> what each token of the image was given there, where it was looked at."""
        self.rows: tower_oracle.Rows = {}
        self.model = checkpoint.model
        self.projected: list[torch.Tensor] = []
        """Queries and keys of the layer that ran last, heads x T x head size, where they can be seen."""
        self.tables: Any = None
        self.norm: Any = None
        """The model's final one."""
        self.gap = 1.0

    def before(self, layer: int, hidden_1TH: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The mask of a layer, 1 x 1 x T x T."""
        gone = self._gone(layer, hidden_1TH)
        return oracle.without(mask, gone, self.windows.get(layer), self.local.get(layer))

    def project(self, query_HTD: torch.Tensor, key_KTD: torch.Tensor) -> None:
        """Take in what a layer projects."""
        self.projected = [query_HTD, key_KTD]

    def stay(self, layer: int, hidden_1RH: torch.Tensor) -> torch.Tensor | None:
        """The rows alive from a layer on, [R], where they leave the hidden states; None if none leaves there."""
        staged = layer in self.stages
        gone = self._gone(layer, hidden_1RH)
        return (~gone).nonzero()[:, 0] if staged else None

    def _gone(self, layer: int, hidden_1RH: torch.Tensor) -> torch.Tensor:
        """[T] which tokens have left by a layer."""
        if self.embeddings is None:
            self._merge(hidden_1RH[0])
            self.embeddings = hidden_1RH[0].double()
        if layer in self.stages:
            self._choose(layer, *self.stages[layer], hidden_1RH[0])
        gone = torch.zeros(self.length, dtype=torch.bool)
        gone[[p for p in self.image if p not in self.alive]] = True
        return gone

    def _merge(self, hidden_TH: torch.Tensor) -> None:
        """Change the embeddings that enter the decoder, where a rank merges."""
        amount, rank = self.stages.get(0, ("", None))
        if rank not in merge_oracle.IN_TOWER:
            return
        given = self.scores[merge_oracle.SCORED_BY[rank]]
        stay, gap = merge_oracle.chosen(rank, given, kept_oracle.count(amount, len(self.image)))
        features = self.rows.get("features", hidden_TH[self.image]).double().numpy()
        picture = merge_oracle.Picture(features, self.rows["keys"].double().numpy())
        rows, clear = merge_oracle.taken_in(rank, given, picture, stay)
        at, taking = torch.tensor(self.image)[stay], (rows != features[stay]).any(1)
        merged = torch.tensor(rows, dtype=torch.float32)
        if "features" in self.rows:
            merged = self.model.model.multi_modal_projector(merged[None])[0]
        hidden_TH[at[taking]] = merged[taking]
        self.scores[rank] = [float(token in stay) for token in range(len(self.image))]
        self.gap = min(self.gap, gap, clear)

    def _choose(self, layer: int, amount: str, rank: str | None, hidden_RH: torch.Tensor) -> None:
        keep = kept_oracle.count(amount, len(self.image))
        if keep >= len(self.alive):
            return
        assert self.embeddings is not None
        place = {position: position for position in range(self.length)}
        if self.attention is not None and len(self.attention) < self.length:  # of the rows alive
            there = [p for p in range(self.length) if p not in self.image or p in self.alive]
            place = {position: row for row, position in enumerate(there)}
        if rank in row_oracle.RANKS and keep:
            assert self.attention is not None
            query, key = self.projected if self.projected else (hidden_RH, hidden_RH)
            before = row_oracle.LayerBefore(
                range(self.image[-1] + 1, self.last + 1), place, self.embeddings.numpy(), self.attention,
                self.norm(hidden_RH), query, key, self.tables,
            )  # fmt: skip
            self.alive, gap = row_oracle.choose(rank, self.alive, self.image, keep, before)
            self.gap = min(self.gap, gap)
            return
        if rank == "dycoke":
            self._drop_repeated(keep)
            return
        inside = {
            name: dict(zip(self.image, given, strict=True)) for name, given in self.scores.items()
        }
        seen = kept_oracle.Seen(self.embeddings.numpy(), inside)
        scores = kept_oracle.scores_of(
            rank, self.alive, self.image, keep, (0, 0, layer), seen,
            self.attention, place, self.last,
        )  # fmt: skip
        if rank == "diversity":
            there = {self.image.index(position) for position in self.alive}
            if not diverse_oracle.settled(seen.embeddings[self.image], there, keep):
                self.gap = 0.0
        if (
            rank in share_oracle.RANKS
            and not seen.shared_out(rank, self.image, self.alive, keep)[1]
        ):
            self.gap = 0.0
        order = sorted(range(len(scores)), key=lambda at: -scores[at])
        if keep and rank in ("last_image", "last_prompt", *kept_oracle.IN_TOWER):
            last, first = scores[order[keep - 1]], scores[order[keep]]
            self.gap = min(self.gap, (last - first) / last)
        self.alive = sorted(self.alive[at] for at in order[:keep])

    def _drop_repeated(self, keep: int) -> None:
        """Of what is left of a video, as many tokens as stay, in the order for all of it."""
        assert self.embeddings is not None
        each = len(self.image) // self.frames
        frames = [at // each if at < each * self.frames else -1 for at in range(len(self.image))]
        left = {self.image.index(position) for position in self.alive}

        def stay(rows: Any) -> list[int]:
            order = share_oracle.dycoke(rows, frames, len(frames))
            return [token for token in order if token in left][:keep]

        found, clear = share_oracle.settled(stay, self.embeddings[self.image].numpy())
        self.gap = min(self.gap, float(clear))
        self.alive = [self.image[token] for token in found]


@contextmanager
def _hooked(layers: Sequence[Any], masks: Masks, mask: bool) -> Iterator[None]:
    """Have the masks see what they choose by.

    Args:
        mask: whether they hide keys, too.
    """

    def hide(index: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"]
            assert mask.dtype == torch.float32 and mask.dim() == 4, "attention must be eager"
            hidden = args[0] if args else kwargs["hidden_states"]
            masks.tables = kwargs.get("position_embeddings")
            return args, {**kwargs, "attention_mask": masks.before(index, hidden, mask)}

        return hook

    def note(_module: Any, _args: Any, result: Any) -> None:
        masks.attention = result[1][0].mean(0)

    hooks = [
        layer.register_forward_pre_hook(hide(index), with_kwargs=True)
        for index, layer in enumerate(layers)
        if mask
    ]
    attending = [found for layer in layers if (found := _attention(layer)) is not None]
    hooks += [attention.register_forward_hook(note) for attention in attending]
    for attention in attending:
        if hasattr(attention, "q_proj") and hasattr(attention, "head_dim"):
            hooks += row_oracle.noted(attention, masks.project)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _attention(layer: Any) -> Any:
    """A layer's attention, None where it has none; Nemotron-H's layers are one part each."""
    if hasattr(layer, "mixer"):
        return layer.mixer if layer.block_type == "full_attention" else None
    return getattr(layer, "self_attn", None)


@torch.inference_mode()
def logprobs(
    checkpoint: Checkpoint,
    prompt: oracle.Prompt,
    answer: Sequence[int],
    stages: str,
    frames: int = 1,
) -> tuple[torch.Tensor, float]:
    """As :func:`tests.families.oracle.logprobs`; and the smallest gap between scores, see `kept_oracle`.

    Args:
        frames: of the video asked about.
    """
    decoder = checkpoint.decoder(checkpoint.model)
    masks = Masks(checkpoint, prompt, len(prompt.ids) + len(answer), stages, frames)
    masks.norm = getattr(decoder, "norm", lambda hidden: hidden)  # without one, nobody asks
    recurrent = checkpoint.recurrent
    rows = leaving_rows.leaving(decoder, masks.stay) if recurrent else nullcontext()
    tower = (*kept_oracle.IN_TOWER, *merge_oracle.IN_TOWER, *share_oracle.RANKS)
    looks = any(rank in stages for rank in tower)
    inside: Any = nullcontext()
    if looks:
        inside = tower_oracle.looked_into(checkpoint.model, masks.scores, masks.rows)
    with _hooked(decoder.layers, masks, mask=not recurrent), rows, inside:
        logits = oracle.forward(checkpoint, prompt, answer)
    return logits[len(prompt.ids) - 1 :].log_softmax(-1), masks.gap
