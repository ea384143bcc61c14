"""Collects and renders the pictures the scenes are composed of. Downloads through npm, pip, apt only.

Drawings: Noto, Twemoji, Fluent (training and the seen style), OpenMoji (held out as the unseen style).
Photo cut-outs: Tux Paint stamps, GPL-2, used to train and never shipped.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from vllm_flow.demo.classes import CLASSES

SEEN_SETS = ("noto", "twemoji", "fluent-emoji-flat")
UNSEEN_SET = "openmoji"
SPRITE_SIZE = 128

DRAWINGS: dict[str, str] = {
    "dog": "dog dog-face guide-dog poodle service-dog",
    "cat": "cat cat-face black-cat",
    "bird": "bird eagle dove parrot",
    "horse": "horse horse-face",
    "cow": "cow cow-face ox",
    "elephant": "elephant",
    "rabbit": "rabbit rabbit-face",
    "fish": "fish tropical-fish blowfish",
    "butterfly": "butterfly",
    "car": "automobile oncoming-automobile sport-utility-vehicle taxi oncoming-taxi police-car",
    "bus": "bus oncoming-bus trolleybus",
    "train": "locomotive train high-speed-train bullet-train",
    "airplane": "airplane small-airplane",
    "bicycle": "bicycle",
    "boat": "sailboat speedboat motor-boat",
    "rocket": "rocket",
    "tree": "deciduous-tree evergreen-tree palm-tree christmas-tree",
    "flower": "sunflower tulip rose hibiscus blossom cherry-blossom",
    "apple": "red-apple green-apple",
    "banana": "banana",
    "clock": "alarm-clock mantelpiece-clock three-oclock ten-oclock",
    "cup": "hot-beverage teacup-without-handle",
    "guitar": "guitar",
    "camera": "camera camera-with-flash",
}
"""Class -> names of the drawings in the emoji sets."""

STAMPS: dict[str, str] = {
    "dog": "animals/mammals/dogs/dog animals/mammals/dogs/dingo",
    "cat": "animals/mammals/cats/kitten",
    "bird": "animals/birds/blackbird animals/birds/crow animals/birds/cuckoo animals/birds/lark "
    "animals/birds/magpie animals/birds/pigeon animals/birds/seagull animals/birds/silver-gull "
    "animals/birds/adelaide-rosella animals/birds/rainbow-lorikeet animals/birds/swallow "
    "seasonal/easter/bluebird",
    "horse": "animals/mammals/equines/horse",
    "cow": "animals/mammals/bovines/cow animals/mammals/bovines/cow_white",
    "elephant": "animals/mammals/elephant",
    "rabbit": "animals/mammals/rabbit_little animals/mammals/rodents/rabbit "
    "animals/mammals/rodents/rabbit-2",
    "fish": "animals/fish/bluegroper animals/fish/butterflyfish animals/fish/clownfish "
    "animals/fish/coraltrout animals/fish/dolphinfish animals/fish/lionfish "
    "animals/fish/moonwrasse animals/fish/stripedfish",
    "butterfly": "animals/insects/cartoon/butterfly animals/insects/cartoon/monarchbutterfly "
    "seasonal/easter/butterfly",
    "car": "vehicles/auto/beetle vehicles/auto/sedan vehicles/auto/sportscar "
    "vehicles/auto/sportscar2 vehicles/auto/sportscar3",
    "bus": "vehicles/masstransit/green_korean_bus vehicles/iso_bus "
    "vehicles/masstransit/cartoon/double_decker_bus vehicles/masstransit/cartoon/schoolbus",
    "train": "vehicles/locomotive/white_train vehicles/locomotive/cartoon/toy_train",
    "airplane": "vehicles/flight/planes/747 vehicles/flight/planes/plane "
    "vehicles/flight/planes/cartoon/plane",
    "bicycle": "vehicles/cycle/bluebike",
    "boat": "vehicles/ship/chineseJunk vehicles/ship/sail_boat1 vehicles/ship/sail_boat2 "
    "vehicles/ship/walnutBoat vehicles/ship/cartoon/tugboat",
    "rocket": "space/rocket1 space/rocket2 space/rocket3 space/rocket4 space/rocket5",
    "tree": "plants/trees/birch plants/trees/liberia-palm plants/trees/tree336 plants/trees/holm_oak",
    "flower": "plants/flowers/iris plants/flowers/rose plants/flowers/whitestar-petunia "
    "plants/flowers/red-gazania plants/flowers/daffodil plants/flowers/yellow-flower "
    "plants/flowers/marigold plants/flowers/anemone_red plants/flowers/flower1 "
    "plants/flowers/flower2 plants/flowers/flower3 plants/flowers/flower5 plants/flowers/flower6 "
    "plants/flowers/flower8 plants/flowers/flower10",
    "apple": "food/fruit/apple_fuji food/fruit/apple_granny_smith food/fruit/apple_green "
    "food/fruit/apple_red food/fruit/cartoon/apple",
    "banana": "food/fruit/banana food/fruit/cartoon/banana",
    "clock": "symbols/clock symbols/clockface",
    "cup": "household/dishes/coffeecup household/dishes/expresso household/dishes/mug",
    "guitar": "hobbies/music/string/guitar_electric hobbies/music/string/guitar_classical "
    "hobbies/music/string/guitar2",
    "camera": "household/electronics/camera household/electronics/digitalcamera hobbies/camera_35mm",
}
"""Class -> Tux Paint stamps (photo cut-outs and drawings), paths without their suffix."""


def fetch(work: Path) -> None:
    """Download the emoji sets (npm) and the stamps (apt) into ``work``; does nothing twice."""
    for name in (*SEEN_SETS, UNSEEN_SET):
        target = work / "emoji" / f"{name}.json"
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", f"@iconify-json/{name}", "--silent"],
            cwd=target.parent, check=True, capture_output=True, text=True,
        ).stdout.strip().splitlines()[-1]  # fmt: skip
        with tarfile.open(target.parent / packed) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None
            target.write_bytes(member.read())
    if not (work / "stamps").exists():
        subprocess.run(["apt-get", "download", "tuxpaint-stamps-default"], cwd=work, check=True)
        package = next(work.glob("tuxpaint-stamps-default_*.deb"))
        subprocess.run(["dpkg-deb", "-x", package.name, "unpacked"], cwd=work, check=True)
        (work / "unpacked/usr/share/tuxpaint/stamps").rename(work / "stamps")


def render_svg(svg: str) -> Image.Image:
    """An SVG text as RGBA, longer side ``SPRITE_SIZE``."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE_SIZE, height=SPRITE_SIZE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _trimmed(sprite: Image.Image) -> Image.Image:
    """Without its transparent margin, longer side at most ``SPRITE_SIZE``."""
    box = sprite.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox()
    out = sprite.crop(box) if box else sprite
    out.thumbnail((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)
    return out


def drawings(work: Path, sets: Iterable[str]) -> dict[str, list[Image.Image]]:
    """Class -> RGBA sprites of the named emoji sets."""
    found: dict[str, list[Image.Image]] = {name: [] for name in CLASSES}
    for set_name in sets:
        icons = json.loads((work / "emoji" / f"{set_name}.json").read_text())
        for cls, names in DRAWINGS.items():
            for name in names.split():
                name = icons.get("aliases", {}).get(name, {}).get("parent", name)
                icon = icons["icons"][name]
                width = icon.get("width", icons.get("width", 16))
                height = icon.get("height", icons.get("height", 16))
                svg = (
                    f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                    f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
                )
                found[cls].append(_trimmed(render_svg(svg)))
    return found


def stamps(work: Path) -> dict[str, list[Image.Image]]:
    """Class -> RGBA sprites of the Tux Paint stamps (GPL: for training only)."""
    found: dict[str, list[Image.Image]] = {name: [] for name in CLASSES}
    for cls, names in STAMPS.items():
        for name in names.split():
            png, svg = work / "stamps" / f"{name}.png", work / "stamps" / f"{name}.svg"
            sprite = (
                Image.open(png).convert("RGBA") if png.exists() else render_svg(svg.read_text())
            )
            found[cls].append(_trimmed(sprite))
    return found


def photos() -> list[Image.Image]:
    """Photographs used as training backgrounds: scikit-image's textures without any known object."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    names = ("brick.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "ihc.png")
    return [Image.open(folder / name).convert("RGB") for name in names]
