"""LoRA with policies: the oracle with the adapter merged into its weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from vllm import RequestOutput
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest

from tests.engine.cases import LONG, Ask, one_image, text_only, two_images
from tests.engine.harness import Engine, assert_exact, params_of, tokens_of
from tests.engine.lora import RANK, write_adapter
from tests.engine.options import ADAPTERS
from vllm_flow.engine.worker.passes.adapters import AdapterRows


def folders(engine: Engine, adapter: int) -> tuple[Path, Path]:
    return write_adapter(engine.model_dir, engine.model_dir.parent / "lora", adapter)


def run(engine: Engine, pairs: Sequence[tuple[Ask, int]]) -> list[RequestOutput]:
    """Each request with its adapter's number, 0 for none, all in one call."""
    wanted = [
        LoRARequest(f"adapter {adapter}", adapter, str(folders(engine, adapter)[0]))
        if adapter
        else None
        for _, adapter in pairs
    ]
    return engine.llm.generate(
        [engine.prompt(ask) for ask, _ in pairs],
        [params_of(ask) for ask, _ in pairs],
        use_tqdm=False,
        lora_request=wanted,
    )


def assert_merged(
    engine: Engine, pairs: Sequence[tuple[Ask, int]], outputs: Sequence[RequestOutput]
) -> None:
    for adapter in (0, *ADAPTERS):
        chosen = [
            (ask, output)
            for (ask, own), output in zip(pairs, outputs, strict=True)
            if own == adapter
        ]
        oracles = copy.copy(engine)
        oracles.model_dir = folders(engine, adapter)[1] if adapter else engine.model_dir
        assert_exact(oracles, [ask for ask, _ in chosen], [output for _, output in chosen])


def mixed() -> list[tuple[Ask, int]]:
    """Every policy's kind with every adapter and with none; the same prompts throughout."""
    asks = [
        one_image(801, 2),
        two_images(802, 3),
        one_image(803),
        replace(one_image(804), stages="1:60% uniform, 3:0"),
        text_only(805, 2),
        one_image(806, 0, before=0),
    ]
    return [(ask, adapter) for ask in asks for adapter in (1, 0, 2)]


def test_a_batch_of_two_adapters_and_none(together: Engine) -> None:
    pairs = mixed()
    outputs = run(together, pairs)
    assert_merged(together, pairs, outputs)
    # Else an engine that ignored the adapters would pass.
    first = outputs[: len(ADAPTERS) + 1]
    assert len({tokens_of(output) for output in first}) == len(first)


def test_an_adapter_has_a_prefix_cache_of_its_own(together: Engine) -> None:
    ask = one_image(811, 2, before=40)
    longer = replace(ask, prompt=ask.prompt + " w1 w2 w3")
    assert_merged(together, [(ask, 1)], run(together, [(ask, 1)]))
    pairs = [(longer, 1), (longer, 2), (longer, 0)]
    outputs = run(together, pairs)
    assert_merged(together, pairs, outputs)
    found = [output.num_cached_tokens for output in outputs]
    assert found[0] > LONG.image_tokens and found[1:] == [0, 0]


def test_which_rows_an_adapter_is_for() -> None:
    """After rows left and came back, vLLM's kernels do what they did; meanwhile, what the rows left need."""
    wrapper = PunicaWrapperCPU(16, 16, "cpu")
    mapping = LoRAMapping((7, 7, 0, 9, 9, 9), (7, 0, 9), is_prefill=True)
    wrapper.update_metadata(mapping, [7, 9, None], 3, 100)
    decoder = nn.Module()
    decoder.wrapped = nn.Module()
    decoder.wrapped.punica_wrapper = wrapper
    rows = AdapterRows(decoder)
    torch.manual_seed(0)
    x, a, b = torch.randn(6, 8), torch.randn(3, 1, RANK, 8), torch.randn(3, 1, 5, RANK)
    a[2], b[2] = 0, 0

    def added(inputs: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(inputs), 5)
        wrapper.add_lora_linear(out, inputs, (a,), (b,), 1.0, (5,))
        return out

    whole = added(x)
    for left in ([0, 3, 5], [1, 2], [2]):
        rows.keep(torch.tensor(left))
        torch.testing.assert_close(added(x[left]), whole[left])
    rows.restore()
    torch.testing.assert_close(added(x), whole)


def test_without_adapters_nothing_is_told() -> None:
    """Neither a decoder that has none, nor a step in which nobody asks for one."""
    AdapterRows(nn.Linear(2, 2)).keep(torch.tensor([0]))
    decoder = nn.Module()
    decoder.punica_wrapper = SimpleNamespace(no_lora=True)
    rows = AdapterRows(decoder)
    rows.keep(torch.tensor([0]))
    rows.restore()
