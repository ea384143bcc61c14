"""Of an image's last layer only keys and values are computed; where that cannot be, for which reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.attention import (
    Attention,
    ChunkedLocalAttention,
    StaticSinkAttention,
)
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from tests.engine.cases import GQA, LONG, QWEN, Ask, one_image, text_around
from tests.engine.fixtures import OpenEngine
from tests.engine.harness import Engine, assert_exact
from tests.engine.tiny_llava import Shape
from vllm_flow.engine.families import Decoder, decoder_of
from vllm_flow.engine.worker.passes.last_layer import (
    KeyWriter,
    key_value_projection,
    most_runs,
    reason_against,
)
from vllm_flow.engine.worker.variant_tensors import VariantTensors
from vllm_flow.last_layer import LastLayer, spare_last_layers
from vllm_flow.layout import TokenLayout
from vllm_flow.plan import plan_step
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans
from vllm_flow.step import ScheduledRequest


def runner_of(engine: Engine) -> Any:
    return engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner


def layers_of(engine: Engine) -> list[Any]:
    runner = runner_of(engine)
    return list(decoder_of(runner.model, runner.model_config).layers)


@pytest.mark.parametrize(("shape", "budget"), [(GQA, 512), (LONG, 97)], ids=["whole", "97"])
def test_text_around_images_is_exact(open_engine: OpenEngine, shape: Shape, budget: int) -> None:
    """Every cliff; chunks end inside images, and text stands before, between and after them."""
    engine = open_engine(shape, 1, max_num_batched_tokens=budget, max_num_seqs=4)
    asks = [text_around(40, cliff) for cliff in range(1, shape.layers)]
    assert_exact(engine, asks, engine.run(asks))


def rows_per_layer(engine: Engine, ask: Ask) -> list[int]:
    """Rows that run through the MLP of each layer in the prefill of one request."""
    seen: list[list[int]] = [[] for _ in layers_of(engine)]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, at=at: at.append(len(args[0])))
        for layer, at in zip(layers_of(engine), seen, strict=True)
    ]
    try:
        assert_exact(engine, [ask], engine.run([ask]))
    finally:
        for hook in hooks:
            hook.remove()
    return [rows[0] for rows in seen]


def test_image_rows_run_through_one_layer_less(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(GQA, 2)
    ask, image = one_image(33, 2), GQA.image_tokens
    prompt, *rest = rows_per_layer(engine, ask)
    assert prompt > image and rest == [prompt - image] * 3
    planner = runner_of(engine).flow_state.planner
    # Where it cannot be done they leave at the border of their cliff, exactly as well.
    monkeypatch.setattr(planner, "spares_last_layers", False)
    assert rows_per_layer(engine, ask) == [prompt, prompt, prompt - image, prompt - image]


@pytest.mark.parametrize("shape", [GQA, QWEN], ids=["without bias", "with bias"])
def test_a_packed_projection_is_cut(open_engine: OpenEngine, shape: Shape) -> None:
    """On CPU vLLM keeps no weight: the part of it is recovered."""
    qkv = layers_of(open_engine(shape, 2))[1].self_attn.qkv_proj
    assert qkv.weight.numel() == 0
    rows = torch.randn(7, qkv.input_size)
    expected = qkv(rows)[0][:, qkv.num_heads * qkv.head_size :]
    torch.testing.assert_close(key_value_projection(qkv)(rows), expected, rtol=1e-4, atol=1e-5)


class Fused(nn.Linear):
    """A projection that keeps its weight, as on CUDA; 2 heads of queries and one of keys, 4 wide."""

    num_heads, head_size, input_size = 2, 4, 6

    def __init__(self, quant_method: Any) -> None:
        super().__init__(6, 16)
        self.quant_method = quant_method

    def forward(self, rows: torch.Tensor) -> Any:
        return super().forward(rows), None


def test_a_weight_that_is_kept_is_not_copied(open_engine: OpenEngine) -> None:
    real = layers_of(open_engine(GQA, 2))[0].self_attn.qkv_proj.quant_method
    rows = torch.randn(5, 6)
    for method in (real, object()):  # as loaded; quantised, which cannot be cut
        fused = Fused(method)
        torch.testing.assert_close(key_value_projection(fused)(rows), fused(rows)[0][:, 8:])
    fused = Fused(real)
    kept = key_value_projection(fused)
    fused.weight = nn.Parameter(torch.zeros(16, 6))  # loaded anew
    torch.testing.assert_close(kept(rows), fused.bias[8:].expand(5, 8))


def fake_decoder(*kinds: Any, model: Any = None, sharing: str | None = None) -> Decoder:
    """One layer of the usual kind, with modules of these classes that keep something."""
    layer = type("SomeLayer", (nn.Module,), {})()
    for number, kind in enumerate(kinds or (Attention,)):
        kept = kind.__new__(kind)
        nn.Module.__init__(kept)
        kept.kv_sharing_target_layer_name = sharing
        layer.add_module(str(number), kept)
    return Decoder(model or nn.Identity(), [layer], nn.Identity())


def offloaded() -> nn.Module:
    """As vLLM's ``cpu_offload_gb`` leaves a model where there is no unified addressing."""
    return nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1, device="meta")])


class WritesItself(CPUAttentionBackend):
    forward_includes_kv_cache_update = True


class PlansOnTheHost(CPUAttentionBackend):
    get_name = staticmethod(lambda: "FLEX_ATTENTION")


class TakesRequests(CPUAttentionBackend):
    get_name = staticmethod(lambda: "FLASHINFER")


@pytest.mark.parametrize(
    ("decoder", "backend", "reason"),
    [
        (fake_decoder(), CPUAttentionBackend, None),
        (fake_decoder(ChunkedLocalAttention), FlashAttentionBackend, None),
        (fake_decoder(MambaMixer2), CPUAttentionBackend, "where SomeLayer keeps its keys"),
        (fake_decoder(Attention, MambaMixer2), CPUAttentionBackend, "where SomeLayer keeps"),
        (fake_decoder(StaticSinkAttention), CPUAttentionBackend, "where SomeLayer keeps"),
        (fake_decoder(sharing="0"), CPUAttentionBackend, "share keys"),
        (fake_decoder(model=offloaded()), CPUAttentionBackend, "only when their layer is called"),
        (fake_decoder(), WritesItself, "CPU_ATTN stores keys within attention"),
        (fake_decoder(), PlansOnTheHost, "FLEX_ATTENTION may size its buffers"),
        (fake_decoder(), TakesRequests, None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_every_reason_to_run_the_whole_layer(
    decoder: Decoder, backend: Any, reason: str | None
) -> None:
    found = reason_against(decoder, [backend])
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize(
    ("backends", "most"),
    [
        ((CPUAttentionBackend,), None),
        ((TakesRequests,), 8),
        ((CPUAttentionBackend, TakesRequests), 8),
    ],
)
def test_runs_are_as_many_as_every_backend_takes(
    backends: tuple[Any, ...], most: int | None
) -> None:
    groups = [[SimpleNamespace(backend=backend)] for backend in backends]
    assert most_runs(groups, max_num_reqs=8) == most


def test_layers_of_any_kind_run_up_to_their_attention(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where how a layer makes its keys is not known: the MLP has the same rows, and answers are exact."""
    engine = open_engine(GQA, 2)
    writers = runner_of(engine).flow_state.hook._key_writers.values()
    ask, called = one_image(34, 2), list[int]()
    for writer in writers:
        monkeypatch.setattr(writer, "_apart", False)
        run = writer._run_to_attention
        monkeypatch.setattr(
            writer,
            "_run_to_attention",
            lambda *a, run=run, **k: (called.append(len(a[2])), run(*a, **k)),
        )
    prompt, *rest = rows_per_layer(engine, ask)
    assert rest == [prompt - GQA.image_tokens] * 3
    assert called == [GQA.image_tokens]


def test_a_layer_that_does_not_come_to_its_attention_is_no_answer(open_engine: OpenEngine) -> None:
    layer = layers_of(open_engine(GQA, 2))[0]
    writer = KeyWriter(Decoder(nn.Identity(), [layer], None, call="plain"), layer)
    with pytest.raises(RuntimeError, match="LlamaDecoderLayer did not come to its attention"):
        writer.write(lambda *_: None, None, torch.zeros(1, 2), None, torch.zeros(1))


def test_as_many_runs_as_requests_do_not_make_the_table_theirs() -> None:
    """A request of image rows only has no run, another has two: the table's rows are not the runs'."""

    def share(computed: int, image: tuple[int, int]) -> ScheduledRequest:
        layout = TokenLayout.of(FlowPolicy.withdrawal(2), ImageSpans.from_ranges([image]))
        return ScheduledRequest(computed, 27, layout)

    requests = [share(27, (4, 54)), share(0, (1, 26))]
    plan = plan_step(requests)
    assert plan is not None
    variant = spare_last_layers(plan, requests).variants[0]
    assert isinstance(variant, LastLayer)
    assert variant.requests.tolist() == [1, 1] and variant.seq_lens.tolist() == [1, 27]
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    tensors = VariantTensors(variant, {(32, 4): [0]}, torch.device("cpu"), plan.seq_lens)
    slots = tensors.slots([table])[0]
    common = tensors.common_metadata(table, slots)
    assert common.block_table_tensor.tolist() == [[4, 5, 6, 7]] * 2
    assert common.slot_mapping.tolist() == [4 * 32, 4 * 32 + 26]
    images = [*range(27, 54), *range(4 * 32 + 1, 4 * 32 + 26)]
    assert tensors.last_keys(slots).slots.tolist() == images
