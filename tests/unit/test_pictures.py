"""Pictures are read as vLLM's server reads them: beside vLLM's own loader, on every odd file we can build."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.unit.odd_pictures import BAD, FILES
from vllm_flow import pictures
from vllm_flow.pictures import PictureError, as_rgb, decode, decode_as_stored, read_picture

BLACK = (0, 0, 0)


@pytest.fixture(scope="module")
def server() -> Callable[..., Image.Image]:
    """vLLM's own loader of what a request carries."""
    image = pytest.importorskip("vllm.multimodal.media.image")
    from vllm import envs

    envs.disable_envs_cache()  # an engine in this process has limits remembered

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
