"""What the engine must produce where some image tokens stay: the oracle's forward, choosing by its own arithmetic.

Float32, Hugging Face's modules, no cache; knows nothing of vLLM or the extension. A policy is the text of its stages,
such as ``2:50% uniform, 4:0``, for all images or image by image. Shapes as in `oracle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.engine import (
    attention_oracle,
    diverse_oracle,
    merge_oracle,
    oracle,
    row_oracle,
    share_oracle,
)
from tests.engine.oracle import Model, OracleOutput, Prompt

Stages = dict[int, tuple[str, str | None]]
"""Layer -> how much stays, and by which rank."""
IN_TOWER = ("cls_attention", "received_attention")


@dataclass(frozen=True)
class Kept:
    """Next-token logits, and what the choice of tokens was like."""

    logits: torch.Tensor
    """Rows left after the last layer x V."""
    chosen: dict[int, list[list[int]]]
    """Layer of a stage -> per image the positions that stay."""
    gap: float
    """The smallest relative distance between a score that stays and one that goes; 1 where nothing is scored."""


@dataclass(frozen=True)
class Seen:
    """What ranks of the picture go by."""

    embeddings: np.ndarray
    """T x D, as they enter the decoder."""
    scores: dict[str, dict[int, float]]
    """Rank of the tower -> position of an image token -> what it was given there."""
    early: dict[int, float] = field(default_factory=dict)
    """Position of an image token -> what the class token gives it in the tower's first layer."""
    tiles: dict[int, int] = field(default_factory=dict)
    """Position of an image token -> its tile."""

    @classmethod
    def of(cls, model: Model, prompt: Prompt, hidden_TD: torch.Tensor) -> Seen:
        at = torch.tensor(prompt.is_image_T).nonzero()[:, 0].tolist()
        scores = {}
        for rank in IN_TOWER:
            images = oracle.tower_attention(model, prompt, received=rank == IN_TOWER[1])
            given = [s for image in images for s in image.tolist()]
            scores[rank] = dict(zip(at, given, strict=True))
        early = [
            s for image in oracle.tower_attention(model, prompt, False, 0) for s in image.tolist()
        ]
        tokens = (
            model.config.vision_config.image_size // model.config.vision_config.patch_size
        ) ** 2
        tiles = [tile for image in oracle.tower_tiles(model, prompt, tokens) for tile in image]
        return cls(
            hidden_TD.double().numpy().copy(),
            scores,
            dict(zip(at, early, strict=True)),
            dict(zip(at, tiles, strict=True)),
        )

    def shared_out(
        self, rank: str, image: list[int], alive: list[int], keep: int
    ) -> tuple[list[int], bool]:
        """The positions that stay by such a rank, and whether that is clear."""
        given = self.scores[IN_TOWER[rank == "holov_received"]]
        stay, clear = share_oracle.chosen(
            rank,
            [given[position] for position in image],
            [self.early.get(position, 0.0) for position in image],
            [self.tiles.get(position, 0) for position in image],
            self.embeddings[image],
            [image.index(position) for position in alive],
            keep,
        )
        return [image[token] for token in stay], clear


def parse(text: str) -> Stages:
    """Stages as a request writes them."""
    found: Stages = {}
    for part in filter(str.strip, text.split(",")):
        layer, rest = part.strip().split(":")
        amount, *rank = rest.split()
        found[int(layer)] = (amount, rank[0] if rank else None)
    return found


def count(amount: str, total: int) -> int:
    """Tokens of ``total``: a number, a percentage or a fraction, rounded down."""
    if amount.endswith("%"):
        return int(Fraction(amount[:-1]) * total / 100)
    return int(Fraction(amount) * total) if "/" in amount else min(int(amount), total)


@torch.inference_mode()
def forward_kept(
    model_dir: Path,
    prompt: Prompt,
    output: Sequence[int],
    stages: str | Sequence[str],
    seed: int = 0,
) -> Kept:
    """The forward in which image rows leave stage by stage."""
    model, _ = oracle.load(model_dir)
    decoder = model.model.language_model
    hidden = oracle.embed(model, prompt, output)
    seen = Seen.of(model, prompt, hidden[0])
    position_T = torch.arange(hidden.shape[1])
    images = _images(model, prompt)
    own = [parse(stages if isinstance(stages, str) else stages[n]) for n in range(len(images))]
    alive = [list(image) for image in images]
    chosen: dict[int, list[list[int]]] = {}
    gaps = [1.0, *_merge(model, prompt, own, images, seen, hidden[0])]
    with (
        attention_oracle.attention_weights(model) as weights,
        row_oracle.projections(model) as made,
    ):
        for index, layer in enumerate(decoder.layers):
            if any(index in policy for policy in own):
                place = {int(p): row for row, p in enumerate(position_T)}
                attention_RR = weights[-1].mean(0) if weights else None
                before = None
                if attention_RR is not None:
                    question = range(max(map(max, images)) + 1, len(prompt.ids)) if images else []
                    tables = decoder.rotary_emb(hidden, position_T[None])
                    before = row_oracle.LayerBefore(
                        question, place, seen.embeddings, attention_RR, decoder.norm(hidden)[0], *made[-1], tables
                    )  # fmt: skip
                gaps += _choose(
                    index, own, images, alive, seed, seen, attention_RR, place, len(prompt.ids) - 1, before
                )  # fmt: skip
                chosen[index] = [list(image) for image in alive]
                gone = _gone(images, alive)
                left = torch.tensor([int(p) not in gone for p in position_T])
                hidden, position_T = hidden[:, left], position_T[left]
            hidden = layer(
                hidden,
                attention_mask=oracle.causal(hidden.shape[1]),
                position_ids=position_T[None],
                position_embeddings=decoder.rotary_emb(hidden, position_T[None]),
            )
    return Kept(model.lm_head(decoder.norm(hidden))[0], chosen, float(min(gaps)))


@torch.inference_mode()
def forward_late(
    model_dir: Path,
    prompt: Prompt,
    output: Sequence[int],
    stages: str | Sequence[str],
    seed: int = 0,
) -> Kept:
    """The forward in which the prompt sees everything, and what follows it not the keys that left.

    Formulated by masks: no row ever leaves. Logits are those of all rows.
    """
    model, _ = oracle.load(model_dir)
    decoder = model.model.language_model
    hidden = oracle.embed(model, prompt, output)
    seen = Seen.of(model, prompt, hidden[0])
    tokens, answer = hidden.shape[1], len(prompt.ids)
    position_T = torch.arange(tokens)
    images = _images(model, prompt)
    own = [parse(stages if isinstance(stages, str) else stages[n]) for n in range(len(images))]
    alive = [list(image) for image in images]
    chosen: dict[int, list[list[int]]] = {}
    gaps = [1.0]
    place = {position: position for position in range(tokens)}
    with attention_oracle.attention_weights(model) as weights:
        for index, layer in enumerate(decoder.layers):
            if any(index in policy for policy in own):
                attention_TT = weights[-1].mean(0) if weights else None
                gaps += _choose(
                    index, own, images, alive, seed, seen, attention_TT, place, answer - 1
                )
                chosen[index] = [list(image) for image in alive]
            mask = oracle.causal(tokens)
            mask[..., answer:, sorted(_gone(images, alive))] = oracle.HIDDEN
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_T[None],
                position_embeddings=decoder.rotary_emb(hidden, position_T[None]),
            )
    return Kept(model.lm_head(decoder.norm(hidden))[0], chosen, float(min(gaps)))


def attention_late(
    model_dir: Path, prompt: Prompt, output: Sequence[int], stages: str | Sequence[str]
) -> torch.Tensor:
    """Attention L x T x T averaged over heads, as :func:`forward_late` computes it."""
    with attention_oracle.attention_weights(oracle.load(model_dir)[0]) as weights:
        forward_late(model_dir, prompt, output, stages)
    return torch.stack([weight.mean(0) for weight in weights])


def _merge(
    model: Model,
    prompt: Prompt,
    own: list[Stages],
    images: list[list[int]],
    seen: Seen,
    hidden_TD: torch.Tensor,
) -> list[float]:
    """Let what stays of images take in what goes, in the embeddings and in what later ranks see of them; gaps."""
    gaps = []
    for n, image in enumerate(images):
        amount, rank = own[n].get(0, ("", None))
        if rank not in merge_oracle.SCORED_BY or count(amount, len(image)) >= len(image):
            continue
        keep, like = count(amount, len(image)), merge_oracle.SCORED_BY[rank]
        if rank in merge_oracle.IN_TOWER:
            scores = [seen.scores[like][position] for position in image]
        else:
            scores = scores_of(like, image, image, keep, (0, n, 0), seen, None, {}, 0)
        stay, gap = merge_oracle.chosen(rank, scores, keep)
        gaps.append(gap)
        at = [image[token] for token in stay]
        if rank in merge_oracle.IN_TOWER:
            picture = merge_oracle.pictures(model, prompt)[n]
            rows, gap = merge_oracle.taken_in(rank, scores, picture, stay)
            gaps.append(gap)
            taking = (rows != picture.features[stay]).any(1)
            hidden_TD[torch.tensor(at)[torch.tensor(taking)]] = merge_oracle.projected(
                model, rows[taking]
            )
        else:
            rows = merge_oracle.blurred(seen.embeddings[image], stay)
            hidden_TD[at] = torch.tensor(rows, dtype=hidden_TD.dtype)
        seen.embeddings[at] = hidden_TD[at].double().numpy()
        seen.scores.setdefault(rank, {}).update({p: float(p in at) for p in image})
    return gaps


def _gone(images: list[list[int]], alive: list[list[int]]) -> set[int]:
    return {p for image in images for p in image} - {p for image in alive for p in image}


def _choose(
    index: int,
    own: list[Stages],
    images: list[list[int]],
    alive: list[list[int]],
    seed: int,
    seen: Seen,
    attention_RR: torch.Tensor | None,
    place: dict[int, int],
    last_of_prompt: int,
    before: row_oracle.LayerBefore | None = None,
) -> list[float]:
    """Let tokens of each image that has a stage at layer ``index`` leave ``alive``; the gaps of the choices."""
    gaps = []
    for n, policy in enumerate(own):
        if index not in policy:
            continue
        amount, rank = policy[index]
        keep = count(amount, len(images[n]))
        if keep < len(alive[n]) and rank in row_oracle.RANKS:
            assert before is not None, f"{rank} ranks by the layer before"
            alive[n], gap = row_oracle.choose(rank, alive[n], images[n], keep, before)
            gaps.append(gap)
        elif keep < len(alive[n]):
            scores = scores_of(
                rank, alive[n], images[n], keep, (seed, n, index), seen,
                attention_RR, place, last_of_prompt,
            )  # fmt: skip
            order = sorted(range(len(scores)), key=lambda at: -scores[at])
            if rank in share_oracle.RANKS:
                gaps.append(float(seen.shared_out(rank, images[n], alive[n], keep)[1]))
            if keep > 0 and rank in ("last_image", "last_prompt", "far_from_mean", *IN_TOWER):
                last, first = scores[order[keep - 1]], scores[order[keep]]
                gaps.append((last - first) / last if np.isfinite(last) else 1.0)
            alive[n] = sorted(alive[n][at] for at in order[:keep])
    return gaps


def scores_of(
    rank: str | None,
    alive: list[int],
    image: list[int],
    keep: int,
    draw: tuple[int, int, int],
    seen: Seen,
    attention_RR: torch.Tensor | None,
    place: dict[int, int],
    last_of_prompt: int,
) -> list[float]:
    """A score per token that is left; the highest stay."""
    total = len(alive)
    if rank is None:
        return [0.0] * total
    if rank == "uniform":
        picked = {(2 * i + 1) * total // (2 * keep) for i in range(keep)}
        return [float(at in picked) for at in range(total)]
    if rank == "random":
        drawn = set(np.random.RandomState(list(draw)).permutation(total)[:keep].tolist())
        return [float(at in drawn) for at in range(total)]
    if rank == "diversity":
        order = diverse_oracle.farthest_first(seen.embeddings[image])
        return [-float(order.index(image.index(position))) for position in alive]
    if rank == "center":  # of tests/plugins, as the next one
        first = total // 2 - keep // 2 - (total % 2 < keep % 2)
        return [float(first <= at < first + keep) for at in range(total)]
    if rank == "far_from_mean":
        rows = seen.embeddings[image]
        apart = np.sqrt(((rows - rows.mean(0)) ** 2).sum(1))
        return [float(apart[image.index(position)]) for position in alive]
    if rank in IN_TOWER or rank in merge_oracle.SCORED_BY:
        return [seen.scores[rank][position] for position in alive]
    if rank in share_oracle.RANKS:
        stay, _ = seen.shared_out(rank, image, alive, keep)
        return [float(position in stay) for position in alive]
    if rank == "cls_diverse":
        order = sorted(image, key=lambda position: -seen.scores["cls_attention"][position])
        stay = diverse_oracle.important_then_diverse(order, seen.embeddings, keep)
        return [float(position in stay) for position in alive]
    assert attention_RR is not None, f"{rank} ranks by the layer before"
    row = alive[-1] if rank == "last_image" else last_of_prompt
    return attention_RR[place[row]][[place[position] for position in alive]].tolist()


def _images(model: Model, prompt: Prompt) -> list[list[int]]:
    """Positions of each image's tokens."""
    at = torch.tensor(prompt.is_image_T).nonzero()[:, 0]
    lengths = [len(features) for features in oracle.image_features(model, prompt)]
    return [part.tolist() for part in at.split(lengths)]


def check_greedy(
    model_dir: Path,
    prompt: str,
    images: Sequence[Image.Image],
    stages: str | Sequence[str],
    seed: int,
    token_ids: Sequence[int],
    allowed: Sequence[int] | None = None,
    late: bool = False,
) -> tuple[OracleOutput, Kept]:
    """As :func:`tests.engine.oracle.check_greedy`; also what was chosen.

    Args:
        late: tokens leave after the prefill.
    """
    encoded = oracle.encode(model_dir, prompt, images)
    forward = forward_late if late else forward_kept
    kept = forward(model_dir, encoded, list(token_ids[:-1]), stages, seed)
    logprobs = kept.logits[kept.logits.shape[0] - len(token_ids) :].log_softmax(-1)
    return oracle.compare(encoded, logprobs, token_ids, allowed), kept
