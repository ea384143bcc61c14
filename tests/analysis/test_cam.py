"""CAMs equal the paper's equations: against finite differences through the model's own forward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.analysis.conftest import PROMPT, load
from tests.engine.tiny_llava import Shape, picture
from vllm_flow.analysis.cam import (
    Settings,
    features_by_hook,
    features_of,
    heat_maps,
    noisy_copies,
    reading_rows,
)
from vllm_flow.analysis.cam_names import HOOKS
from vllm_flow.analysis.vlm import Encoded, Vlm

ANSWER = [20, 33, 47]
ANSWERS = (ANSWER, [101, 11, 90], [60], [77, 15], [34], [120, 9, 9], [88], [49])
"""Of a random model, about every second answer has a map that ReLU does not cut to nothing."""
LAST = 3


def nudged(
    vlm: Vlm, encoded: Encoded, answer: list[int], layer: int, hook: str, nudge: torch.Tensor
) -> tuple[float, np.ndarray]:
    """z and the features [P, D], with `nudge` [D] added to the features at every image position.

    By the model's own forward on token ids and pixels: no code of the CAM is used. z is written out
    from the definition: the logit of the token at position t, in row t - 1.
    """
    name, end = HOOKS[hook]
    module = vlm.layers[layer].get_submodule(name)
    at = torch.nonzero(encoded.ids_T == vlm.model.config.image_token_id)[:, 0]
    seen = []

    def change(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor[0, at].clone())
        out = tensor.clone()
        out[0, at] += nudge
        return out

    if end == "output":
        handle = module.register_forward_hook(
            lambda _m, _a, out: (
                (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
            )
        )
    else:
        handle = module.register_forward_pre_hook(lambda _m, args: (change(args[0]), *args[1:]))
    ids = torch.cat([encoded.ids_T, torch.tensor(answer)])[None]
    try:
        with torch.no_grad():
            logits = vlm.model(
                input_ids=ids, pixel_values=encoded.picture.pixels[None].double(), use_cache=False
            ).logits[0]
    finally:
        handle.remove()
    first = len(encoded.ids_T)
    z = sum(float(logits[t - 1, ids[0, t]]) for t in range(first, first + len(answer)))
    return z, seen[0].numpy()


def by_finite_differences(
    vlm: Vlm, encoded: Encoded, answer: list[int], layer: int, hook: str
) -> tuple[np.ndarray, np.ndarray]:
    """alpha [D] and heat [P]: moving all P positions by e moves z by P * alpha * e."""
    step, width = 1e-5, vlm.model.config.text_config.hidden_size
    alpha = np.zeros(width)
    for channel in range(width):
        nudge = torch.zeros(width, dtype=torch.float64)
        nudge[channel] = step
        up, values = nudged(vlm, encoded, answer, layer, hook, nudge)
        down, _ = nudged(vlm, encoded, answer, layer, hook, -nudge)
        alpha[channel] = (up - down) / (2 * step) / len(values)
    plain = nudged(vlm, encoded, answer, layer, hook, torch.zeros(width, dtype=torch.float64))[1]
    return alpha, np.maximum((plain * alpha).sum(1), 0)


def check_against_finite_differences(vlm: Vlm, encoded: Encoded, hook: str, layer: int) -> None:
    """Every answer up to the first with heat, so that maps cut to zero and others are compared."""
    # All layers in one pass: recording several must not disturb each one's gradient.
    settings = Settings((0, 1, 2, LAST), samples=0, hook=hook)
    pixels = encoded.picture.pixels[None].double()
    for answer in ANSWERS:
        found = features_of(vlm, encoded, answer, pixels, settings)[layer]
        alpha, heat = by_finite_differences(vlm, encoded, answer, layer, hook)
        assert np.abs(alpha).max() > 1e-3
        np.testing.assert_allclose(found.alpha()[0], alpha, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(found.heat()[0], heat, rtol=1e-5, atol=1e-8)
        if heat.max() > 1e-3:
            return
    raise AssertionError("no answer has any heat")


@pytest.mark.parametrize(
    ("hook", "layer"),
    [("post_attention_norm", 0), ("post_attention_norm", 1), ("post_attention_norm", 2)]
    + [(hook, 1) for hook in HOOKS if hook != "post_attention_norm"],
)
def test_alpha_and_heat_are_finite_differences(
    tiny: Vlm, encoded: Encoded, hook: str, layer: int
) -> None:
    check_against_finite_differences(tiny, encoded, hook, layer)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hook_points_share_a_pass_and_not_their_gradients(
    tiny: Vlm, encoded: Encoded, checkpointing: bool
) -> None:
    """Each has the gradient that it has alone, though one's path leads through another."""
    pixels = encoded.picture.pixels[None].double()
    settings = Settings((0, 2), samples=0, checkpointing=checkpointing)
    together = features_by_hook(tiny, encoded, ANSWER, pixels, settings, tuple(HOOKS))
    for hook in HOOKS:
        alone = features_of(tiny, encoded, ANSWER, pixels, Settings((0, 2), samples=0, hook=hook))
        assert together[hook].keys() == alone.keys() == {0, 2}
        for layer, features in alone.items():
            assert features.gradients_BPD.abs().max() > 1e-6
            shared = together[hook][layer]
            torch.testing.assert_close(shared.values_BPD, features.values_BPD)
            torch.testing.assert_close(shared.gradients_BPD, features.gradients_BPD)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_other_decoders(checkpoints: Path, family: str) -> None:
    shape = Shape(family=family, heads=2, kv_heads=1, head_dim=8)
    vlm = load(shape, checkpoints)
    encoded = vlm.encode(PROMPT, picture(shape, 5))
    check_against_finite_differences(vlm, encoded, "post_attention_norm", 1)


def test_a_token_is_read_at_the_row_before_it(tiny: Vlm, encoded: Encoded) -> None:
    """Rows count expanded tokens; what stands at the token's own position does not matter."""
    length = len(encoded.ids_T)
    assert length == len(PROMPT.split()) + 1 + 4**2 - 1  # <s>, and one <image> for all
    assert reading_rows(length, 3) == [length - 1, length, length + 1]
    settings = Settings((1,), samples=0)
    pixels = encoded.picture.pixels[None].double()
    one = features_of(tiny, encoded, [20, 33], pixels, settings, tokens=[0])[1]
    other = features_of(tiny, encoded, [20, 99], pixels, settings, tokens=[0])[1]
    torch.testing.assert_close(one.gradients_BPD, other.gradients_BPD)
    second = features_of(tiny, encoded, [21, 33], pixels, settings, tokens=[1])[1]
    again = features_of(tiny, encoded, [20, 33], pixels, settings, tokens=[1])[1]
    assert (second.gradients_BPD - again.gradients_BPD).abs().max() > 1e-4


def test_tokens_of_an_answer_add_up(tiny: Vlm, encoded: Encoded) -> None:
    settings = Settings((1,), samples=0)
    pixels = encoded.picture.pixels[None].double()
    whole = features_of(tiny, encoded, ANSWER, pixels, settings)[1].gradients_BPD
    parts = [
        features_of(tiny, encoded, ANSWER, pixels, settings, tokens=[t])[1].gradients_BPD
        for t in range(3)
    ]
    assert all(part.abs().max() > 1e-4 for part in parts)
    torch.testing.assert_close(whole, sum(parts))


def test_nothing_after_the_last_attention_reaches_the_answer(tiny: Vlm, encoded: Encoded) -> None:
    pixels = encoded.picture.pixels[None].double()
    found = features_of(tiny, encoded, ANSWER, pixels, Settings((2, LAST), samples=0))
    assert found[2].gradients_BPD.abs().max() > 1e-4
    assert (found[LAST].gradients_BPD == 0).all()
    assert (heat_maps(tiny, encoded, ANSWER, Settings((LAST,), samples=0))[0] == 0).all()


def test_smoothing_averages_different_copies(tiny: Vlm, encoded: Encoded) -> None:
    settings = Settings((0, 2), samples=3, sigma=0.2, seed=7)
    copies = list(noisy_copies(encoded.picture.pixels.double(), settings))
    single = [features_of(tiny, encoded, ANSWER, copy[None], settings) for copy in copies]
    for index, layer in enumerate(settings.layers):
        heats = [one[layer].heat()[0] for one in single]
        assert (heats[0] - heats[1]).abs().max() > 1e-3 and (heats[1] - heats[2]).abs().max() > 1e-3
        mean = torch.stack(heats).mean(0).reshape(4, 4)
        found = heat_maps(tiny, encoded, ANSWER, settings)[0][index]
        np.testing.assert_allclose(found, mean, rtol=2e-5, atol=1e-5)


def test_noise_is_what_sigma_says() -> None:
    pixels = torch.rand(3, 60, 60, dtype=torch.float64) * 4 - 1
    noise = [copy - pixels for copy in noisy_copies(pixels, Settings((0,), samples=4, sigma=0.1))]
    spread = 0.1 * float(pixels.max() - pixels.min())
    for each in noise:
        assert (
            abs(float(each.std()) / spread - 1) < 0.05 and abs(float(each.mean())) < 0.05 * spread
        )
    assert (noise[0] - noise[1]).abs().max() > spread
    assert list(noisy_copies(pixels, Settings((0,), samples=0)))[0] is pixels


def test_the_seed_decides_and_batches_do_not(tiny: Vlm, encoded: Encoded) -> None:
    def heat(**changes: object) -> np.ndarray:
        (found,) = heat_maps(tiny, encoded, ANSWER, Settings((0, 2), samples=4, **changes))  # type: ignore[arg-type]
        return found

    first = heat(seed=1, batch=4)
    assert (first == heat(seed=1, batch=4)).all()
    np.testing.assert_allclose(first, heat(seed=1, batch=3), rtol=1e-5, atol=1e-6)
    assert np.abs(first - heat(seed=2, batch=4)).max() > 1e-3


@pytest.mark.parametrize("hook", list(HOOKS))
def test_checkpointing_changes_nothing(tiny: Vlm, encoded: Encoded, hook: str) -> None:
    def heat(checkpointing: bool) -> np.ndarray:
        settings = Settings((0, 1, 3), samples=2, hook=hook, checkpointing=checkpointing)
        return heat_maps(tiny, encoded, ANSWER, settings)[0]

    np.testing.assert_allclose(heat(True), heat(False), rtol=1e-6)


def test_the_model_is_left_as_it_was(tiny: Vlm, encoded: Encoded) -> None:
    def traces() -> list[tuple[int, int, bool]]:
        return [
            (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for m in tiny.model.modules()
        ]

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle of a forward")

    settings = Settings((0, 2), samples=1, checkpointing=True)
    said = tiny.generate(encoded, 4)
    heat_maps(
        tiny, encoded, ANSWER, settings
    )  # transformers leaves hooks of its own the first time
    before = traces()
    heat_maps(tiny, encoded, ANSWER, settings)
    handle = tiny.model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        heat_maps(tiny, encoded, ANSWER, settings)
    handle.remove()
    assert traces() == before
    assert not any("forward" in vars(layer) for layer in tiny.layers)
    assert tiny.generate(encoded, 4) == said
    assert all(p.grad is None for p in tiny.model.parameters())


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"hook": "nowhere"}, "nowhere.*post_attention_norm"),
        ({"samples": -1}, "samples"),
        ({"layers": ()}, "no layer"),
    ],
)
def test_bad_settings_are_refused(change: dict, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        Settings(**{"layers": (0,), **change})


def test_a_layer_that_is_not_there(tiny: Vlm, encoded: Encoded) -> None:
    with pytest.raises(ValueError, match="layer 4 does not exist.*0 to 3"):
        heat_maps(tiny, encoded, ANSWER, Settings((1, 4), samples=0))
