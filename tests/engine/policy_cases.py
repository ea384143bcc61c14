"""Requests that keep some image tokens: every rank, one stage and several, and what may share a batch with them."""

from __future__ import annotations

from dataclasses import replace

from tests.engine.cases import Ask, adjacent_images, mixed, one_image, text_only, two_images
from tests.engine.tiny_llava import words

PLACE = (
    "1:50% uniform",
    "0:7 uniform",
    "2:1/3 random, 4:0",
    "1:60% uniform, 3:30% random, 5:5 uniform",
    "3:100% uniform, 4:20% uniform",
)
"""Stages ranked by place, for a decoder of six layers."""

DEVICE = (
    "0:50% diversity",
    "0:71/144 diversity, 3:0",
    "1:50% last_image",
    "2:50% last_prompt",
    "2:60% last_image, 4:20% last_image, 5:0",
    "1:75% uniform, 3:30% last_image, 5:10 random",
    "1:60% last_image, 3:30% uniform, 4:10% diversity",
    "0:60% diversity, 2:40% diversity, 4:10% last_prompt",
    "1:50% last_prompt, 2:25% last_prompt, 3:12 last_prompt",
    "0:50% cls_attention",
    "0:60% cls_attention, 2:30% cls_attention, 4:10% last_prompt",
    "1:75% uniform, 3:30% cls_attention",
    "1:30% cls_diverse, 4:15% diversity",
    "0:60% received_attention, 3:20% last_prompt",
)
"""Stages of which the device chooses some."""


ROWS = (
    "1:50% question",
    "2:40% raters",
    "1:60% feather, 3:20% unrotated",
    "2:40% unrotated, 4:0",
    "1:50% dart",
    "0:70% diversity, 2:60% dart, 4:30% raters",
    "1:70% question, 3:40% dart, 4:9 last_prompt",
    "2:60% feather, 3:40% uniform, 5:3 dart",
)
"""Stages of which the device chooses some by many rows of a layer."""


def row_mixed(shift: int = 0) -> tuple[Ask, ...]:
    """Ranks by many rows with one image and two, in a batch with others."""
    asks = [replace(one_image(170 + n + shift), stages=stages) for n, stages in enumerate(ROWS)]
    asks += [replace(two_images(180 + n + shift), stages=stages) for n, stages in enumerate(ROWS)]
    asks += [
        replace(adjacent_images(190 + shift), stages=ROWS[5]),
        replace(two_images(191 + shift), stages=("1:40% dart", "3:9 dart")),
        replace(two_images(192 + shift), stages=("2:0", "2:25% raters")),
        replace(one_image(193 + shift, before=0, after=1), stages="2:25% raters, 4:7% dart"),
        replace(text_only(194), stages=ROWS[4]),
    ]
    return (*asks, *device_mixed(6, shift)[::6])


def place_mixed(layers: int) -> tuple[Ask, ...]:
    """Ranks by place with one image and two, per-image lists, cliffs, the baseline and text in one batch."""
    asks = [replace(one_image(40 + n), stages=stages) for n, stages in enumerate(PLACE)]
    asks += [replace(two_images(50 + n), stages=stages) for n, stages in enumerate(PLACE)]
    asks += [
        replace(one_image(60, before=0, after=3), stages="2:1/3 random", seed=7),
        replace(two_images(61), stages=("1:0", "4:25% uniform")),
        replace(adjacent_images(62), stages=("3:9 uniform", f"{layers}:0")),
        replace(two_images(63), stages=("5:0", "2:0")),
        replace(text_only(64), stages="2:50% uniform"),
    ]
    return (*asks, *mixed(layers)[:5])


def device_mixed(layers: int, shift: int = 0) -> tuple[Ask, ...]:
    """Every rank of the device with one image and two, ranks by place, cliffs, the baseline and text."""
    asks = [replace(one_image(70 + n + shift), stages=stages) for n, stages in enumerate(DEVICE)]
    asks += [replace(two_images(80 + n + shift), stages=stages) for n, stages in enumerate(DEVICE)]
    asks += [
        replace(adjacent_images(91 + shift), stages=DEVICE[4]),
        replace(two_images(92 + shift), stages=("1:40% last_image", "3:9 last_image")),
        replace(two_images(93 + shift), stages=("2:0", "0:25% diversity")),
        replace(text_only(94), stages=DEVICE[3]),
    ]
    return (*asks, *place_mixed(layers)[::4])


BEHIND = (
    "1:50% last_prompt, 4:20% last_prompt",
    "3:50% last_prompt",
    "4:30% diversity, 5:0",
    "0:60% cls_attention, 3:30% cls_attention",
    "2:60% uniform, 4:40% raters",
    "3:60% feather, 5:20% unrotated",
    "0:60% visionzip, 4:9 last_prompt",
    "2:50% question, 3:30% random, 5:10% diversity",
    "1:60% last_image, 3:40% raters, 5:10% received_attention",
    "4:30% cls_diverse, 5:0",
)
"""Stages of which the device chooses some before a border between three layers and three, at it and behind it, by what
is known on either side."""


def behind_mixed(shift: int = 0) -> tuple[Ask, ...]:
    """Choices that a pipeline's stages hand on, beside requests without any; some of them made after the prefill."""
    asks = [replace(one_image(220 + n + shift), stages=stages) for n, stages in enumerate(BEHIND)]
    asks += [
        replace(two_images(230 + shift), stages=("1:30% last_image", "4:25% last_image")),
        replace(adjacent_images(231 + shift), stages=BEHIND[2]),
        replace(two_images(232 + shift), stages=("2:0", "5:25% diversity")),
        replace(one_image(233 + shift), stages=LATE[3], late=True),
        replace(one_image(234 + shift), stages=LATE[1], late=True),
        replace(one_image(235 + shift), stages="4:30% last_prompt, 5:0", late=True),
    ]
    return (*asks, one_image(236 + shift, 2), one_image(237 + shift), text_only(238 + shift))


LATE = (
    "1:50% last_prompt",
    "2:60% last_prompt, 4:20% random",
    "1:70% uniform, 3:20% last_prompt, 5:0",
    "1:60% last_prompt, 3:30% last_prompt, 4:7 last_prompt",
)
"""Stages by attention that can be made once the prompt is computed."""


def late_mixed(layers: int) -> tuple[Ask, ...]:
    """What leaves after the prefill, by cliffs and stages; and cliffs, stages, the baseline beside it."""
    asks = [
        replace(one_image(100 + cliff, cliff), late=True, max_tokens=24) for cliff in range(layers)
    ]
    asks += [
        replace(two_images(110 + n), stages=stages, late=True) for n, stages in enumerate(PLACE)
    ]
    asks += [
        replace(ask(n), stages=stages, late=True)
        for ask, n in ((one_image, 140), (two_images, 150))
        for n, stages in enumerate(LATE, n)
    ]
    asks += [
        replace(one_image(120, 2, before=33, after=70), late=True, max_tokens=1),
        replace(one_image(121, 3), late=True, max_tokens=2),
        replace(adjacent_images(122), stages=("1:0", "4:25% uniform"), late=True),
        replace(one_image(123, 2, before=40), late=True, samples=2),
        replace(text_only(124, 2), late=True),
        Ask(f"{words(4, 126)} <image>", (126,), 2, late=True),
    ]
    return (*asks, *place_mixed(layers)[::3])
