"""Reads a picture file as vLLM's server reads it, so that every command looks at what is served.

In the server's order: a kind that it takes, no more pixels than it takes, turned as EXIF says, the first
frame of an animation, and what is transparent on a background. Knows PIL; neither vLLM nor torch.
`tests/unit/test_pictures.py` compares it with vLLM's own loader, file by file.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
"""What vLLM puts behind transparent pixels unless `--media-io-kwargs` has an `rgba_background_color`."""

KINDS = (
    "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF", "ICNS",
    "ICO", "IM", "IMT", "IPTC", "JPEG", "JPEG2000", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "PNG",
    "PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB",
)  # fmt: skip
"""Pillow's names of what vLLM's server takes; the others run programs or decode nothing."""

MAX_PIXELS = 178_956_970
"""What vLLM's server takes by default, and Pillow at most."""

READINGS = ("server", "stored")
"""How pictures can be read: as the server does, or by `decode_as_stored`."""


class PictureError(ValueError):
    """A file is no picture that can be shown to a model; the message names it and says what to do."""


def read_picture(path: Path | str, background: Colour = WHITE) -> Image:
    """The picture in a file, RGB, as vLLM's server sees it; the file is read once, so a pipe will do.

    Args:
        background: behind transparent pixels.

    Raises:
        PictureError: there is no such file, or no such picture in it.
    """
    return decode(read_bytes(path), str(path), background)


def decode(data: bytes, name: str, background: Colour = WHITE) -> Image:
    """The picture in a file's bytes, RGB, as vLLM's server sees it; `name` stands for it in messages.

    Raises:
        PictureError: the bytes are no picture that the server takes.
    """
    from PIL import ImageOps

    with _explained(name):
        image = _opened(data)
        _check_size(image.size, name)
        # As in vLLM: EXIF data that cannot be understood turns nothing.
        with contextlib.suppress(Exception):
            image = ImageOps.exif_transpose(image)
        image.load()
        return _bare(as_rgb(image, background))


def decode_as_stored(data: bytes, name: str) -> Image:
    """The picture in a file's bytes as LLaVA's and OPERA's code reads it, by `Image.convert("RGB")`.

    EXIF turns nothing, and a transparent pixel shows the colour that is stored under it.

    Raises:
        PictureError: see :func:`decode`.
    """
    with _explained(name):
        image = _opened(data)
        _check_size(image.size, name)
        return _bare(image.convert("RGB"))


def as_rgb(image: Image, background: Colour = WHITE) -> Image:
    """An open picture as RGB, what is transparent in it on `background`."""
    from PIL import Image as image_module

    if image.mode == "RGB":  # also one whose file names a transparent colour, as in vLLM
        return image
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    filled = image_module.new("RGB", image.size, background)
    filled.paste(image, mask=image.getchannel("A"))
    return filled


def read_bytes(path: Path | str) -> bytes:
    """A file's bytes; PictureError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise PictureError(f"{path}: there is no such file; check the path") from None
    except IsADirectoryError:
        raise PictureError(f"{path}: a directory, not a picture; name a file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{path}: cannot be read ({reason}); check the path") from None


def checked_background(value: Any) -> Colour:
    """A colour from a user, as vLLM takes it for `rgba_background_color`; ValueError otherwise."""
    if (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(type(part) is int and 0 <= part <= 255 for part in value)
    ):
        return (value[0], value[1], value[2])
    raise ValueError(f"{value!r} is no colour: write three whole numbers from 0 to 255")


def _opened(data: bytes) -> Image:
    from PIL import Image as image_module

    return image_module.open(io.BytesIO(data), formats=KINDS)


def _bare(image: Image) -> Image:
    """The pixels without what the file says of them: vLLM turns a picture in memory by its EXIF data too."""
    bare = image.copy()
    bare.info = {}
    return bare


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    most = most_pixels()
    if 0 < most < width * height:
        raise PictureError(
            f"{name}: {width} x {height} pixels, and vLLM's server takes {most} (VLLM_MAX_IMAGE_PIXELS); "
            "make the picture smaller"
        )


def most_pixels() -> int:
    """Pixels of the largest picture that vLLM's server takes; 0: whatever Pillow takes.

    vLLM's own variable, read as vLLM reads it; ValueError where it holds no number.
    """
    text = os.environ.get("VLLM_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
    try:
        return int(text)
    except ValueError:
        raise PictureError(
            f"VLLM_MAX_IMAGE_PIXELS is {text!r}; it must be a whole number"
        ) from None


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what decoders raise into one sentence about the file."""
    from PIL import Image as image_module
    from PIL import UnidentifiedImageError

    try:
        yield
    except PictureError:
        raise
    except image_module.DecompressionBombError:
        raise PictureError(
            f"{name}: more than {MAX_PIXELS} pixels, which vLLM's server does not take; make the picture "
            "smaller"
        ) from None
    except UnidentifiedImageError:
        raise PictureError(
            f"{name}: no picture of a kind that vLLM's server reads; save it as PNG, JPEG or WebP"
        ) from None
    # Decoders raise what they like for damaged files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise PictureError(f"{name}: damaged or cut short ({reason}); get the file again") from None
