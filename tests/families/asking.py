"""What an engine is asked about a tiny checkpoint: pictures between words, under any policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from tests.families.making import Checkpoint, film, picture, words


@dataclass(frozen=True)
class Ask:
    """One request; ``cliff`` None is the baseline."""

    text: str
    pictures: tuple[Image.Image, ...]
    cliff: int | None = None
    films: tuple[Any, ...] = ()
    stages: str = ""
    """``flow_stages``, in the place of a cliff."""

    late: bool = False
    """Whether the pictures leave after the prefill."""

    @property
    def keys(self) -> dict[str, Any] | None:
        if self.stages:
            return {"flow_stages": self.stages}
        when = {"flow_when": "decode"} if self.late else {}
        return None if self.cliff is None else {"flow_cliff": self.cliff, **when}


def prompts_of(checkpoint: Checkpoint) -> tuple[Ask, Ask]:
    """Text around one picture; around two of different sizes, or the same one under other words."""
    first, second = checkpoint.sizes
    mark, numbered = checkpoint.image, checkpoint.second or checkpoint.image
    if checkpoint.video:
        if not mark:
            texts = [
                f"{words(5, seed)} {checkpoint.video} {words(7, 500 + seed)}" for seed in (1, 2)
            ]
            return (
                Ask(texts[0], (), films=(film(3, first, frames=3),)),
                Ask(texts[1], (), films=(film(4, second),)),
            )
        film_of_two, mixed = film(4, first), f"{words(3, 2)} {checkpoint.video} {words(6, 502)}"
        return (
            Ask(f"{words(5, 1)} {checkpoint.video} {words(7, 501)}", (), films=(film(3, first),)),
            Ask(f"{mixed} {mark} {words(4, 503)}", (picture(3, second),), films=(film_of_two,)),
        )
    if checkpoint.single:
        one, two = (f"{words(5, seed)} {mark} {words(7, 500 + seed)}".strip() for seed in (1, 2))
        return Ask(one, (picture(1, first),)), Ask(two, (picture(1, first),))
    return (
        Ask(f"{words(5, 1)} {mark} {words(7, 501)}", (picture(1, first),)),
        Ask(
            f"{words(3, 2)} {mark} {words(6, 502)} {numbered} {words(4, 503)}",
            (picture(2, first), picture(3, second)),
        ),
    )


def every_cliff(checkpoint: Checkpoint, cliffs: Sequence[int | None]) -> list[Ask]:
    """Both prompts at each cliff, one batch."""
    return [replace(ask, cliff=cliff) for ask in prompts_of(checkpoint) for cliff in cliffs]
