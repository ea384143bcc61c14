"""Picture files of every odd kind that some program writes, and damaged ones, for tests of readers."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def noise(mode: str, width: int = 13, height: int = 7, seed: int = 0) -> Image.Image:
    """A picture of no symmetry, in any of Pillow's modes."""
    rng = np.random.default_rng(seed)
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, (height, width), np.uint8) * 255).convert("1")
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), np.uint16))
    if mode in ("I", "F"):
        values = rng.integers(0, 70_000, (height, width))
        return Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    if mode == "P":
        return noise("RGB", width, height, seed).quantize(11)
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = rng.integers(0, 256, (height, width, bands), np.uint8)
    planes = [Image.fromarray(values[..., band]) for band in range(bands)]
    return Image.merge(mode, planes) if bands > 1 else planes[0]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: Any) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def animation(kind: str) -> bytes:
    frames = [noise("RGB", seed=n) for n in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=40)


def files() -> dict[str, bytes]:
    """Name -> a file that some program writes."""
    rgb, rgba = noise("RGB"), noise("RGBA")
    found = {
        f"exif-{n}.{kind}": saved(rgb, kind, exif=exif(n), **options)
        for n in range(10)
        for kind, options in (("jpeg", {}), ("png", {}), ("webp", {"lossless": True}), ("tiff", {}))
    }
    found |= {f"{mode.replace(';', '')}.png": saved(noise(mode), "png")
              for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")}  # fmt: skip
    found |= {f"{mode}.tiff": saved(noise(mode), "tiff")
              for mode in ("1", "L", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "F", "I")}  # fmt: skip
    palette = noise("P")
    found |= {
        "gone.png": saved(Image.new("RGBA", (5, 5), (200, 10, 10, 0)), "png"),
        "exif-6-rgba.png": saved(rgba, "png", exif=exif(6)),
        "exif-6-p.png": saved(palette, "png", exif=exif(6), transparency=3),
        "p-transparent.png": saved(palette, "png", transparency=3),
        "p-alphas.png": saved(palette, "png", transparency=bytes(range(0, 242, 22))),
        "l-transparent.png": saved(noise("L"), "png", transparency=int(noise("L").getpixel((0, 0)))),
        "rgb-transparent.png": saved(rgb, "png", transparency=rgb.getpixel((0, 0))),
        "rgba.webp": saved(rgba, "webp", lossless=True),
        "cmyk.jpeg": saved(noise("CMYK"), "jpeg"),
        "grey.jpeg": saved(noise("L"), "jpeg"),
        "progressive.jpeg": saved(noise("RGB", 90, 70), "jpeg", progressive=True),
        "animated.gif": animation("gif"),
        "animated.webp": animation("webp"),
        "animated.png": animation("png"),
        "transparent.gif": saved(palette, "gif", transparency=3),
        "pixels.bmp": saved(rgb, "bmp"),
        "pixels.ppm": saved(rgb, "ppm"),
        "icon.ico": saved(rgba.resize((16, 16)), "ico"),
        "not-its-name.jpg": saved(rgb, "png"),
        "exif-broken.jpeg": saved(rgb, "jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12"),
        "one-pixel.png": saved(noise("RGBA", 1, 1), "png"),
    }  # fmt: skip
    return found


FILES = files()


def png_of(width: int, height: int) -> bytes:
    """A PNG that only says how large it is."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


BAD = {  # name -> bytes, what is said of them
    "truncated.jpeg": (FILES["progressive.jpeg"][:900], "damaged or cut short"),
    "truncated.png": (FILES["RGB.png"][:-60], "damaged or cut short"),
    "truncated.webp": (FILES["rgba.webp"][:80], "damaged or cut short"),
    "truncated.tiff": (FILES["RGB.tiff"][:150], "kind|damaged"),
    "large.png": (png_of(20_000, 10_000), "178956970"),
    "huge.png": (png_of(2**31 - 1, 2**31 - 1), "178956970"),
    "empty.png": (b"", "no picture of a kind"),
    "text.jpg": (b"<html>404</html>", "no picture of a kind"),
    "head.png": (b"\x89PNG\r\n\x1a\n", "no picture of a kind|damaged"),
    "page.eps": (saved(noise("RGB"), "eps"), "no picture of a kind"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no picture of a kind"),
}  # fmt: skip
