"""Rows leave exactly in steps that vLLM has compiled in pieces, as it does on CUDA.

What pieces are handed differs from family to family: positions in three dimensions, that are a slice of a longer
buffer; features injected between layers; a batch dimension and rotary tables, in vLLM's Transformers backend.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from tests.engine.compiling import counted_calls
from tests.engine.piecewise import compile_in_pieces
from tests.families.asking import every_cliff
from tests.families.checkpoints import chosen
from tests.families.making import Checkpoint
from tests.families.running import STOCK, Engine, Judge
from vllm_flow.engine.worker.passes.last_layer import attention_of
from vllm_flow.engine.worker.passes.pieces import pieces_of

BY_TRACE = ("mimo_v2_omni", "mimo_v2_omni_narrow")
"""Pieces run as they were traced: stock vLLM's, compiled for a CPU by Inductor, answer wrongly."""
NOT_COMPILED = ("openpangu_vl",)
"""vLLM itself fails to compile their decoders: of positions in three dimensions it marks the first as that of rows."""
CHOSEN = [(name, "eager" if name in BY_TRACE else "inductor") for name in chosen()]
LONGER = [
    pytest.param(name, "inductor", marks=pytest.mark.long) for name in ("qwen3_vl", "aya_vision")
]
"""Inductor compiles for minutes."""


@pytest.mark.parametrize(("name", "backend"), CHOSEN or [("qwen3_vl", "eager"), *LONGER])
def test_rows_leave_in_compiled_pieces(
    name: str,
    backend: str,
    checkpoint_of: Callable[[str], Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = checkpoint_of(name)
    compile_in_pieces(monkeypatch, backend=backend)
    if name in NOT_COMPILED:
        with pytest.raises(ConstraintViolationError, match="inputs_embeds"):
            Engine(checkpoint, STOCK, enforce_eager=False)
        pytest.skip("stock vLLM does not start either, but with --enforce-eager")
    engine = Engine(checkpoint, checkpoint.group_layers, enforce_eager=False)
    judge = Judge(engine)
    plain = every_cliff(checkpoint, [None])
    judge.assert_exact(
        plain, engine.run(plain, 4)
    )  # a prefill and decodes: calls of different size
    found = pieces_of(engine.llm.llm_engine.vllm_config.compilation_config, checkpoint.num_layers)
    if found is None:
        pytest.skip("not cut at its attention alone: rows leave in eager steps")
    if fixed := [piece.index for piece in found if not piece.movable]:
        pytest.skip(f"in pieces {fixed} more changes than rows: rows leave in eager steps")
    asks = every_cliff(checkpoint, list(range(1, checkpoint.num_layers)))
    with counted_calls(engine) as calls:
        judge.assert_exact(asks, engine.run(asks, 4))
    # Where latent vectors are stored, rows leave their last layer early in eager steps alone.
    latent = any(attention_of(layer) is None for layer in engine.decoder.layers)
    assert calls.model and bool(calls.eager) == latent
    engine.check_idle()
