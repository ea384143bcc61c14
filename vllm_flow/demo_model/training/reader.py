"""Runs the demo model, with its image rows removed from any layer on, for measuring and its card.

Several questions about a picture are answered together: their rows share the picture's, and each sees
only its own. Greedy. Letters: R rows, N new rows (one per question), K key rows, H heads, D width of a
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from vllm_flow.demo_model.assemble import WEIGHTS
from vllm_flow.demo_model.checkpoint import merge_lora
from vllm_flow.demo_model.prompt import ANSWER_END, prompt_head, prompt_tail
from vllm_flow.demo_model.smollm2 import read_decoder, read_tokenizer
from vllm_flow.demo_model.training.budget import Budget
from vllm_flow.demo_model.training.files import load
from vllm_flow.demo_model.training.lora import cast_weights, new_llama
from vllm_flow.demo_model.training.projector_stage import load_projector
from vllm_flow.demo_model.training.vision_stage import features, load_tower
from vllm_flow.demo_model.vision import IMAGE_TOKENS


@dataclass
class Rows:
    """Rows of a pack on their way through the decoder."""

    states: torch.Tensor
    """[R, width]"""
    positions: torch.Tensor
    """[R]"""
    owners: torch.Tensor
    """[R]: number of the question from 1, 0 for the rows all share."""
    image: torch.Tensor
    """[R] bool"""

    def without_image(self) -> Rows:
        """The rows that stay when the picture's go."""
        kept = ~self.image
        return Rows(self.states[kept], self.positions[kept], self.owners[kept], self.image[kept])


@dataclass
class Kept:
    """One layer's keys and values, and whose rows they are."""

    keys: torch.Tensor
    """[H, K, D]"""
    values: torch.Tensor
    positions: torch.Tensor
    owners: torch.Tensor

    def grown(self, other: Kept) -> Kept:
        """With another's rows after these."""
        return Kept(
            torch.cat([self.keys, other.keys], 1),
            torch.cat([self.values, other.values], 1),
            torch.cat([self.positions, other.positions]),
            torch.cat([self.owners, other.owners]),
        )


@dataclass
class Talk:
    """The answers at one cliff on their way: N questions, all about one picture."""

    cache: list[Kept]
    """Per layer."""
    last: torch.Tensor
    """[N, width]: what the next tokens are read from."""
    places: torch.Tensor
    """[N]: their positions."""
    said: list[list[int]]
    open: list[bool]
    """Whether a question's answer goes on."""

    def take(self, tokens: Sequence[int], end: int) -> None:
        """Add a token to each answer that is not over; ``end`` ends it."""
        for number, token in enumerate(tokens):
            self.open[number] &= token != end
            if self.open[number]:
                self.said[number].append(token)


class Reader:
    """Tower, projector and merged decoder."""

    def __init__(self, tower: Any, projector: Any, llama: Any, tokenizer: Any) -> None:
        self.tower, self.projector = tower, projector
        self.llama = llama.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.encode = lambda text: tokenizer.encode(text).ids
        self.end = tokenizer.token_to_id(ANSWER_END)

    @classmethod
    def shipped(cls, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Reader:
        """The model of the committed adapters, rounded to bfloat16 as these are."""
        tower = load_tower(WEIGHTS / "vision.safetensors")
        projector = load_projector(WEIGHTS / "projector.safetensors")
        return cls._of(tower, projector, load(WEIGHTS / "lora.safetensors"), dtype, device)

    @classmethod
    def of(cls, work: Path, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Reader:
        """The model of a training's work folder; its decoder stage may still be going on.

        Raises FileNotFoundError where that stage has not begun.
        """
        if (work / "lora.safetensors").exists():
            adapters = load(work / "lora.safetensors")
            projector = load_projector(work / "projector_tuned.safetensors")
        else:
            projector = load_projector(work / "projector.safetensors")
            state = torch.load(work / "lora_state.pt", weights_only=True)
            projector.load_state_dict(state["projector"])
            adapters = state["adapters"]
        return cls._of(load_tower(work / "vision.safetensors"), projector, adapters, dtype, device)

    @classmethod
    def _of(
        cls, tower: Any, projector: Any, adapters: Any, dtype: torch.dtype, device: str
    ) -> Reader:
        decoder = read_decoder()
        llama = new_llama(decoder.config)
        llama.load_state_dict(merge_lora(decoder.weights, adapters, Budget().lora_alpha))
        parts = [part.to(device) for part in (tower, projector, cast_weights(llama, dtype))]
        return cls(*parts, read_tokenizer())

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return torch.device(self.llama.embed_tokens.weight.device)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.llama.layers)

    @torch.no_grad()
    def answers(
        self, pixels: torch.Tensor, texts: Sequence[str], cliffs: Sequence[int], tokens: int
    ) -> dict[int, list[str]]:
        """Cliff -> greedy answer to each text on one picture ([1, 3, 168, 168] uint8).

        With cliff L the image rows pass layers 0 to L - 1 and are gone from layer L on, for the rows of
        the prompt and for every token after it; positions stay. The cliff ``layers`` is the full model.
        """
        rows, asked = self._pack(pixels, texts)
        talks, kept_before = {}, []
        for cliff in range(self.layers + 1):
            if cliff in cliffs:
                talks[cliff] = self._without_image(rows, list(kept_before), cliff, asked)
            if cliff < self.layers and cliff < max(cliffs):
                rows, (kept,) = self._layer(cliff, rows, [None])
                kept_before.append(kept)
        self._talk(list(talks.values()), tokens)
        return {
            cliff: [self.tokenizer.decode(ids).strip() for ids in talk.said]
            for cliff, talk in talks.items()
        }

    def _pack(self, pixels: torch.Tensor, texts: Sequence[str]) -> tuple[Rows, torch.Tensor]:
        """The prompt rows, and for each text the number of its last one."""
        head = self.encode(prompt_head())
        tails = [self.encode(prompt_tail(text)) for text in texts]
        prefix = len(head) + IMAGE_TOKENS
        lengths = torch.tensor([len(tail) for tail in tails])
        owners = torch.cat(
            [torch.zeros(prefix), torch.arange(1.0, len(tails) + 1).repeat_interleave(lengths)]
        ).long()
        positions = torch.cat([torch.arange(prefix + length)[prefix:] for length in lengths])
        positions = torch.cat([torch.arange(prefix), positions])
        is_image = torch.zeros(len(owners), dtype=torch.bool)
        is_image[len(head) : prefix] = True
        ids = [*head, *([0] * IMAGE_TOKENS), *(token for tail in tails for token in tail)]
        states = self.llama.embed_tokens(torch.tensor(ids, device=self.device))
        seen = features(self.tower, pixels.to(self.device), states.dtype)[1]
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=states.dtype == torch.bfloat16
        ):
            image = self.projector(seen)[0]
        states[is_image] = image.to(states.dtype)
        rows = Rows(states, *(part.to(self.device) for part in (positions, owners, is_image)))
        return rows, (prefix + lengths.cumsum(0) - 1).to(self.device)

    def _without_image(
        self, rows: Rows, cache: list[Kept], cliff: int, asked: torch.Tensor
    ) -> Talk:
        """Leave the image rows and run the layers from ``cliff`` on."""
        text_rows = rows.without_image()
        row_of = torch.cumsum((~rows.image).long(), 0)[asked] - 1
        for number in range(cliff, self.layers):
            text_rows, (kept,) = self._layer(number, text_rows, [None])
            cache.append(kept)
        count = len(asked)
        return Talk(
            cache,
            text_rows.states[row_of],
            text_rows.positions[row_of],
            [[] for _ in range(count)],
            [True] * count,
        )

    def _talk(self, talks: Sequence[Talk], tokens: int) -> None:
        """Write all answers, a token of each at a time: the weights are read once for all of them."""
        for _ in range(tokens):
            last = torch.cat([talk.last for talk in talks])
            best = F.linear(self.llama.norm(last), self.llama.embed_tokens.weight).argmax(-1)
            for talk, ids in zip(talks, best.chunk(len(talks)), strict=True):
                talk.take(ids.tolist(), self.end)
            going = [(talk, ids) for talk, ids in zip(talks, best.chunk(len(talks)), strict=True)
                     if any(talk.open)]  # fmt: skip
            if not going:
                return
            talks = [talk for talk, _ in going]
            best = torch.cat([ids for _, ids in going])
            for talk in talks:
                talk.places = talk.places + 1
            count = len(best) // len(talks)
            owners = torch.arange(1, count + 1, device=self.device).repeat(len(talks))
            places = torch.cat([talk.places for talk in talks])
            image = torch.zeros_like(owners, dtype=torch.bool)
            new = Rows(self.llama.embed_tokens(best), places, owners, image)
            for number in range(self.layers):
                new, caches = self._layer(number, new, [talk.cache[number] for talk in talks])
                for talk, cache in zip(talks, caches, strict=True):
                    talk.cache[number] = cache
            for talk, states in zip(talks, new.states.chunk(len(talks)), strict=True):
                talk.last = states

    def _layer(
        self, number: int, rows: Rows, before: Sequence[Kept | None]
    ) -> tuple[Rows, list[Kept]]:
        """One decoder layer on as many equal parts of ``rows`` as there are ``before``: each part sees the
        keys and values before it and its own, which are returned together."""
        layer = self.llama.layers[number]
        attention, normed = layer.self_attn, layer.input_layernorm(rows.states)
        cos, sin = self.llama.rotary_emb(rows.states[None], rows.positions[None])

        def heads(projection: Any) -> torch.Tensor:
            return projection(normed).view(len(normed), -1, attention.head_dim).transpose(0, 1)

        query, key = (_turned(heads(p), cos, sin) for p in (attention.q_proj, attention.k_proj))
        value, size = heads(attention.v_proj), len(normed) // len(before)
        outs, kept = [], []
        for start, earlier in zip(range(0, len(normed), size), before, strict=True):
            part = slice(start, start + size)
            positions, owners = rows.positions[part], rows.owners[part]
            seen = Kept(key[:, part], value[:, part], positions, owners)
            if earlier is not None:
                seen = earlier.grown(seen)
            allowed = (seen.owners == 0) | (seen.owners == owners[:, None])
            allowed &= seen.positions <= positions[:, None]
            out = F.scaled_dot_product_attention(
                query[None, :, part], seen.keys[None], seen.values[None], allowed, enable_gqa=True
            )
            outs.append(out[0])
            kept.append(seen)
        states = rows.states + attention.o_proj(torch.cat(outs, 1).transpose(0, 1).flatten(1))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        return Rows(states, rows.positions, rows.owners, rows.image), kept


def _turned(x_HRD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding in Hugging Face's halves."""
    left, right = x_HRD.chunk(2, dim=-1)
    return x_HRD * cos + torch.cat([-right, left], dim=-1) * sin
