"""Pictures are read as vLLM's server reads them: beside vLLM's own loader, on every odd file we can build."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vllm_flow import pictures
from vllm_flow.pictures import PictureError, as_rgb, decode, decode_as_stored, read_picture

BLACK = (0, 0, 0)


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


BAD = {
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


@pytest.fixture(scope="module")
def server() -> Callable[..., Image.Image]:
    """vLLM's own loader of what a request carries."""
    image = pytest.importorskip("vllm.multimodal.media.image")

    def load(data: bytes, **options: Any) -> Image.Image:
        return image.ImageMediaIO(**options).load_bytes(data).media

    return load


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("background", [pictures.WHITE, (7, 200, 30)])
def test_a_picture_is_what_the_server_sees(
    server: Callable[..., Image.Image], name: str, background: pictures.Colour
) -> None:
    seen = server(FILES[name], rgba_background_color=list(background))
    read = decode(FILES[name], name, background)
    assert (read.mode, read.size) == (seen.mode, seen.size) == ("RGB", seen.size)
    assert read.tobytes() == seen.tobytes()


@pytest.mark.parametrize("name", BAD)
def test_what_the_server_refuses_is_refused_with_a_remedy(
    server: Callable[..., Image.Image], name: str
) -> None:
    data, says = BAD[name]
    with pytest.raises(Exception):  # noqa: B017, PT011  (vLLM lets through what Pillow raises)
        server(data)
    with pytest.raises(PictureError, match=rf"^{name}: .*({says}).*[;,] ?\w+ ") as refused:
        decode(data, name)
    assert "\n" not in str(refused.value)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_damaged_files(server: Callable[..., Image.Image], name: str, data: st.DataObject) -> None:
    """Bytes flipped or cut away: read as the server reads it, or refused as it refuses."""
    whole = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        seen = server(damaged)
    except Exception:
        with pytest.raises(PictureError, match=f"^{name}: "):
            decode(damaged, name)
    else:
        assert decode(damaged, name).tobytes() == seen.tobytes()


def test_the_lists_and_limits_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("vllm.multimodal.image")
    import vllm.envs as envs

    assert pictures.KINDS == image.ALLOWED_IMAGE_FORMATS
    monkeypatch.delenv("VLLM_MAX_IMAGE_PIXELS", raising=False)
    assert pictures.most_pixels() == envs.VLLM_MAX_IMAGE_PIXELS == pictures.MAX_PIXELS
    assert pictures.MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(("most", "taken"), [("90", False), ("91", True), ("0", True)])
def test_the_limit_is_the_servers(
    server: Callable[..., Image.Image], monkeypatch: pytest.MonkeyPatch, most: str, taken: bool
) -> None:
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", most)
    data = FILES["RGB.png"]  # 13 x 7
    if taken:
        assert decode(data, "x").tobytes() == server(data).tobytes()
        return
    with pytest.raises(ValueError, match="exceed"):
        server(data)
    for read in (decode, decode_as_stored):
        with pytest.raises(PictureError, match="x: 13 x 7 pixels, and vLLM's server takes 90"):
            read(data, "x")


def test_a_limit_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "many")
    with pytest.raises(PictureError, match="VLLM_MAX_IMAGE_PIXELS is 'many'"):
        decode(FILES["RGB.png"], "x")


@pytest.mark.parametrize("name", FILES)
def test_what_is_read_says_nothing_of_its_file(name: str) -> None:
    """vLLM turns pictures in memory by their EXIF data as well: what was read must not be turned twice."""
    parse = pytest.importorskip("vllm.multimodal.image")
    for read in (decode, decode_as_stored):
        picture = read(FILES[name], name)
        assert parse.normalize_image(picture).tobytes() == picture.tobytes()


def test_as_stored_is_pillows_conversion() -> None:
    for name, data in FILES.items():
        stored = Image.open(io.BytesIO(data)).convert("RGB")
        assert decode_as_stored(data, name).tobytes() == stored.tobytes(), name
    turned, stored = (read(FILES["exif-6.png"], "x") for read in (decode, decode_as_stored))
    assert turned.size == stored.size[::-1]
    assert decode_as_stored(FILES["gone.png"], "x").getpixel((0, 0)) == (200, 10, 10)
    assert decode(FILES["gone.png"], "x").getpixel((0, 0)) == (255, 255, 255)


def test_a_picture_in_memory_is_filled_too() -> None:
    gone = Image.new("RGBA", (2, 2), (200, 10, 10, 0))
    assert as_rgb(gone).getpixel((0, 0)) == (255, 255, 255)
    assert as_rgb(gone, BLACK).getpixel((0, 0)) == BLACK


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(FILES["RGB.png"],), daemon=True)
    writer.start()
    assert read_picture(pipe).size == (13, 7)
    writer.join()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "gone.png", "there is no such file"),
        (tmp_path, "a directory, not a picture"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (tmp_path / "a\0b", "cannot be read"),
    ):
        with pytest.raises(PictureError, match=says) as refused:
            read_picture(path)
        assert str(refused.value).startswith(str(path))


@pytest.mark.parametrize(
    "value", [[0, 0], [0, 0, 256], [0, 0, -1], ["0", 0, 0], None, [True, 0, 0]]
)
def test_backgrounds_that_are_no_colour(value: Any) -> None:
    with pytest.raises(ValueError, match="three whole numbers"):
        pictures.checked_background(value)


def test_a_background() -> None:
    assert pictures.checked_background([1, 2, 3]) == (1, 2, 3)
