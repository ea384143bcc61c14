"""Every family that the analysis reads: where its image tokens are in the picture, by autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.analysis.families import NAMES, ONE_OF_A_KIND, Given, asked
from tests.families.making import picture
from tests.longer import some
from vllm_flow import cli
from vllm_flow.analysis.cam_file import CamRecord
from vllm_flow.analysis.cam_names import READ
from vllm_flow.analysis.seen_kinds import KINDS, check_architecture
from vllm_flow.analysis.seen_picture import PaddedTiles, cells
from vllm_flow.analysis.vlm import Encoded, Vlm
from vllm_flow.engine.families.known import FAMILIES


def test_a_family_is_read_where_a_checkpoint_says_so() -> None:
    rows = [family for family in FAMILIES if set(family.checkpoints) & set(NAMES)]
    tested = {name for family in rows for name in family.architectures}
    assert set(READ) <= tested
    assert set(READ.values()) == set(KINDS)
    for name in READ:
        check_architecture(name)


@contextmanager
def blind_patches(vlm: Vlm) -> Iterator[None]:
    """While open, the tower's attention adds nothing: a patch's features are of its own pixels."""
    outputs = ("proj", "o_proj", "out_proj", "projection_layer")
    decoder = set(vlm.decoder.modules())
    layers = [
        child
        for module in vlm.model.modules()
        if "Attention" in type(module).__name__ and module not in decoder
        for name, child in module.named_children()
        if name in outputs
    ]
    assert layers
    saved = [{key: value.clone() for key, value in layer.state_dict().items()} for layer in layers]
    try:
        for layer in layers:
            for weight in layer.parameters():
                weight.data.zero_()
        yield
    finally:
        for layer, state in zip(layers, saved, strict=True):
            layer.load_state_dict(state)


def embedded(vlm: Vlm, encoded: Encoded, pixels: torch.Tensor) -> torch.Tensor:
    """[P, D]: what the first layer is given at the image tokens."""
    seen: list[torch.Tensor] = []

    def see(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = vlm.layers[0].register_forward_pre_hook(see, with_kwargs=True)
    try:
        vlm.forward(encoded, [], pixels[None])
    finally:
        handle.remove()
    return seen[0][0, encoded.image_P]


def reached(value: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Which pixels a number depends on, and how much."""
    return torch.autograd.grad(value, pixels, retain_graph=True)[0].abs()


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("name", some(NAMES, ONE_OF_A_KIND))
def test_a_cell_is_the_token_of_its_pixels(given: Given, name: str, size: int) -> None:
    """By autograd: a token of a tower without attention depends on the pixels of its cell, and on no others."""
    checkpoint, vlm = given(name)
    _, encoded, prompt = asked(checkpoint, vlm, size)
    assert encoded.ids_T.tolist() == prompt.ids
    assert encoded.is_image_T.tolist() == prompt.is_image_T.tolist()
    pixels = encoded.picture.pixels.clone().requires_grad_()
    places = [part.places for part in encoded.parts]
    used = np.concatenate([part.ravel() for part in places])
    assert len(set(used.tolist())) == len(used) <= len(encoded.image_P)
    with blind_patches(vlm):
        tokens_PD = embedded(vlm, encoded, pixels)
        rng = np.random.default_rng(0)
        for part, view in zip(encoded.parts, encoded.picture.views(pixels), strict=True):
            rows, columns = part.places.shape
            high, wide = view.shape[1] // rows, view.shape[2] // columns
            for _ in range(4):
                row, column = int(rng.integers(rows)), int(rng.integers(columns))
                cell = view[:, row * high :, column * wide :][:, :high, :wide]
                token = tokens_PD[part.places[row, column]]
                found = reached((token * torch.randn(len(token))).sum(), pixels)
                assert torch.equal(found > 0, reached(cell.sum(), pixels) > 0), (part.name, row)


@pytest.mark.parametrize("name", some(NAMES, ONE_OF_A_KIND))
def test_what_is_seen_is_the_picture(given: Given, name: str) -> None:
    """In its own proportions or those of its tiles: a red left half is red on the left of every view."""
    checkpoint, vlm = given(name)
    height, width = checkpoint.sizes[0]
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2] = (200, 30, 60)
    image = Image.fromarray(pixels)
    encoded = vlm.encode(f"w1 {checkpoint.image} w2", image)
    masks = vlm.box_in_views((0, 0, width // 2, height), image)
    for view, part, mask in zip(vlm.views(encoded), encoded.parts, masks, strict=True):
        seen = np.asarray(view).astype(int)
        third = seen.shape[1] // 3  # less than a cell of padding may be left at an edge
        assert np.abs(seen[:, third // 2 : third] - (200, 30, 60)).max() <= 2
        assert np.abs(seen[:, -third : -third // 2]).max() <= 2
        assert mask.shape == seen.shape[:2]
        np.testing.assert_allclose(mask * 200, seen[..., 0], atol=20)
        assert part.shares(mask).mean() == pytest.approx(0.5, abs=0.05)


def test_tiles_that_patches_do_not_fill_are_put_together_without_the_rest() -> None:
    """As 384 pixels in patches of 14: a cell's pixels stay those of its patch, in every tile."""
    side, patch, edge = 3, 2, 7
    tiles = torch.full((3, 1, edge, edge), -1.0)
    for tile in (1, 2):
        numbers = torch.arange(side * side).reshape(side, side) + 10 * tile
        tiles[tile, 0, : side * patch, : side * patch] = numbers.repeat_interleave(
            patch, 0
        ).repeat_interleave(patch, 1)
    parts = (cells(side, 2 * side), cells(side, side))
    seen = PaddedTiles(tiles, {}, parts, 0, "", 1, 2, side * patch)
    canvas, whole = seen.views(tiles)
    assert whole.shape == (1, edge, edge)
    found = parts[0].shares(canvas[0].double().numpy())
    expected = np.concatenate([np.arange(9).reshape(3, 3) + 10 * tile for tile in (1, 2)], 1)
    assert (found == expected).all()


@pytest.mark.long
def test_cells_that_the_model_merges_cover_what_it_merged(given: Given) -> None:
    """LLaVA-OneVision's large pictures: a cell's token depends on its pixels more than on any other cell's."""
    checkpoint, vlm = given("llava_onevision")
    owners = (vlm.processor, vlm.model.config)
    try:
        for owner in owners:
            owner.vision_aspect_ratio = "anyres_max_1"
        encoded = vlm.encode("w1 <image> w2", picture(1, (128, 128)))
        part, _ = encoded.parts
        assert part.places.shape == (4, 4), "merged from 8 x 8"
        pixels = encoded.picture.pixels.clone().requires_grad_()
        with blind_patches(vlm):
            tokens_PD = embedded(vlm, encoded, pixels)
            for row, column in ((0, 0), (1, 2), (3, 3)):
                found = reached(tokens_PD[part.places[row, column]].sum(), pixels)
                view = encoded.picture.views(found)[0].sum(0).double().numpy()
                assert np.unravel_index(part.shares(view).argmax(), (4, 4)) == (row, column)
    finally:
        for owner in owners:
            owner.vision_aspect_ratio = "anyres_max_9"


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("internvl", {"": (4, 8), "whole": (4, 4)}),
        pytest.param("qwen2_5_vl", {"": (5, 8)}, marks=pytest.mark.long),
    ],
)
def test_the_command_writes_a_map_per_view(
    given: Given, tmp_path: Path, name: str, shapes: dict[str, tuple[int, int]]
) -> None:
    checkpoint, _ = given(name)
    height, width = checkpoint.sizes[0]
    picture(1, (height, width)).save(tmp_path / "picture.png")
    out = tmp_path / "out"
    asked = ["cam", "--model", str(checkpoint.where), "--image", str(tmp_path / "picture.png"),
             "--prompt", f"w1 {checkpoint.image} w2", "--answer", " w7 w9", "--layers", "0,1",
             "--samples", "0", "--device", "cpu", "--box", f"0,0,{width // 2},{height}",
             "--out", str(out)]  # fmt: skip
    assert cli.main(asked) == 0
    ends = {part: f"_{part}" if part else "" for part in shapes}
    kinds = ["cam{}.npz", "cam{}.csv"]
    kinds += [f"{stem}{{}}.{end}" for stem in ("overlays", "convergence") for end in ("png", "svg")]
    names = {kind.format(end) for kind in kinds for end in ends.values()}
    assert {path.name for path in out.iterdir()} == names
    for part, shape in shapes.items():
        record = CamRecord.load(out / f"cam{ends[part]}.npz")
        assert record.part == part and record.heat.shape == (2, *shape)
        assert record.coverage is not None and record.coverage.shape == shape
        assert record.coverage.mean() == pytest.approx(0.5, abs=0.05)
        assert record.box is not None and record.box[:2] == (0, 0)
        assert record.view.shape[0] * shape[1] == record.view.shape[1] * shape[0]
