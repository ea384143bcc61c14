"""The demo's only contact with vLLM: one engine, questions at many cliffs and under policies, timed prefills.

Knows nothing of statistics, tables or pages. vLLM is imported when an engine is built, after the
environment has been set for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vllm_flow.demo import material
from vllm_flow.demo.kinds import BY_KEY
from vllm_flow.demo.measurements import Answer, Engine, Question, Setting
from vllm_flow.engine.process import device_name, engine_seconds
from vllm_flow.exits import Refused
from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_keys import request_keys

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

    from vllm_flow.engine.core.footprints import Footprint

CHUNK = 64
"""Requests handed to the engine at once: enough to mix cliffs, few enough for a live bar."""

LONG = 16
"""Output tokens from which on an answer counts as long."""

MIXED = 2
"""Cliffs, or policies, that are asked side by side: they share the engine's batches, and the rest can follow as
soon as they are done."""

Job = tuple[Question, Setting]
"""A question and what it is asked at."""


@dataclass(frozen=True)
class EngineOptions:
    """How the engine is started; None leaves a choice to vLLM or vLLM-Flow."""

    model: str
    dtype: str
    group_layers: int | None
    max_model_len: int
    kv_cache_bytes: int | None
    block_size: int | None
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`; they win over this module's."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Of these the arguments of `vllm.LLM` that a server takes, too; None leaves a choice to vLLM."""
        return {
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "block_size": self.block_size,
            "kv_cache_memory_bytes": self.kv_cache_bytes,
            "trust_remote_code": self.trust_remote_code,
            **self.engine_args,
        }


def start_engine(options: EngineOptions) -> tuple[LLM, Engine]:
    """Start vLLM with the extension; return it with what describes it."""
    import torch
    import vllm

    from vllm_flow.engine.settings import FlowSettings

    flow = {} if options.group_layers is None else {"group_layers": options.group_layers}
    arguments = {
        "limit_mm_per_prompt": {"image": 1},
        "enforce_eager": True,  # compiling would take longer than the demo
        "enable_prefix_caching": False,
        "use_tqdm_on_load": False,
        "disable_log_stats": False,  # per-request time stamps
        **options.arguments,
    }
    llm = vllm.LLM(model=options.model, additional_config={"vllm_flow": flow}, **arguments)
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
    from vllm_flow.profile.picture_cost import decoder_shape

    shape = decoder_shape(config.model_config) if spares_last_layers(llm) else None
    return 1.0 if shape is None else shape.key_share


def full_grid(llm: LLM) -> int | None:
    """Side of the square of image tokens that a picture becomes; None where it is no such square."""
    from vllm_flow.eval.sweep import model_facts

    config = llm.llm_engine.vllm_config.model_config.hf_config
    return None if model_facts.downsampling_obstacle(config) else model_facts.full_grid(config)


class Asker:
    """Sends requests to one engine, each with its own cliff or policy.

    Args:
        policies: what the names of policies stand for.
    """

    def __init__(
        self,
        llm: LLM,
        engine: Engine,
        build_prompt: Callable[[str], str],
        policies: Mapping[str, FlowPolicy] | None = None,
    ) -> None:
        self.llm = llm
        self.engine = engine
        self.build_prompt = build_prompt
        self.policies = dict(policies or {})

    def prompt(self, question: Question) -> dict[str, Any]:
        """A question and its picture, as vLLM takes them."""
        return {
            "prompt": self.build_prompt(question.item.text),
            "multi_modal_data": {"image": material.picture_of(question)},
        }

    def sampling(self, setting: Setting, max_tokens: int) -> Any:
        """Greedy decoding; the cliff or policy is the request's own."""
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=self.keys(setting))

    def keys(self, setting: Setting) -> dict[str, Any] | None:
        """What a request carries.

        The baseline's carries no key at all, so that it is a request as stock vLLM knows it.
        """
        if isinstance(setting, str):
            return request_keys(self.policies[setting])
        return None if setting == self.engine.num_layers else {"flow_cliff": setting}

    def generate(self, prompts: Sequence[Any], sampling: Any) -> list[RequestOutput]:
        """As vLLM's, without its bar.

        Raises:
            Refused: this engine cannot serve a policy, such as a rank by attention that it cannot read, or a
                picture of this model is longer than its requests may be.
        """
        from vllm.exceptions import VLLMValidationError

        try:
            return self.llm.generate(prompts, sampling, use_tqdm=False)
        except (ValueError, VLLMValidationError) as error:
            from vllm_flow.engine.front_end.incoming import RefusedRequest

            if isinstance(error, RefusedRequest):
                raise Refused(f"--policies: {error}") from error
            if isinstance(error, VLLMValidationError):
                raise Refused(f"{error} Here --max-model-len sets it.") from error
            raise

    def run(self, jobs: Sequence[Job], what: str) -> Iterator[tuple[Job, str, Footprint]]:
        """Each job with what was said and what it took, in the order given."""
        from vllm_flow.engine.inspect import footprints

        prompts = {question.id: self.prompt(question) for question, _ in jobs}
        with tqdm(total=len(jobs), desc=what, unit="request", dynamic_ncols=True) as bar:
            for first in range(0, len(jobs), CHUNK):
                chunk = jobs[first : first + CHUNK]
                outputs = self.generate(
                    [prompts[question.id] for question, _ in chunk],
                    [self.sampling(setting, BY_KEY[q.kind].max_tokens) for q, setting in chunk],
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
    ) -> Iterator[tuple[list[Setting], list[Answer]]]:
        """Every question at every cliff, or at the `few`, as its kind wants it; all under every policy.

        Yields what is done with its answers, some at a time: the baseline first, to which the others
        are compared, then the deepest cliffs, and the policies last. Within them kinds and settings are
        shuffled, so that each batch mixes them; long answers come by themselves, since a few would keep
        a batch of short ones going.
        """
        for number, mixed in enumerate(mixtures(cliffs, self.policies)):
            jobs = [
                (question, setting)
                for question in questions
                for setting in mixed
                if BY_KEY[question.kind].every_cliff or isinstance(setting, str) or setting in few
            ]
            random.Random(number * MIXED).shuffle(jobs)
            jobs.sort(key=lambda job: BY_KEY[job[0].kind].max_tokens > LONG)
            said = " and ".join(str(setting) for setting in mixed)
            what = f"asking, {'policies' if isinstance(mixed[0], str) else 'cliffs'} {said}"
            yield (
                mixed,
                [answer_of(job, said, took) for job, said, took in self.run(jobs, what)],
            )

    def time_prefill(
        self, questions: Sequence[Question], cliffs: Sequence[int], rounds: int
    ) -> dict[Setting, list[float]]:
        """Per cliff and policy, the baseline's prefill time over its own, once per round.

        In each round the same batch runs once at every setting, in shuffled order, and at the baseline
        at its beginning, middle and end: all of a round is divided by the median of these, since a
        single one that was disturbed would spoil the round at every setting. Two batches before them
        warm up; they also leave the images' features in vLLM's encoder cache, so the vision tower is
        not part of the times.
        """
        prompts = [self.prompt(question) for question in questions]
        baseline = self.engine.num_layers
        settings: list[Setting] = [*cliffs, *self.policies]
        others = [setting for setting in settings if setting != baseline]
        ratios: dict[Setting, list[float]] = {setting: [] for setting in settings}
        shuffler = random.Random(0)
        warm_up = [baseline, *others[:1]]
        total = len(warm_up) + rounds * (len(others) + 3)
        with tqdm(total=total, desc="timing", unit="batch", dynamic_ncols=True) as bar:
            for setting in warm_up:
                self.generate(prompts, self.sampling(setting, 1))
                bar.update()
            for _ in range(rounds):
                shuffler.shuffle(others)
                half = len(others) // 2
                seconds: dict[Setting, list[float]] = {setting: [] for setting in settings}
                for setting in (baseline, *others[:half], baseline, *others[half:], baseline):
                    outputs = self.generate(prompts, self.sampling(setting, 1))
                    seconds[setting].append(engine_seconds(outputs))
                    bar.update()
                whole = median(seconds[baseline])
                for setting in settings:
                    ratios[setting].append(whole / median(seconds[setting]))
        return ratios


def mixtures(cliffs: Sequence[int], policies: Iterable[str]) -> Iterator[list[Setting]]:
    """What is asked side by side, in the order it is asked: the deepest cliffs first, then policies."""
    for settings in (sorted(cliffs, reverse=True), list(policies)):
        for first in range(0, len(settings), MIXED):
            yield list(settings[first : first + MIXED])


def answer_of(job: Job, said: str, took: Footprint) -> Answer:
    """What was said to a question at a cliff or under a policy, read by its kind's rule."""
    question, setting = job
    return Answer(
        question_id=question.id,
        cliff=None if isinstance(setting, str) else setting,
        policy=setting if isinstance(setting, str) else None,
        said=said,
        reading=material.read_answer(question, said),
        prompt_tokens=took.prompt_tokens,
        image_tokens=took.image_tokens,
        computed_tokens=took.computed_tokens,
        blocks=took.blocks,
    )
