"""The inputs of a step's plan, and the plan itself, as data. Integers only.

Terms. A *row* is one token of the step's flattened batch. A *variant* is a range of layers in which
the same rows are alive. Packed positions: see `layout`. With a drawing: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from vllm_flow.layout import TokenLayout
from vllm_flow.layout_stages import Choice
from vllm_flow.mutual import reached
from vllm_flow.spans import IntArray, Range


class StepShares(NamedTuple):
    """Which tokens of which requests a step computes: parallel, in the order of the batch's rows."""

    request_ids: Sequence[str]
    num_computed: Sequence[int]
    """Tokens of each before the step, as the host was told."""
    num_scheduled: Sequence[int]
    """Tokens of each in it."""


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's share of a step: tokens ``[num_computed, num_computed + num_scheduled)``."""

    num_computed: int
    num_scheduled: int
    layout: TokenLayout | None = None
    mutual: tuple[Range, ...] = ()
    """Ranges of its prompt whose tokens see one another, as far as the step reaches them."""


def scheduled_request(
    num_computed: int,
    num_scheduled: int,
    layout: TokenLayout | None,
    mutual: Sequence[Range] = (),
) -> ScheduledRequest:
    """A request's share of a step, with its layout where that has effect on these tokens.

    Args:
        mutual: all ranges of its prompt whose tokens see one another.

    Raises:
        ValueError: images leave after the prompt, and the step has tokens of it and behind it, which
            the scheduler never does.
    """
    end = num_computed + num_scheduled
    if layout is not None and layout.late:
        if num_computed < layout.prompt_tokens < end:
            raise ValueError(
                f"tokens {num_computed} to {end} are computed in one step, but images leave before "
                f"token {layout.prompt_tokens}"
            )
        layout = layout if layout.gone_by(end) else None
    return ScheduledRequest(num_computed, num_scheduled, layout, reached(mutual, num_computed, end))


@dataclass(frozen=True, slots=True)
class Ranking:
    """One image of a step of which the device chooses what stays; M rows of which K stay.

    Rows of a variant and slots of a request: all integers are known before anything runs.
    """

    request: int
    """Batch index."""
    choice: Choice
    picture: str
    """What names the image's embeddings, see :attr:`vllm_flow.layout.TokenLayout.pictures`."""
    first_row: int
    """Row of the step that is the image's first."""
    source: int
    """First of the M rows in the variant before."""
    target: int
    """First of the K rows in this variant."""
    query: int
    """Row of the variant before whose attention ranks: the last of the M, or the prompt's last."""
    first_key: int
    """Slot of the first of the M rows in the layer before the variant."""
    visible: int
    """Slots that the query row sees there."""
    question_row: int
    """Row of the step that is the prompt's first behind its last image, where a rank looks at the prompt."""
    question: int
    """Rows from there to the prompt's last, ``query``; they are never dropped."""

    @property
    def key(self) -> tuple[int, int, str]:
        """Request, image and rank: what stages of an image with one rank share, its order or its weights."""
        return self.request, self.choice.image, self.choice.rank


@dataclass(frozen=True, slots=True)
class Variant:
    """Rows and positions for the layers from ``first_layer`` up to the next variant's.

    R rows of Q requests are alive. A request whose scheduled tokens are all evicted has no row
    and is left out of ``requests``; with R = 0 the layers have nothing to do at all.
    """

    first_layer: int
    rows: IntArray | None
    """[R] indices into the step's rows, ascending; None where every row is alive."""
    gather: IntArray | None
    """[R] indices into the rows of the variant before; None where nothing is dropped here."""
    row_requests: IntArray
    """[R] batch index of each row's request."""
    positions: IntArray
    """[R] position of each row in its request's storage: packed where the request evicts."""
    requests: IntArray
    """[Q] batch indices of the requests with at least one row, ascending."""
    query_start_loc: IntArray
    """[Q + 1] first row of each request, then R."""
    seq_lens: IntArray
    """[Q] stored tokens of each request after the step."""
    rankings: tuple[Ranking, ...] = ()
    """Images whose part of ``gather``, and so of ``rows``, only the device knows: each takes its K
    places in it. Until then the first rows of the image stand there."""
    mutual: Mapping[int, tuple[Range, ...]] = field(default_factory=dict)
    """Index into ``requests`` -> storage positions whose tokens see one another in both directions."""

    @property
    def num_rows(self) -> int:
        return len(self.row_requests)

    @property
    def continues_states(self) -> bool:
        """Whether a layer that keeps a state per request takes in the step's own rows, each request's after
        others: it need not know of the images that left before."""
        lengths = self.query_start_loc[1:] - self.query_start_loc[:-1]
        return self.rows is None and bool((self.seq_lens > lengths).all())

    def taken_up(self, layer: int) -> Variant:
        """The same from one of its layers on, out of all rows of the step: another worker has run the layers before,
        has made what choices there are, and put the rows that had left back to their places."""
        return replace(self, first_layer=layer, gather=self.rows, rankings=())

    @property
    def max_query_len(self) -> int:
        starts = self.query_start_loc
        return int((starts[1:] - starts[:-1]).max(initial=0))

    @property
    def max_seq_len(self) -> int:
        return int(self.seq_lens.max(initial=0))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step's layers past the first stage do; the layers before it run as in stock vLLM."""

    num_rows: int
    variants: tuple[Variant, ...]
    """By ascending ``first_layer``; never empty."""
    seq_lens: IntArray
    """[N] tokens of each request of the batch after the step, those that left among them."""

    def variant_at(self, layer: int) -> Variant | None:
        """The variant of a layer, None before the first stage."""
        current = None
        for variant in self.variants:
            if variant.first_layer <= layer:
                current = variant
        return current

    def of_layers(self, layers: range) -> StepPlan | None:
        """What of the plan is for a worker that runs these layers alone, given and giving all rows of the step.

        What begins right behind them is, too, where a device has chosen by then: it looks at their last one, or is to
        be told what is alive behind that. None where nothing is: no stage begins before their end.
        """
        chosen = any(v.rankings for v in self.variants if v.first_layer <= layers.stop)
        ours = tuple(
            v for v in self.variants if layers.start <= v.first_layer < layers.stop + chosen
        )
        if layers.start:
            first = self.variant_at(layers.start)
            later = tuple(v for v in ours if v is not first)
            ours = later if first is None else (first.taken_up(layers.start), *later)
        elif len(ours) == len(self.variants):
            return self  # before layer 0 nobody has run anything
        return replace(self, variants=ours) if ours else None
