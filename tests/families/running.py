"""Asks an engine everything about a tiny checkpoint, and compares the answers with the oracle's.

The only file of this folder that calls vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from vllm import LLM, RequestOutput, SamplingParams

from tests.engine import kept_oracle, two_workers
from tests.engine.harness import RANK_TIE, asynchronous_on_cpu
from tests.engine.starting import quickly
from tests.families import machine, oracle, staged_oracle
from tests.families.asking import Ask
from tests.families.making import Checkpoint
from vllm_flow.engine.families import Decoder, decoder_of

COMPILED = os.environ.get("VLLM_FLOW_COMPILED") == "1"
TOLERANCE = 2e-4
"""Of a logprob, in float32; errors of a forward pass are some 1e-5."""
OF_STATES = 5e-4
"""The same, where layers keep states: each token's error goes into all later ones, on some processors more."""
TIE = 2 * TOLERANCE
"""How far a greedy token may be behind the oracle's best: both may be off by the tolerance."""
MOVED = 1e-2
"""What hiding the image must at least change in some logprob, or a test shows nothing."""
TOP = 20
STOCK = None
_OPEN: list[Any] = []
"""Every engine of the process: one that is freed destroys the process groups that all of them share."""


class Engine:
    """An engine in this process."""

    def __init__(self, checkpoint: Checkpoint, group_layers: int | None, **options: Any) -> None:
        self.checkpoint = checkpoint
        settings: dict[str, Any] = dict(
            dtype="float32",
            enforce_eager=not COMPILED,
            max_model_len=512,
            max_num_batched_tokens=2048,
            max_num_seqs=24,
            block_size=32,
            kv_cache_memory_bytes=24 << 20,
            enable_prefix_caching=False,
            limit_mm_per_prompt={"image": 2} | ({"video": 1} if checkpoint.video else {}),
            skip_mm_profiling=True,
        )
        if group_layers is not STOCK:
            settings["additional_config"] = {"vllm_flow": {"group_layers": group_layers}}
        asynchronous = bool(options.get("async_scheduling"))
        with machine.that_serves(checkpoint), asynchronous_on_cpu(asynchronous), quickly():
            _OPEN.append(self)
            self.llm = LLM(model=str(checkpoint.where), **(settings | checkpoint.options | options))
        two_workers.keep_few_open(self.llm)

    @property
    def runner(self) -> Any:
        """vLLM's model runner."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> Any:
        """vLLM's model."""
        return self.runner.model

    @property
    def spares_last_layers(self) -> bool:
        """Whether image rows leave the last layer that sees them early."""
        return bool(self.runner.flow_state.planner.spares_last_layers)

    @property
    def decoder(self) -> Decoder:
        """Its language model, as its family keeps it."""
        return decoder_of(self.model, self.llm.llm_engine.vllm_config.model_config)

    def embed(self, ask: Ask) -> oracle.Prompt:
        """What reaches the decoder for a prompt, in however many chunks."""
        decoder = self.decoder
        inner = decoder.model
        seen: list[tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]] = []
        injected: tuple[torch.Tensor, ...] = ()
        stock = inner.forward

        def note(*args: Any, **kwargs: Any) -> Any:
            nonlocal injected
            found = kwargs.get("deepstack_input_embeds")
            parts = () if found is None else found.tensors.values()
            injected = tuple(part.clone() for part in parts)
            return stock(*args, **kwargs)

        def see(_layer: Any, args: Any, kwargs: Any) -> None:
            named = kwargs.get("positions", kwargs.get("position_ids"))
            positions, hidden = args[:2] or (named, kwargs["hidden_states"])
            seen.append((positions.clone(), hidden.clone(), injected))

        own = "forward" in vars(inner)
        # The layers' own code runs, which alone calls hooks; some models compile more than the decoder.
        compiled = [
            part for part in self.model.modules() if not getattr(part, "do_not_compile", True)
        ]
        for part in compiled:
            part.do_not_compile = True
        inner.forward = note
        hook = decoder.layers[0].register_forward_pre_hook(see, with_kwargs=True)
        params = SamplingParams(temperature=0, max_tokens=1)
        try:
            # A salt of its own: what is cached now would be found by the requests to be compared.
            prompt = {**self.prompt(ask), "cache_salt": f"embed {ask.text}"}
            ids = list(self.llm.generate(prompt, params, use_tqdm=False)[0].prompt_token_ids)
        finally:
            hook.remove()
            for part in compiled:
                part.do_not_compile = False
            if own:
                inner.forward = stock
            else:
                del inner.forward
        positions, embeddings, injections = zip(*seen, strict=True)
        return oracle.Prompt(
            ids,
            oracle.is_image(self.checkpoint, ids),
            embeddings_TH=torch.cat(embeddings)[: len(ids)],
            positions=torch.cat(positions, -1)[..., : len(ids)],
            injected=tuple(
                torch.cat(
                    [
                        parts[level] if parts else torch.zeros_like(chunk)
                        for parts, chunk in zip(injections, embeddings, strict=True)
                    ]
                )[: len(ids)]
                for level in range(max(map(len, injections)))
            ),
        )

    def prompt(self, ask: Ask) -> dict[str, Any]:
        """What ``LLM.generate`` takes."""
        data: dict[str, Any] = {}
        if ask.pictures and self.checkpoint.chunks:
            data["vision_chunk"] = [
                {"type": "image", "image": picture, "uuid": None} for picture in ask.pictures
            ]
        elif ask.pictures:
            data["image"] = list(ask.pictures)
        if ask.films:
            data["video"] = list(ask.films)
        if self.checkpoint.write_ids is not None:
            ids = self.checkpoint.write_ids(ask.text, ask.pictures)
            return {"prompt_token_ids": ids, "multi_modal_data": data}
        return {"prompt": ask.text, "multi_modal_data": data}

    def run(self, asks: Sequence[Ask], max_tokens: int) -> list[RequestOutput]:
        """All requests in one call: greedy, words only, the best logprobs with each token."""
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                logprobs=TOP,
                ignore_eos=True,
                allowed_token_ids=self.checkpoint.word_ids,
                extra_args=ask.keys,
            )
            for ask in asks
        ]
        return self.llm.generate([self.prompt(ask) for ask in asks], params, use_tqdm=False)

    def check_idle(self) -> None:
        """Nothing is left, and every block is back."""
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        assert not scheduler.requests
        assert pool.get_num_free_blocks() == len(pool.blocks) - 1, "KV blocks leaked"


def close_all() -> None:
    """Shut every engine down; each collects garbage several times, for seconds, in a process about to end."""
    with mock.patch("gc.collect"):
        for engine in _OPEN:
            if hasattr(engine, "llm"):
                engine.llm.llm_engine.engine_core.shutdown()
    _OPEN.clear()


class Judge:
    """Compares an engine's answers with the oracle's; encodes each prompt once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.checkpoint = engine.checkpoint
        self._prompts: dict[str, oracle.Prompt] = {}

    @cached_property
    def word_ids(self) -> torch.Tensor:
        return torch.tensor(self.checkpoint.word_ids)

    def prompt(self, ask: Ask) -> oracle.Prompt:
        if ask.text not in self._prompts:
            self._prompts[ask.text] = (
                self.engine.embed(ask)
                if self.checkpoint.processor is None
                else oracle.encode(self.checkpoint, ask.text, ask.pictures)
            )
        return self._prompts[ask.text]

    def error(self, ask: Ask, output: RequestOutput) -> float:
        """The largest difference of a logprob among the best ones of any token.

        Raises:
            AssertionError: a token differs, or the comparison would show nothing.
        """
        prompt, answer = self.prompt(ask), output.outputs[0]
        assert list(output.prompt_token_ids) == prompt.ids
        assert prompt.is_image_T.any()
        tokens = list(answer.token_ids)
        layers = self.checkpoint.num_layers
        cliff = layers if ask.cliff is None else ask.cliff
        if ask.stages:
            frames = len(ask.films[0][0]) if ask.films else 1
            expected, gap = staged_oracle.logprobs(
                self.checkpoint, prompt, tokens[:-1], ask.stages, frames
            )
            assert gap > RANK_TIE, f"{ask.stages}: two tokens rank alike; choose another picture"
            cliff = min(kept_oracle.parse(ask.stages))
        else:
            expected = oracle.logprobs(self.checkpoint, prompt, tokens[:-1], cliff, ask.late)
        if cliff < layers - self.checkpoint.perceptron_last:
            full = oracle.logprobs(self.checkpoint, prompt, tokens[:-1], layers)
            moved = float((full - expected).abs().max())
            assert moved > MOVED, f"cliff {cliff}: the picture hardly matters ({moved:.1e})"
        # The oracle reads the engine's own tokens, so a tie that fell the other way ends nothing.
        chosen = expected[range(len(tokens)), tokens]
        behind = expected[:, self.word_ids].max(1).values - chosen
        assert float(behind.max()) <= TIE, f"cliff {cliff}: {tokens} are not the greedy tokens"
        assert answer.logprobs is not None and len(answer.logprobs) == len(tokens)
        return max(
            abs(entry.logprob - float(expected[row, token]))
            for row, entries in enumerate(answer.logprobs)
            for token, entry in entries.items()
        )

    def assert_exact(self, asks: Sequence[Ask], outputs: Sequence[RequestOutput]) -> float:
        """Every answer is the oracle's; the largest error of a logprob."""
        errors = [self.error(ask, output) for ask, output in zip(asks, outputs, strict=True)]
        tolerance = OF_STATES if self.checkpoint.recurrent else TOLERANCE
        wrong = [
            f"{ask.keys}, {len(ask.pictures)} pictures: {error:.1e}"
            for ask, error in zip(asks, errors, strict=True)
            if not error <= tolerance
        ]
        assert not wrong, "logprobs differ from the oracle's: " + "; ".join(wrong)
        return max(errors)


def largest_difference(outputs: Sequence[RequestOutput], others: Sequence[RequestOutput]) -> float:
    """Between two engines' answers, which must have equal tokens."""
    largest = 0.0
    for output, other in zip(outputs, others, strict=True):
        one, two = output.outputs[0], other.outputs[0]
        assert list(one.token_ids) == list(two.token_ids)
        for row, second in zip(one.logprobs or (), two.logprobs or (), strict=True):
            largest = max(
                largest, *(abs(row[t].logprob - second[t].logprob) for t in row.keys() & second)
            )
    return largest
