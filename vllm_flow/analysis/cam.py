"""LLaVA-CAM: which patches of the picture raise the logits of the answer, seen at a decoder layer.

Equations 1 to 5 of "From Redundancy to Relevance" (arXiv 2406.06579), after Grad-CAM and SmoothGrad:
features A at the image positions, weights alpha = mean over these positions of dz/dA, heat =
ReLU(sum_k alpha_k A_k), averaged over noisy copies of the picture. z is the sum of the logits of the
answer's tokens, each read at the row before the token.

Cost: one forward and one backward for all layers together, per batch of copies. Only the decoder
from the lowest chosen layer up is differentiated (no gradient of weights or of the vision tower);
what stays in memory is its activations, O(copies x tokens x layers). `checkpointing` keeps one
hidden state per layer instead and runs each layer's forward a second time.

Knows modules and tensors; nothing of files or figures. Shapes: B copies, T prompt tokens, A answer
tokens, P image tokens, D width, L layers.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from vllm_flow.analysis.cam_names import DEFAULT_HOOK, HOOKS
from vllm_flow.analysis.vlm import Encoded, Vlm


@dataclass(frozen=True)
class Features:
    """What a hook point held at the image positions, and how z depends on it."""

    values_BPD: torch.Tensor
    gradients_BPD: torch.Tensor
    """dz/dA of each copy's own z."""

    def alpha(self) -> torch.Tensor:
        """Channel weights [B, D]: the gradient's mean over the image positions."""
        return self.gradients_BPD.mean(dim=1)

    def heat(self, alpha_BD: torch.Tensor | None = None) -> torch.Tensor:
        """[B, P]: ReLU of the weighted sum over channels; other weights may be put in (a control)."""
        weights = self.alpha() if alpha_BD is None else alpha_BD
        return torch.einsum("bpd,bd->bp", self.values_BPD, weights).relu()


@dataclass(frozen=True)
class Settings:
    """How a CAM is taken."""

    layers: tuple[int, ...]
    samples: int = 8
    """Noisy copies; 0 takes the picture as it is."""
    sigma: float = 0.1
    """Standard deviation of the noise, as a share of the range of the normalised pixels."""
    seed: int = 0
    hook: str = DEFAULT_HOOK
    batch: int = 8
    """Copies in one forward; changes memory and speed, not the result."""
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.hook not in HOOKS:
            raise ValueError(f"unknown hook point {self.hook!r}: use one of {', '.join(HOOKS)}")
        if self.samples < 0 or self.batch < 1 or not 0 <= self.sigma < float("inf"):
            raise ValueError("samples and sigma must be 0 or more, and batch 1 or more")
        if not self.layers:
            raise ValueError("no layer is chosen")


def reading_rows(prompt_length: int, answer_length: int) -> list[int]:
    """The rows whose logits predict the answer's tokens: token at t is read at row t - 1.

    Lengths count expanded tokens, so that rows are the decoder's own.
    """
    return [prompt_length - 1 + token for token in range(answer_length)]


def noisy_copies(pixels: torch.Tensor, settings: Settings) -> Iterator[torch.Tensor]:
    """The copies one by one, drawn in float32 on the CPU: the same for any batch size and device."""
    if settings.samples == 0:
        yield pixels
        return
    generator = torch.Generator().manual_seed(settings.seed)
    spread = settings.sigma * float(pixels.max() - pixels.min())
    for _ in range(settings.samples):
        noise = torch.randn(pixels.shape, generator=generator)
        yield pixels + (spread * noise).to(pixels)


@contextlib.contextmanager
def recording(
    layers: Sequence[torch.nn.Module], chosen: Sequence[int], hook: str, leaf: bool = True
) -> Iterator[dict[int, torch.Tensor]]:
    """While open, a forward fills the dictionary: layer -> the hook point's tensor [B, T, D].

    The lowest tensor is made a leaf, so that nothing below it enters the autograd graph, unless
    another hook point's gradient goes through it (`leaf`). Hooks always come off again.
    """
    name, end = HOOKS[hook]
    seen: dict[int, torch.Tensor] = {}
    handles = []
    lowest = min(chosen)

    def keep(index: int, tensor: torch.Tensor) -> torch.Tensor:
        if leaf and index == lowest:
            tensor = tensor.detach().requires_grad_()
        # Under checkpointing the backward runs the forward again: the first tensor is the graph's.
        seen.setdefault(index, tensor)
        return tensor

    def on_output(_module: object, _args: object, output: object, *, index: int) -> object:
        if isinstance(output, tuple):
            return (keep(index, output[0]), *output[1:])
        assert isinstance(output, torch.Tensor)
        return keep(index, output)

    def on_input(_module: object, args: tuple, kwargs: dict, *, index: int) -> tuple[tuple, dict]:
        if args:
            return (keep(index, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": keep(index, kwargs["hidden_states"])}

    for index in chosen:
        module = layers[index].get_submodule(name)
        handles.append(
            module.register_forward_hook(functools.partial(on_output, index=index))
            if end == "output"
            else module.register_forward_pre_hook(
                functools.partial(on_input, index=index), with_kwargs=True
            )
        )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def checkpointed(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """While open, each layer keeps its input only and runs again in the backward."""
    own = [vars(layer).get("forward") for layer in layers]  # set by accelerate, for example
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def features_of(
    vlm: Vlm,
    encoded: Encoded,
    answer: Sequence[int],
    pixels_B: torch.Tensor,
    settings: Settings,
    tokens: Sequence[int] | None = None,
) -> dict[int, Features]:
    """Layer -> features and gradients at `settings.hook`; see :func:`features_by_hook`."""
    hook = settings.hook
    return features_by_hook(vlm, encoded, answer, pixels_B, settings, (hook,), tokens)[hook]


def features_by_hook(
    vlm: Vlm,
    encoded: Encoded,
    answer: Sequence[int],
    pixels_B: torch.Tensor,
    settings: Settings,
    hooks: Sequence[str],
    tokens: Sequence[int] | None = None,
) -> dict[str, dict[int, Features]]:
    """Hook point -> layer -> features and gradients for a batch of copies: one forward, one backward.

    `tokens` chooses which of the answer's tokens count towards z (all by default); they are all fed.
    `settings.hook` is not looked at.
    """
    copies = len(pixels_B)
    answer_A = torch.tensor(list(answer), device=vlm.device)
    rows = torch.tensor(reading_rows(len(encoded.ids_T), len(answer)), device=vlm.device)
    picked = torch.tensor(list(range(len(answer)) if tokens is None else tokens), device=vlm.device)
    alone = len(hooks) == 1
    with torch.enable_grad(), contextlib.ExitStack() as stack:
        if not alone:  # several points share one graph, and each needs what lies above it
            below = recording(vlm.layers, (min(settings.layers),), "layer_input")
            stack.enter_context(below)
        seen = {
            hook: stack.enter_context(recording(vlm.layers, settings.layers, hook, leaf=alone))
            for hook in hooks
        }
        if settings.checkpointing:
            stack.enter_context(checkpointed(vlm.layers))
        logits = vlm.forward(encoded, answer, pixels_B, logits_to_keep=rows[picked]).logits
        # Copies do not see each other, so the gradient of the sum is each copy's own.
        z = logits.gather(2, answer_A[picked][None, :, None].expand(copies, -1, 1)).sum()
        tensors = [tensor for hook in hooks for tensor in seen[hook].values()]
        gradients = iter(torch.autograd.grad(z, tensors, allow_unused=True))
    at = encoded.image_P.to(vlm.device)
    found: dict[str, dict[int, Features]] = {}
    for hook in hooks:
        found[hook] = {}
        for layer, tensor in seen[hook].items():
            values, gradient = tensor.detach(), next(gradients)
            gradient = torch.zeros_like(values) if gradient is None else gradient
            found[hook][layer] = Features(values[:, at], gradient[:, at])
    return found


def batches(
    vlm: Vlm,
    encoded: Encoded,
    answer: Sequence[int],
    settings: Settings,
    tokens: Sequence[int] | None = None,
) -> Iterator[dict[int, Features]]:
    """`features_of` for all noisy copies, `settings.batch` at a time."""
    for pixels_B in copies_in_batches(encoded, settings):
        yield features_of(vlm, encoded, answer, pixels_B, settings, tokens)


def copies_in_batches(encoded: Encoded, settings: Settings) -> Iterator[torch.Tensor]:
    """The noisy copies, `settings.batch` at a time."""
    copies = noisy_copies(encoded.picture.pixels, settings)
    while waiting := list(itertools.islice(copies, settings.batch)):
        yield torch.stack(waiting)


def check_layers(layers: Sequence[int], count: int) -> None:
    """ValueError that names the first layer the model does not have."""
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(
                f"layer {layer} does not exist: this model has the layers 0 to {count - 1}"
            )


def heat_maps(
    vlm: Vlm,
    encoded: Encoded,
    answer: Sequence[int],
    settings: Settings,
    tokens: Sequence[int] | None = None,
) -> list[NDArray[np.float32]]:
    """[L, rows, columns] per part: the mean of the copies' heat maps for `settings.layers`, not normalised.

    The map after the last layer's attention is all zeros, and rightly so: no later attention brings
    the image positions to the answer.
    """
    check_layers(settings.layers, len(vlm.layers))
    parts = encoded.parts
    total: dict[int, torch.Tensor] = {}
    copies = 0
    for batch in batches(vlm, encoded, answer, settings, tokens):
        for layer, features in batch.items():
            heat = features.heat().double().sum(0).cpu()
            total[layer] = total[layer] + heat if layer in total else heat
        copies += len(next(iter(batch.values())).values_BPD)
    stacked = torch.stack([total[layer] for layer in settings.layers]) / copies
    return [part.map(stacked.float().numpy()) for part in parts]
