"""What either model runner makes once it has a KV cache: who builds steps, ranks, moves, and logs attention.

Seam: a runner's ``initialize_kv_cache``, after vLLM's own; profiling has a cache of its own before that.
"""

from __future__ import annotations

from typing import Any

from vllm_flow.engine import backends, caches, last_layer, mutual_attention, tower_scores
from vllm_flow.engine.attention.tap import AttentionTap
from vllm_flow.engine.metadata import StepBuilder
from vllm_flow.engine.moving import RowMover
from vllm_flow.engine.ranking import Ranker


def equip(keeper: Any, runner: Any, kv_cache_config: Any, is_profiling: bool) -> None:
    """Give ``keeper`` what serves the runner's steps.

    Args:
        keeper: who holds ``flow_requests`` and ``flow_hook``: the runner itself, or its model state.
        runner: of either version; its attention groups are made.
    """
    settings = runner.flow_settings
    backends.check(runner.attn_groups, settings.untested_models)
    mutual_attention.check_backends(runner.vllm_config.model_config, runner.attn_groups)
    compilation = runner.vllm_config.compilation_config
    in_pieces = compilation.cudagraph_mode.has_piecewise_cudagraphs()
    keeper.flow_steps = StepBuilder(
        runner.attn_groups,
        kv_cache_config,
        runner.device,
        graph_rows=(compilation.max_cudagraph_capture_size or 0) if in_pieces else 0,
    )
    keeper.flow_requests.spares_last_layers = last_layer.spares(
        keeper.flow_hook.decoder,
        runner.attn_groups,
        mutual=runner.vllm_config.model_config.is_mm_prefix_lm,
    )
    keeper.flow_hook.tower.layouts = keeper.flow_requests.layouts
    if is_profiling:
        return
    caches.widest_first(runner.kv_caches)
    layers = compilation.static_forward_context
    keeper.flow_hook.ranker = Ranker(
        kv_cache_config, layers, keeper.flow_hook.decoder, tower_scores.encoded(runner)
    )
    keeper.flow_mover = RowMover(kv_cache_config, layers)
    if settings.attention_log is not None:
        keeper.flow_tap = AttentionTap(kv_cache_config, layers, settings.attention_log_kernel)
