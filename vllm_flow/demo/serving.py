"""The demo's only contact with vLLM: one engine, questions at many cliffs, timed prefills.

Knows nothing of statistics, tables or pages. vLLM is imported when an engine is built, after the
environment has been set for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vllm_flow.demo import material
from vllm_flow.demo.kinds import BY_KEY
from vllm_flow.demo.measurements import Answer, Engine, Question
from vllm_flow.engine.process import device_name

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

    from vllm_flow.engine.footprints import Footprint

CHUNK = 64
"""Requests handed to the engine at once: enough to mix cliffs, few enough for a live bar."""

LONG = 16
"""Output tokens from which on an answer counts as long."""

MIXED = 2
"""Cliffs that are asked side by side: they share the engine's batches, and the rest can follow as
soon as they are done."""

Job = tuple[Question, int]
"""A question and the cliff it is asked at."""


@dataclass(frozen=True)
class EngineOptions:
    """How the engine is started; None leaves a choice to vLLM or vLLM-Flow."""

    model: str
    dtype: str
    group_layers: int | None
    max_model_len: int
    kv_cache_bytes: int | None
    block_size: int | None


def start_engine(options: EngineOptions) -> tuple[LLM, Engine]:
    """Start vLLM with the extension; return it with what describes it."""
    import torch
    import vllm

    from vllm_flow.engine.settings import FlowSettings

    flow = {} if options.group_layers is None else {"group_layers": options.group_layers}
    llm = vllm.LLM(
        model=options.model,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        kv_cache_memory_bytes=options.kv_cache_bytes,
        block_size=options.block_size,
        limit_mm_per_prompt={"image": 1},
        enforce_eager=True,  # compiling would take longer than the demo
        enable_prefix_caching=False,
        use_tqdm_on_load=False,
        disable_log_stats=False,  # per-request time stamps
        additional_config={"vllm_flow": flow},
    )
    config = llm.llm_engine.vllm_config
    settings = FlowSettings.of(config)
    assert settings is not None
    return llm, Engine(
        model=options.model,
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        num_layers=settings.num_layers,
        group_starts=settings.group_starts,
        block_size=config.cache_config.block_size,
        vllm=vllm.__version__,
        torch=torch.__version__,
        device=device_name(),
        key_share=_key_share(llm, config),
    )


def _key_share(llm: LLM, config: Any) -> float:
    """See :class:`Engine`; 1 where the model's last layer with image rows runs whole."""
    from vllm_flow.engine.inspect import spares_last_layers
    from vllm_flow.profile.shape import shape_of

    if not spares_last_layers(llm):
        return 1.0
    return shape_of(config.model_config.hf_config, "bfloat16").key_share


class Asker:
    """Sends requests to one engine, each with its own cliff."""

    def __init__(self, llm: LLM, engine: Engine, build_prompt: Callable[[str], str]) -> None:
        self.llm = llm
        self.engine = engine
        self.build_prompt = build_prompt

    def prompt(self, question: Question) -> dict[str, Any]:
        """A question and its picture, as vLLM takes them."""
        return {
            "prompt": self.build_prompt(question.item.text),
            "multi_modal_data": {"image": material.picture_of(question)},
        }

    def sampling(self, cliff: int, max_tokens: int) -> Any:
        """Greedy decoding; the cliff is the request's own.

        The baseline carries no key at all, so that it is a request as stock vLLM knows it.
        """
        from vllm import SamplingParams

        flow = None if cliff == self.engine.num_layers else {"flow_cliff": cliff}
        return SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=flow)

    def run(self, jobs: Sequence[Job], what: str) -> Iterator[tuple[Job, str, Footprint]]:
        """Each job with what was said and what it took, in the order given."""
        from vllm_flow.engine.inspect import footprints

        prompts = {question.id: self.prompt(question) for question, _ in jobs}
        with tqdm(total=len(jobs), desc=what, unit="request", dynamic_ncols=True) as bar:
            for first in range(0, len(jobs), CHUNK):
                chunk = jobs[first : first + CHUNK]
                outputs = self.llm.generate(
                    [prompts[question.id] for question, _ in chunk],
                    [self.sampling(cliff, BY_KEY[q.kind].max_tokens) for q, cliff in chunk],
                    use_tqdm=False,
                )
                took = {
                    internal.rpartition("-")[0]: footprint
                    for internal, footprint in footprints(self.llm).items()
                }
                for job, output in zip(chunk, outputs, strict=True):
                    yield job, output.outputs[0].text.strip(), took[output.request_id]
                bar.update(len(chunk))

    def ask(
        self, questions: Sequence[Question], cliffs: Sequence[int], few: Sequence[int]
    ) -> Iterator[tuple[list[int], list[Answer]]]:
        """Every question at every cliff, or at the `few`, as its kind wants it.

        Yields the cliffs that are done with their answers, some at a time: the baseline first, to
        which the others are compared, then the deepest. Within them kinds and cliffs are shuffled,
        so that each batch mixes them; long answers come by themselves, since a few would keep a
        batch of short ones going.
        """
        deepest_first = sorted(cliffs, reverse=True)
        for first in range(0, len(deepest_first), MIXED):
            mixed = deepest_first[first : first + MIXED]
            jobs = [
                (question, cliff)
                for question in questions
                for cliff in mixed
                if BY_KEY[question.kind].every_cliff or cliff in few
            ]
            random.Random(first).shuffle(jobs)
            jobs.sort(key=lambda job: BY_KEY[job[0].kind].max_tokens > LONG)
            what = f"asking, cliffs {' and '.join(str(cliff) for cliff in mixed)}"
            yield (
                mixed,
                [answer_of(job, said, took) for job, said, took in self.run(jobs, what)],
            )

    def time_prefill(
        self, questions: Sequence[Question], cliffs: Sequence[int], rounds: int
    ) -> dict[int, list[float]]:
        """Per cliff, the baseline's prefill time over the cliff's, once per round.

        In each round the same batch runs once at every cliff, in shuffled order, and at the baseline
        at its beginning, middle and end: all of a round is divided by the median of these, since a
        single one that was disturbed would spoil the round at every cliff. One round before them
        warms up; it also leaves the images' features in vLLM's encoder cache, so the vision tower is
        not part of the times.
        """
        prompts = [self.prompt(question) for question in questions]
        baseline = self.engine.num_layers
        others = [cliff for cliff in cliffs if cliff != baseline]
        ratios: dict[int, list[float]] = {cliff: [] for cliff in cliffs}
        shuffler = random.Random(0)
        total = (rounds + 1) * (len(others) + 3)
        with tqdm(total=total, desc="timing", unit="batch", dynamic_ncols=True) as bar:
            for number in range(rounds + 1):
                shuffler.shuffle(others)
                half = len(others) // 2
                seconds: dict[int, list[float]] = {cliff: [] for cliff in cliffs}
                for cliff in (baseline, *others[:half], baseline, *others[half:], baseline):
                    outputs = self.llm.generate(prompts, self.sampling(cliff, 1), use_tqdm=False)
                    seconds[cliff].append(engine_seconds(outputs))
                    bar.update()
                if number > 0:
                    whole = median(seconds[baseline])
                    for cliff in cliffs:
                        ratios[cliff].append(whole / median(seconds[cliff]))
        return ratios


def answer_of(job: Job, said: str, took: Footprint) -> Answer:
    """What was said to a question at a cliff, read by its kind's rule."""
    question, cliff = job
    return Answer(
        question_id=question.id,
        cliff=cliff,
        said=said,
        reading=material.read_answer(question, said),
        prompt_tokens=took.prompt_tokens,
        image_tokens=took.image_tokens,
        computed_tokens=took.computed_tokens,
        blocks=took.blocks,
    )


def engine_seconds(outputs: Sequence[RequestOutput]) -> float:
    """From the first request scheduled to the last first token, by the engine's own clock.

    Leaves out what does not depend on the cliff: tokenising and preparing the pictures.
    """
    metrics = [output.metrics for output in outputs]
    return max(m.first_token_ts for m in metrics) - min(m.scheduled_ts for m in metrics)
