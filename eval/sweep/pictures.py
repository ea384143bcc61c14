"""Reads the pictures of a batch, and what is done to one before the model's own processor sees it.

Knows PIL and how items name their pictures; nothing of policies or engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.pictures import WHITE, Colour, PictureError, checked_background

if TYPE_CHECKING:
    from PIL.Image import Image

PREPARATIONS = ("pad", "plain")
CHOICES = ("auto", *PREPARATIONS)
"""What `--image-preparation` may say."""
PADDING = ("llava-1.5",)
"""Conversations of models whose authors pad pictures."""


def add_option(group: Any, more: str = "") -> None:
    """Declare ``--image-preparation`` in a group of a parser; ``more`` ends its help."""
    group.add_argument(
        "--image-preparation",
        choices=CHOICES,
        default="auto",
        help="pad to a square as LLaVA-1.5 does, leave alone as a server does, or (default) pad where the "
        f"conversation is LLaVA-1.5's and the task's authors did{more}",
    )


READERS = 4
"""Threads that read and decode a batch's pictures."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""CLIP's channel means, for values in [0, 1]."""


def pad_to_square(image: Image, mean: Sequence[float] = CLIP_MEAN) -> Image:
    """The picture in the middle of a square of the mean colour (LLaVA-1.5's `expand2square`).

    The colour is truncated, not rounded, to whole values, and the smaller margin comes first, as
    in LLaVA's code: scores are compared with those it gave.
    """
    from PIL import Image as image_module

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = image_module.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def preparation(asked: str, task: str, conversation: str) -> str:
    """What is done to a task's pictures: one of `PREPARATIONS`.

    Args:
        asked: one of `CHOICES`; `auto` leaves it to the task.
        task: `Task.image_preparation`; `conversation` leaves it to the conversation.
        conversation: its name, which may be none of those that pad.
    """
    if asked != "auto":
        return asked
    if task != "conversation":
        return task
    return "pad" if conversation in PADDING else "plain"


def prepare(image: Image, preparation: str) -> Image:
    """The picture as the model's processor is to see it; `preparation` is one of `PREPARATIONS`."""
    if preparation == "pad":
        return pad_to_square(image)
    if preparation == "plain":
        return image
    raise ValueError(f"image preparation {preparation!r}: it must be one of {PREPARATIONS}")


def background_of(engine_args: Mapping[str, Any]) -> Colour:
    """The colour behind transparent pixels, where a server's flags have it; ValueError where it is none."""
    found: Any = engine_args
    for name in ("media_io_kwargs", "image", "rgba_background_color"):
        found = found.get(name) if isinstance(found, Mapping) else None
        if found is None:
            return WHITE
    return checked_background(found)


def read_pictures(
    items: Sequence[Mapping[str, Any]], background: Colour = WHITE
) -> dict[Any, Image | Exception]:
    """Each distinct picture of a batch, prepared, or why it cannot be read; by `picture_key`."""
    wanted = {picture_key(item): item for item in items if item["image"] is not None}

    def read(item: Mapping[str, Any]) -> Image | Exception:
        try:
            picture = load_image(item["image"], item["reading"], background)
            return prepare(picture, item["preparation"])
        # Whatever it is (no memory for the padded square, ...), it concerns this picture only.
        except Exception as error:
            return error

    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(wanted, readers.map(read, wanted.values()), strict=True))


def unreadable(item: Mapping[str, Any], error: Exception) -> str:
    """The reason recorded for an item whose picture cannot be read."""
    if isinstance(error, PictureError):
        return f"image unreadable: {error}"
    return f"image unreadable: {item['image']}: {type(error).__name__}: {error}"


def picture_key(item: Mapping[str, Any]) -> Any:
    keys = ("image", "preparation", "reading")
    return tuple(item[key] for key in keys) if item["image"] is not None else None
