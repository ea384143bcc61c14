"""Divides decoder layers into storage groups, each of consecutive layers with one block table. Integers only.

(Of a pipeline's stages a group has consecutive layers of each: `pipeline_groups`.)

A *storage group* is what vLLM calls a KV-cache group. Terms, with a drawing: docs/glossary.md. In a model of which
some layers *attend* (store keys and values), and the others keep a state per request, storage groups are of the
former; vLLM makes groups of the same size of the latter.

All groups draw on one pool, so a block is as large as the largest group's. vLLM takes a smaller group as it is where
it has more than two thirds of the largest one's layers, and splits all groups else
(vllm/v1/core/kv_cache_utils.py, ``_get_kv_cache_groups_uniform_page_size``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_flow.counts import counted
from vllm_flow.pipeline_groups import PipelineStages

MAX_GROUPS = 8
"""The most storage groups by default."""
FEW_GROUPS = 4
"""With fewer groups memory is saved so coarsely that a little padding is the better choice."""
MAX_PADDING = 0.05
"""Of the layers: what blocks of a smaller last group may leave empty."""
GROUPS_WITH_A_DRAFTER = 12
"""The most storage groups by default where a drafter's layer comes before a model's, whose number then has other
divisors: 33 layers are 11 groups of 3, or 3 of 11."""
GROUPS_BESIDE_STATES = 5
"""The most storage groups by default where others keep states, of which there are several groups for each."""

Groups = tuple[tuple[int, int], ...]
"""First and last layer of each storage group; of those that attend, where others keep states. Of a pipeline's stages
a group has layers of its own between them, and others have some there, too."""


@dataclass(frozen=True)
class DecoderLayers:
    """A model's decoder layers, as storage groups of ``group_layers`` consecutive ones divide them."""

    num_layers: int
    attending: tuple[int, ...] = ()
    """The layers that attend, ascending, where others keep states; empty where all do."""
    draft_layers: int = 0
    """Layers of a drafter, which come before the model's, numbered from ``-draft_layers`` on. All of them attend,
    and all are in the first group. To be counted beside states, each stands for as many layers as the model has up
    to its first that attends."""
    pipeline: tuple[int, ...] = ()
    """Layers of each stage of a pipeline, beside which all attend and nobody drafts; empty where there is one."""

    def group_sizes(self) -> tuple[int, ...]:
        """Values of ``group_layers`` whose groups vLLM takes as they are, ascending.

        Of layers that all attend the last group holds what is left; beside states all groups have equally many
        layers that attend.
        """
        return tuple(n for n in range(1, self._total + 1) if self._divided(n) is not None)

    def groups(self, group_layers: int) -> Groups:
        """The storage groups.

        Where beside states groups are equal without a drafter alone, its one layer comes to those of the first
        group, which vLLM then divides: that group is there twice.

        Raises:
            ValueError: vLLM would split groups, or the first one has no room for a drafter's layers.
        """
        found = self._divided(group_layers) if 1 <= group_layers <= self._total else None
        if found is None:
            raise ValueError(self._refusal(group_layers))
        return found

    def group_starts(self, group_layers: int) -> tuple[int, ...]:
        """First layer of each storage group; arguments and errors as of :meth:`groups`."""
        return tuple(first for first, _ in self.groups(group_layers))

    def group_of(self, group_layers: int, layer: int) -> tuple[int, int]:
        """First and last layer of the storage group that a layer belongs to; errors as of :meth:`groups`."""
        found = self.groups(group_layers)
        if not self.pipeline:
            return next(group for group in found if group[0] <= layer <= group[1])
        slices = PipelineStages(self.pipeline).slices(len(found))
        return next(
            group
            for group, own in zip(found, slices, strict=True)
            if any(layer in part for part in own)
        )

    def pipeline_padding(self, group_layers: int) -> float:
        """What blocks leave empty on the fullest stage of a pipeline; errors as of :meth:`groups`."""
        return PipelineStages(self.pipeline).padding(len(self.groups(group_layers)))

    def default_group_layers(self) -> int:
        """``group_layers`` where nobody said. More groups save memory more finely, but each costs a block table
        and metadata per step."""
        if self.pipeline:
            return self._default_of_pipeline()
        return self._default_beside_states() if self.attending else self._default_of_all()

    @property
    def _total(self) -> int:
        """Layers of the model, and those that a drafter's count as."""
        return self.num_layers + self.draft_layers * self._stride

    @property
    def _stride(self) -> int:
        """Layers that one of a drafter's counts as."""
        return self.attending[0] + 1 if self.attending else 1

    def _divided(self, group_layers: int) -> Groups | None:
        """:meth:`groups`; None where it refuses."""
        if self.pipeline:
            stages = PipelineStages(self.pipeline)
            groups = stages.groups_of(group_layers)
            if groups is None:
                return None
            return tuple((own[0].start, own[-1].stop - 1) for own in stages.slices(groups))
        if not self.attending:
            return self._consecutive(group_layers)
        equal = self._equal(group_layers)
        if equal is not None or self.draft_layers != 1:
            return equal
        alone = self._without_drafter()._equal(group_layers)
        if alone is None or len(alone) == 1:
            return None
        (_, last), *others = alone
        return (-1, last), (-1, last), *others

    def _consecutive(self, group_layers: int) -> Groups | None:
        """Groups of layers that all attend; None where vLLM would split them, or the drafter has no room."""
        rest = self._total % group_layers
        if group_layers < self.draft_layers or (rest and 2 * group_layers >= 3 * rest):
            return None
        starts = range(-self.draft_layers, self.num_layers, group_layers)
        return tuple((first, min(first + group_layers, self.num_layers) - 1) for first in starts)

    def _equal(self, group_layers: int) -> Groups | None:
        """Groups of as many layers that attend each, the first with all of a drafter; None where they are not."""
        drafts, stride = self.draft_layers, self._stride
        places = [((at + 1) * stride - 1, at - drafts) for at in range(drafts)]
        places += [(layer + drafts * stride, layer) for layer in self.attending]
        members: dict[int, list[int]] = {}
        for at, layer in places:
            members.setdefault(at // group_layers, []).append(layer)
        groups = list(members.values())
        if len(set(map(len, groups))) > 1 or len(groups[0]) < drafts:
            return None
        return tuple((layers[0], layers[-1]) for layers in groups)

    def _without_drafter(self) -> DecoderLayers:
        return replace(self, draft_layers=0)

    def _default_of_all(self) -> int:
        """Equal groups waste nothing: the smallest divisor, where it makes ``FEW_GROUPS`` or more.

        Else (34, 46, 62, 94 layers) the last group may be smaller, if what its blocks leave empty is ``MAX_PADDING``
        of a request without a policy or less; one that evicts loses least, as it stores least in deep layers.
        """
        most = GROUPS_WITH_A_DRAFTER if self.draft_layers else MAX_GROUPS
        sizes = [n for n in self.group_sizes() if -(-self._total // n) <= most]
        equal = next(n for n in sizes if self._total % n == 0)
        if self._total // equal >= FEW_GROUPS:
            return equal
        return next(n for n in sizes if -self._total % n <= MAX_PADDING * self._total)

    def _default_of_pipeline(self) -> int:
        """As many groups up to ``MAX_GROUPS`` as leave nothing empty, where these are ``FEW_GROUPS`` or more.

        Else those that leave least empty, of so many; stages of numbers with a common divisor would leave less.
        """
        stages = PipelineStages(self.pipeline)
        groups = {n: len(self.groups(n)) for n in self.group_sizes()}
        most = {n: count for n, count in groups.items() if count <= MAX_GROUPS}
        several = {n: count for n, count in most.items() if count >= FEW_GROUPS} or most
        return min(several, key=lambda n: (stages.padding(groups[n]), -groups[n]))

    def _default_beside_states(self) -> int:
        """As many equal groups as there may be up to ``GROUPS_BESIDE_STATES``.

        Of the drafter's layers, too, where these groups are three or more; else those that there are without a
        drafter, of which vLLM divides the first one.
        """
        groups = {
            n: len(found)
            for n in range(1, self._total + 1)
            if (found := self._equal(n)) is not None
        }
        few = [n for n, count in groups.items() if count <= GROUPS_BESIDE_STATES]
        equal = max(few, key=lambda n: (groups[n], self._total % n == 0, n))
        if self.draft_layers != 1 or groups[equal] >= 3:
            return equal
        alone = self._without_drafter().default_group_layers()
        return equal if self._divided(alone) is None else alone

    def _refusal(self, group_layers: int) -> str:
        """Why groups cannot have so many layers, and how many they can."""
        drafter, room = "", ""
        usable = ", ".join(map(str, self.group_sizes()))
        if self.pipeline:
            stages = ", ".join(map(str, self.pipeline))
            return (
                f"group_layers={group_layers} does not divide a pipeline's stages of {stages} decoder layers into "
                "storage groups of about that many, with layers of each stage: use one of "
                f"{usable}, or stages of other lengths (VLLM_PP_LAYER_PARTITION)."
            )
        if self.attending:
            if self.draft_layers:
                drafter = f", with {self.draft_layers} of its drafter before them,"
            return (
                f"group_layers={group_layers} parts the {len(self.attending)} of the model's {self.num_layers} "
                f"decoder layers that have keys{drafter} into groups of different sizes, or none; use one of {usable}."
            )
        if self.draft_layers:
            drafter = f", {self.draft_layers} of its drafter before them,"
            room = ", or the drafter no room"
        return (
            f"group_layers={group_layers} leaves the last of the model's {counted(self.num_layers, 'decoder layer')}"
            f"{drafter} a group of no more than two thirds of it, or none at all{room}; use one of {usable}."
        )
