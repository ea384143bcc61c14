"""The operator's settings: ``additional_config["vllm_flow"]`` as one documented dataclass.

Seam: ``VllmConfig.additional_config``, which vLLM reserves for extensions and hands to every
process. What the engine itself says is `engine_facts`; imports nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from vllm_flow.cliff_file import Profile
from vllm_flow.counts import counted
from vllm_flow.engine import setting_values as values
from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.setting_values import CONFIG_KEY
from vllm_flow.policy import FlowPolicy

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NO_OPTIONS = ("engine", "profile")
"""Fields that an operator does not set by their names."""
KERNELS = ("auto", "triton", "torch", "xformers")


@dataclass(frozen=True)
class FlowSettings:
    """Settings of one engine, resolved against its model."""

    engine: EngineFacts
    """What they are resolved against (no option)."""

    group_layers: int
    """Consecutive decoder layers that share one block table: how finely memory is saved.

    Any cliff is exact whatever this is; blocks are saved in the groups that lie wholly past it.
    The last group may have fewer, but more than two thirds. Default: at most 8 groups, equal ones where
    there are good divisors; see ``grouping.py``. 1 where the keys of layers differ in size (Gemma 4, MiMo-V2).
    With pipeline parallelism it counts the layers of a group on all stages together, of each of which it has some.
    """

    default_policy: FlowPolicy | None = None
    """Policy of requests that send none, for clients that cannot send one; written as its request
    keys, ``{"flow_cliff": 16}`` or ``{"flow_stages": "0:50% diversity, 20:0"}``, with the same values
    for every image. A client opts out by sending the baseline.

    ``{"profile": "cliff.json"}`` takes it from a file of ``vllm-flow cliff``, read once, at start-up,
    where requests are validated: a request that sends ``flow_task`` gets the cliff of its task, one
    that sends neither the file's default (its only task's, where it has no "default"), else none."""

    profile: Profile | None = None
    """The cliffs of the profile that ``default_policy`` names (no option of its own)."""

    model_policies: Mapping[str, FlowPolicy | None] = field(default_factory=dict)
    """Policy of requests that send none, nor a task, by the name under which they ask for the model: one of several
    served names, or an adapter's, ``{"small": {"flow_cliff": 8}}``. Same form, but for profiles. A name that is not
    here has ``default_policy``; ``{}`` is no policy at all."""

    max_policy: FlowPolicy | None = None
    """The most a request may evict, layer by layer: one that keeps fewer tokens of an image in any
    layer is refused. Same form. A default, or a task's policy, that evicts more whatever the picture is
    refused at start-up; one that does so for pictures of some sizes stays away from those."""

    allow_request_policy: bool = True
    """False refuses every request that sends a policy of its own."""

    attention_log: str | None = None
    """Directory for the attention of requests that send ``flow_log_attention``; made if missing.
    Without it such requests are refused, and no attention layer is touched."""

    attention_log_max_bytes: int = 1 << 30
    """Size of the directory's part files at which the log stops; what comes after is dropped and
    counted. Nothing is deleted to make room."""

    attention_log_kernel: str = "auto"
    """What computes the attention log's masses: "triton", a kernel that reads the keys where they lie,
    or "torch", its reference, which gathers them. "auto" takes the kernel on CUDA wherever it can run;
    "triton" refuses to start where it cannot. "xformers" takes that package's kernel in its place, or
    refuses to start."""

    untested_models: bool = False
    """True tries models that nobody has tested, and says so in the log; else they are refused. Those
    known not to work are refused either way."""

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self.engine.num_layers

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """First and last layer of each storage group."""
        return self.engine.decoder.groups(self.group_layers)

    @property
    def group_starts(self) -> tuple[int, ...]:
        """First layer of each storage group."""
        return tuple(first for first, _ in self.groups)

    @property
    def layers_per_block(self) -> int:
        """Layers whose keys and values a KV block holds; of the last group it may be fewer."""
        engine, groups = self.engine, self.groups
        if not engine.attending:
            return self.group_layers
        # Where vLLM divides the first, its drafter's layer is one too many in each of the others.
        divided = len(set(groups)) < len(groups)
        layers = len(engine.attending) + (0 if divided else engine.draft_layers)
        return layers // len(set(groups))

    @property
    def storage(self) -> str:
        """The storage groups in words."""
        found = (
            f"{counted(len(self.groups), 'storage group')} of {counted(self.group_layers, 'layer')}"
        )
        if self.engine.pipeline:
            stages = ", ".join(map(str, self.engine.pipeline))
            found = f"{found}, some of each pipeline stage ({stages} layers)"
            empty = self.engine.decoder.pipeline_padding(self.group_layers)
            more = f", whose blocks take {empty:.0%} more memory than one group's"
            return found + more if empty else found
        if self.engine.draft_layers:
            found = f"{found}, the drafter's {self.engine.draft_layers} first"
        if not self.engine.attending:
            return found
        others = "a state per request" if self.engine.keep_states else "nothing"
        return f"{found}, with keys in {self.layers_per_block} of each and {others} in the others"

    @property
    def summary(self) -> str:
        """What an operator may want to see confirmed when the engine starts."""
        default = "evict nothing"
        if self.default_policy is not None:
            default = f'get "{self.default_policy}"'
        others = "others may send any policy"
        if not self.allow_request_policy:
            others = "those that send one are refused"
        elif self.max_policy is not None:
            others = f'others may evict no more than "{self.max_policy}"'
        found = (
            f"{counted(self.num_layers, 'decoder layer')}, {self.storage}. Requests without a policy {default}; "
            f"{others}."
        )
        if self.model_policies:
            own = (
                f'{name!r} "{policy or "no policy"}"'
                for name, policy in self.model_policies.items()
            )
            found += f" By the model asked for: {', '.join(own)}."
        if self.profile is not None:
            found += f" Tasks of the profile: {', '.join(sorted(self.profile.policies))}."
        if self.attention_log is not None:
            found += f" Attention is logged in {self.attention_log}."
        return found

    def group_of(self, layer: int) -> tuple[int, int]:
        """First and last layer of the storage group that decoder layer ``layer`` belongs to."""
        return self.engine.decoder.group_of(self.group_layers, layer)

    @classmethod
    def names(cls) -> list[str]:
        """The options' names."""
        return [f.name for f in fields(cls) if f.name not in NO_OPTIONS]

    @classmethod
    def read(cls, options: Any, engine: EngineFacts) -> FlowSettings:
        """Settings from the JSON object under ``vllm_flow``.

        Raises:
            ValueError: not an object, an unknown option, a value out of range, an option without effect, or
                two that contradict one another; names it.
        """
        values.known(options, cls.names())
        num_layers = engine.num_layers
        group_layers = values.layers(options, "group_layers", num_layers)
        if group_layers is None:
            group_layers = 1 if engine.keys_differ else engine.decoder.default_group_layers()
        engine.decoder.groups(group_layers)  # or refused
        profile = values.profile(options, num_layers)
        default = (
            values.policy(options, "default_policy", num_layers)
            if profile is None
            else profile.default
        )
        bound = values.bound(options, "max_policy", num_layers)
        own = values.model_policies(options, "model_policies", num_layers)
        tasks = profile.policies if profile else {}
        values.check_bounded(default, tasks, own, bound, num_layers)
        found = cls(
            engine=engine,
            group_layers=group_layers,
            default_policy=default,
            profile=profile,
            model_policies=own,
            max_policy=bound,
            allow_request_policy=values.flag(options, "allow_request_policy", True),
            attention_log=values.directory(options, "attention_log"),
            attention_log_max_bytes=values.size(
                options, "attention_log_max_bytes", cls.attention_log_max_bytes
            ),
            attention_log_kernel=values.one_of(options, "attention_log_kernel", KERNELS),
            untested_models=values.flag(options, "untested_models", False),
        )
        values.check_effects(options)  # last, since a bad value is the plainer fault
        return found

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> FlowSettings | None:
        """Settings of an engine, None where the extension is off."""
        options = vllm_config.additional_config
        if not isinstance(options, Mapping) or CONFIG_KEY not in options:
            return None
        return cls.read(options[CONFIG_KEY], EngineFacts.of(vllm_config))
