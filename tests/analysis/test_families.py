"""Every family that the analysis reads: its gradients, attention and answers are transformers' own.

What is expected comes from transformers' forward on what its processor made: no code of the analysis is used.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from tests.analysis.families import ANSWER, LAYERS, NAMES, ONE_OF_A_KIND, Given, asked
from tests.families import oracle
from tests.families.making import Checkpoint
from tests.longer import some
from vllm_flow.analysis import span_attention
from vllm_flow.analysis.attention_reference import IMAGE, OUTPUT, SYSTEM, USER, attention_masses
from vllm_flow.analysis.cam import Settings, features_by_hook, features_of, heat_maps
from vllm_flow.analysis.cam_names import HOOKS


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
def test_alpha_and_heat_are_transformers_own(given: Given, name: str) -> None:
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
def test_every_hook_point_is_there(given: Given, name: str) -> None:
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
def test_copies_are_prompts_of_their_own(given: Given, name: str) -> None:
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


@pytest.mark.parametrize("name", some(NAMES, ONE_OF_A_KIND))
def test_masses_are_sums_of_transformers_maps(given: Given, name: str) -> None:
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
    given: Given, name: str, monkeypatch: pytest.MonkeyPatch
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
def test_an_answer_of_the_models_own_is_its_greedy_one(given: Given, name: str) -> None:
    checkpoint, vlm = given(name)
    _, encoded, prompt = asked(checkpoint, vlm)
    answer = vlm.generate(encoded, 3)
    with torch.no_grad():
        logits = oracle.forward(checkpoint, prompt, answer)
    chosen = logits[len(prompt.ids) - 1 :].argmax(-1).tolist()
    assert answer and answer == chosen[: len(answer)]
    special = set(vlm.processor.tokenizer.all_special_ids)
    assert len(answer) == 3 or chosen[len(answer)] in special
