"""Every family that the analysis reads: where its tokens are in the picture, and its gradients and attention.

On the tiny checkpoints of tests/families, against transformers' forward on what its processor made: no
code of the analysis is used for what is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.families import oracle
from tests.families.checkpoints import build
from tests.families.making import Checkpoint, picture
from tests.longer import some
from vllm_flow import cli
from vllm_flow.analysis import span_attention
from vllm_flow.analysis.attention_reference import IMAGE, OUTPUT, SYSTEM, USER, attention_masses
from vllm_flow.analysis.cam import Settings, features_by_hook, features_of, heat_maps
from vllm_flow.analysis.cam_file import CamRecord
from vllm_flow.analysis.cam_names import HOOKS, READ
from vllm_flow.analysis.seen_kinds import KINDS, check_architecture
from vllm_flow.analysis.seen_picture import PaddedTiles, cells
from vllm_flow.analysis.vlm import Encoded, Vlm
from vllm_flow.engine.families.known import FAMILIES

ONE_OF_A_KIND = ("qwen2_5_vl", "internvl", "llava_next", "idefics3", "mistral3")
NAMES = (
    "llava",
    "pixtral",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "internvl",
    "internvl_qwen3",
    "idefics3",
    "smolvlm",
    "mistral3",
    "glm4_1v",
    "glm4_5v",
    "glm_ocr",
)
ANSWER = ("w7", "w9", "w40")
LAYERS = (0, 1, 2)
Given = tuple[Checkpoint, Vlm]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Given]:
    """``given(name)``: a checkpoint, and the same as the analysis has it, with attention that keeps its maps."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def get(name: str) -> Given:
        checkpoint = build(name, root)
        return checkpoint, Vlm(checkpoint.model, checkpoint.processor, name)

    return get


def asked(checkpoint: Checkpoint, vlm: Vlm, size: int = 0) -> tuple[str, Encoded, oracle.Prompt]:
    """A prompt with one picture, as the analysis encodes it and as the processor alone does."""
    prompt = f"w1 w2 {checkpoint.image} w3 w4 w5"
    image = picture(1, checkpoint.sizes[size])
    return prompt, vlm.encode(prompt, image), oracle.encode(checkpoint, prompt, (image,))


def test_a_family_is_read_where_a_checkpoint_says_so() -> None:
    rows = [family for family in FAMILIES if set(family.checkpoints) & set(NAMES)]
    tested = {name for family in rows for name in family.architectures}
    assert set(READ) <= tested
    assert set(READ.values()) == set(KINDS)
    for name in READ:
        check_architecture(name)


# Where a token is


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


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", some(NAMES, ONE_OF_A_KIND))
def test_a_cell_is_the_token_of_its_pixels(
    given: Callable[[str], Given], name: str, size: int
) -> None:
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
def test_what_is_seen_is_the_picture(given: Callable[[str], Given], name: str) -> None:
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
def test_cells_that_the_model_merges_cover_what_it_merged(given: Callable[[str], Given]) -> None:
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


# Gradients


def by_transformers(
    checkpoint: Checkpoint, prompt: oracle.Prompt, answer: list[int]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Layer -> alpha [D] and heat [P] by autograd through the model's forward on the processor's tensors."""
    layers = checkpoint.decoder(checkpoint.model).layers
    seen: dict[int, torch.Tensor] = {}

    def start(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    def keep(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
            seen[number] = output
            output.retain_grad()

        return hook

    handles = [layers[0].register_forward_pre_hook(start, with_kwargs=True)]
    handles += [layers[n].post_attention_layernorm.register_forward_hook(keep(n)) for n in LAYERS]
    try:
        logits = oracle.forward(checkpoint, prompt, answer)
    finally:
        for handle in handles:
            handle.remove()
    first = len(prompt.ids)
    sum(logits[first - 1 + n, token] for n, token in enumerate(answer)).backward()  # type: ignore[union-attr]
    found = {}
    for number, tensor in seen.items():
        assert tensor.grad is not None
        at = prompt.is_image_T.nonzero()[:, 0]
        alpha = tensor.grad[0, at].double().mean(0)
        heat = (tensor.detach()[0, at].double() * alpha).sum(1).relu()
        found[number] = alpha.numpy(), heat.numpy()
    return found


@pytest.mark.parametrize("name", some(NAMES, ONE_OF_A_KIND))
def test_alpha_and_heat_are_transformers_own(given: Callable[[str], Given], name: str) -> None:
    checkpoint, vlm = given(name)
    _, encoded, prompt = asked(checkpoint, vlm)
    answer = [checkpoint.vocab[word] for word in ANSWER]
    pixels = encoded.picture.pixels[None]
    found = features_of(vlm, encoded, answer, pixels, Settings(LAYERS, samples=0))
    expected = by_transformers(checkpoint, prompt, answer)
    for layer in LAYERS:
        alpha, heat = expected[layer]
        scale = np.abs(alpha).max()
        assert scale > 1e-4
        np.testing.assert_allclose(found[layer].alpha()[0], alpha, atol=1e-3 * scale)
        np.testing.assert_allclose(found[layer].heat()[0], heat, atol=1e-3 * max(heat.max(), scale))
    assert any(heat.max() > 0 for _, heat in expected.values())


@pytest.mark.parametrize("name", some(NAMES, ["qwen2_5_vl"]))
def test_every_hook_point_is_there(given: Callable[[str], Given], name: str) -> None:
    """And what it holds reaches the answer, except behind the last attention."""
    checkpoint, vlm = given(name)
    _, encoded, _ = asked(checkpoint, vlm)
    answer = [checkpoint.vocab[word] for word in ANSWER]
    last = len(vlm.layers) - 1
    settings = Settings((1, last), samples=0)
    pixels = encoded.picture.pixels[None]
    found = features_by_hook(vlm, encoded, answer, pixels, settings, tuple(HOOKS))
    for hook, by_layer in found.items():
        assert by_layer[1].gradients_BPD.abs().max() > 1e-6, hook
        behind = hook not in ("input_norm", "layer_input")
        assert (by_layer[last].gradients_BPD.abs().max() == 0) == behind, hook


@pytest.mark.parametrize("name", some(NAMES, ONE_OF_A_KIND))
def test_copies_are_prompts_of_their_own(given: Callable[[str], Given], name: str) -> None:
    """Several in one forward are what each is alone: nothing of a copy's picture goes to another's."""
    checkpoint, vlm = given(name)
    _, encoded, _ = asked(checkpoint, vlm)
    answer = [checkpoint.vocab[word] for word in ANSWER]
    together, alone = (
        heat_maps(vlm, encoded, answer, Settings(LAYERS, samples=3, batch=batch))
        for batch in (3, 1)
    )
    assert any(heat.any() for heat in together)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3 * max(map(np.max, alone)))


# Attention, answers, the command


@pytest.mark.parametrize("name", some(NAMES, ONE_OF_A_KIND))
def test_masses_are_sums_of_transformers_maps(given: Callable[[str], Given], name: str) -> None:
    checkpoint, vlm = given(name)
    _, encoded, prompt = asked(checkpoint, vlm)
    answer = [checkpoint.vocab[word] for word in ANSWER]
    found = attention_masses(vlm, encoded, answer)
    assert prompt.inputs is not None
    maps: list[torch.Tensor] = []
    inner = checkpoint.decoder(checkpoint.model)
    stock = inner.forward
    inner.forward = lambda *args, **kwargs: _noting(maps, stock(*args, **kwargs, output_attentions=True))  # fmt: skip
    try:
        with torch.no_grad():
            oracle.forward(checkpoint, prompt, answer)
    finally:
        del inner.forward
    assert len(maps) == len(vlm.layers) == len(found.spans_LAS)
    first = len(prompt.ids)
    begin = int(prompt.is_image_T.nonzero()[0])
    for layer, token in ((0, 0), (1, 2), (len(maps) - 1, 1)):
        row = maps[layer][0, :, first - 1 + token].double().mean(0)
        expected = np.zeros(4)
        for position, share in enumerate(row.tolist()):
            if position >= first:
                span = OUTPUT
            elif prompt.is_image_T[position]:
                span = IMAGE
            else:
                span = SYSTEM if position < begin else USER
            expected[span] += share
        np.testing.assert_allclose(found.spans_LAS[layer, token], expected, atol=1e-6)
        heat = row[:first][prompt.is_image_T].numpy()
        np.testing.assert_allclose(found.heat_LAP[layer, token], heat, atol=1e-6)
    np.testing.assert_allclose(found.images_LAI[..., 0], found.spans_LAS[..., IMAGE], atol=1e-6)


def lse_of_ranges(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    scale: float,
    owner_P: np.ndarray,
    first_P: np.ndarray,
    last_P: np.ndarray,
) -> torch.Tensor:
    """What `span_attention.row_lse` says, in torch, a pair of a row and a range of keys after the other."""
    key_THD = key_TKD.repeat_interleave(query_THD.shape[1] // key_TKD.shape[1], 1)
    logits_HTT = torch.einsum("ihd,jhd->hij", query_THD.double(), key_THD.double()) * scale
    pairs = zip(owner_P, first_P, last_P, strict=True)
    return torch.stack([logits_HTT[:, row, a:b].logsumexp(-1) for row, a, b in pairs], 1)


@pytest.mark.parametrize("name", some(NAMES, ["mistral3"]))
def test_masses_without_maps_are_those_of_the_maps(
    given: Callable[[str], Given], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where text lies between the rows or tiles of a picture."""
    monkeypatch.setattr(span_attention, "row_lse", lse_of_ranges)
    checkpoint, vlm = given(name)
    _, encoded, _ = asked(checkpoint, vlm)
    answer = [checkpoint.vocab[word] for word in ANSWER]
    expected = attention_masses(vlm, encoded, answer)
    found = span_attention.span_masses(vlm, encoded, answer)
    for field in ("spans_LAS", "images_LAI", "heat_LAP", "flow_LSS"):
        own, other = getattr(found, field), getattr(expected, field)
        np.testing.assert_allclose(own, other, atol=1e-6, err_msg=field)
    assert vlm.decoder.config._attn_implementation == "eager"


def _noting(maps: list[torch.Tensor], output: object) -> object:
    maps.extend(output.attentions)  # type: ignore[attr-defined]
    return output


@pytest.mark.parametrize("name", some(NAMES, ONE_OF_A_KIND))
def test_an_answer_of_the_models_own_is_its_greedy_one(
    given: Callable[[str], Given], name: str
) -> None:
    checkpoint, vlm = given(name)
    _, encoded, prompt = asked(checkpoint, vlm)
    answer = vlm.generate(encoded, 3)
    with torch.no_grad():
        logits = oracle.forward(checkpoint, prompt, answer)
    chosen = logits[len(prompt.ids) - 1 :].argmax(-1).tolist()
    assert answer and answer == chosen[: len(answer)]
    special = set(vlm.processor.tokenizer.all_special_ids)
    assert len(answer) == 3 or chosen[len(answer)] in special


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("internvl", {"": (4, 8), "whole": (4, 4)}),
        pytest.param("qwen2_5_vl", {"": (5, 8)}, marks=pytest.mark.long),
    ],
)
def test_the_command_writes_a_map_per_view(
    given: Callable[[str], Given], tmp_path: Path, name: str, shapes: dict[str, tuple[int, int]]
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
