"""Collects and renders what scenes are composed of. Downloads through npm and apt only.

Everything lies below a work folder: ``emoji/*.json``, ``stamps/``, ``clipart/``, ``desktops/``; rendered
sprites are kept in ``sprites.npz``, since rendering takes a minute.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from vllm_flow.demo_model.training import backgrounds, sources
from vllm_flow.demo_model.vocabulary import CLASSES

SPRITE_SIZE = 112
"""Longer side of a stored sprite in pixels: the largest at which scenes show one."""

SpriteTable = dict[str, list[Image.Image]]
"""Class name -> RGBA cut-outs, trimmed to their content."""

DEBIAN = {
    "stamps": ("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps"),
    "clipart": ("openclipart-png", "usr/share/openclipart/png"),
    "desktops": ("mate-backgrounds", "usr/share/backgrounds/mate"),
}
"""Folder -> Debian package, and where in it the files are."""


@dataclass(frozen=True)
class Assets:
    """Sprites by origin, and photographs for backgrounds."""

    drawings: SpriteTable
    """Of ``SEEN_SETS``: what shipped scenes of the seen style are made of."""
    extra: SpriteTable
    """Other drawings, for training alone."""
    photos: SpriteTable
    """Photo cut-outs that training sees."""
    unseen_drawings: SpriteTable
    unseen_photos: SpriteTable
    backgrounds: list[Image.Image] = field(default_factory=list)
    unseen_backgrounds: list[Image.Image] = field(default_factory=list)


def fetch(work: Path) -> None:
    """Download what is missing below ``work``; does nothing twice."""
    for name in (*sources.SEEN_SETS, *sources.FURTHER_SETS, sources.UNSEEN_SET):
        _fetch_emoji(work / "emoji", name)
    for folder, (package, inside) in DEBIAN.items():
        if not (work / folder).exists():
            subprocess.run(["apt-get", "download", package], cwd=work, check=True)
            deb = next(work.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", deb.name, f"unpacked-{folder}"], cwd=work, check=True)
            (work / f"unpacked-{folder}" / inside).rename(work / folder)


def _fetch_emoji(folder: Path, name: str) -> None:
    target = folder / f"{name}.json"
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(
        ["npm", "pack", f"@iconify-json/{name}", "--silent"],
        cwd=folder, check=True, capture_output=True, text=True,
    )  # fmt: skip
    with tarfile.open(folder / run.stdout.strip().splitlines()[-1]) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None
        target.write_bytes(member.read())


def load_assets(work: Path) -> Assets:
    """Everything, rendered; from ``sprites.npz`` where that is there."""
    cache = work / "sprites.npz"
    if not cache.exists():
        fetch(work)
        _store(cache, _render_all(work))
    tables = _restore(cache)
    return Assets(
        **tables,
        backgrounds=_backgrounds(work, backgrounds.DESKTOPS, backgrounds.BACKGROUNDS),
        unseen_backgrounds=_backgrounds(work, backgrounds.UNSEEN_DESKTOPS, ()),
    )


def _render_all(work: Path) -> dict[str, SpriteTable]:
    further = emoji(work, sources.FURTHER_SETS)
    stamps = files(work / "stamps", sources.STAMPS)
    clipart = files(work / "clipart", sources.CLIPART)
    held = {name: sources.held_out(paths.split()) for name, paths in sources.PHOTOS.items()}
    kept = {
        name: [path for path in paths.split() if path not in held[name]]
        for name, paths in sources.PHOTOS.items()
    }
    return {
        "drawings": emoji(work, sources.SEEN_SETS),
        "extra": {name: further[name] + stamps[name] + clipart[name] for name in CLASSES},
        "photos": files(work / "stamps", {name: " ".join(paths) for name, paths in kept.items()}),
        "unseen_drawings": emoji(work, [sources.UNSEEN_SET]),
        "unseen_photos": files(
            work / "stamps", {name: " ".join(paths) for name, paths in held.items()}
        ),
    }


def emoji(work: Path, sets: Iterable[str]) -> SpriteTable:
    """Class -> sprites of the named emoji sets; a drawing that a set lacks is left out."""
    found: SpriteTable = {name: [] for name in CLASSES}
    for set_name in sets:
        icons = json.loads((work / "emoji" / f"{set_name}.json").read_text())
        for cls, names in sources.EMOJI.items():
            for name in dict.fromkeys(_canonical(icons, name) for name in names.split()):
                icon = icons["icons"].get(name)
                if icon is None:
                    continue
                width = icon.get("width", icons.get("width", 16))
                height = icon.get("height", icons.get("height", 16))
                svg = (
                    '<svg xmlns="http://www.w3.org/2000/svg" '
                    'xmlns:xlink="http://www.w3.org/1999/xlink" '
                    f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
                )
                found[cls].append(trimmed(render_svg(svg)))
    return found


def render_svg(svg: str) -> Image.Image:
    """An SVG text as RGBA, longer side ``SPRITE_SIZE``."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE_SIZE, height=SPRITE_SIZE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _canonical(icons: Mapping[str, Mapping[str, dict]], name: str) -> str:
    return str(icons.get("aliases", {}).get(name, {}).get("parent", name))


def files(folder: Path, table: Mapping[str, str]) -> SpriteTable:
    """Class -> sprites of the named files (PNG where there is one, else SVG)."""
    found: SpriteTable = {name: [] for name in CLASSES}
    for cls, names in table.items():
        for name in names.split():
            svg, png = folder / f"{name}.svg", folder / f"{name}.png"
            image = Image.open(png).convert("RGBA") if png.exists() else render_svg(svg.read_text())
            found[cls].append(trimmed(image))
    return found


def trimmed(sprite: Image.Image) -> Image.Image:
    """Without its transparent margin, longer side at most ``SPRITE_SIZE``."""
    box = sprite.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox()
    out = sprite.crop(box) if box else sprite
    scale = SPRITE_SIZE / max(out.size)
    size = (max(8, round(out.width * scale)), max(8, round(out.height * scale)))
    return out.resize(size, Image.Resampling.LANCZOS)


def _backgrounds(work: Path, desktops: Iterable[str], samples: Iterable[str]) -> list[Image.Image]:
    """Photographs, shorter side 336 pixels."""
    paths = [work / "desktops" / name for name in desktops]
    names = list(samples)
    if names:
        import skimage

        paths += [Path(skimage.__file__).parent / "data" / name for name in names]
    out = []
    for path in paths:
        photo = Image.open(path).convert("RGB")
        scale = 336 / min(photo.size)
        size = (round(photo.width * scale), round(photo.height * scale))
        out.append(photo.resize(size, Image.Resampling.LANCZOS))
    return out


def _store(path: Path, tables: Mapping[str, SpriteTable]) -> None:
    arrays = {
        f"{table}/{cls}/{number:03d}": np.asarray(sprite)
        for table, sprites in tables.items()
        for cls, several in sprites.items()
        for number, sprite in enumerate(several)
    }
    partial = path.with_suffix(".part.npz")
    np.savez_compressed(partial, **arrays)
    partial.rename(path)


def _restore(path: Path) -> dict[str, SpriteTable]:
    names = ("drawings", "extra", "photos", "unseen_drawings", "unseen_photos")
    tables: dict[str, SpriteTable] = {name: {cls: [] for cls in CLASSES} for name in names}
    with np.load(path) as arrays:
        for key in sorted(arrays.files):
            table, cls, _ = key.split("/")
            tables[table][cls].append(Image.fromarray(arrays[key], "RGBA"))
    return tables
