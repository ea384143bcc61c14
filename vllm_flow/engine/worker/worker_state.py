"""What a worker keeps of the requests it serves, and what serves them, under either model runner.

A runner hands over who comes and goes, what moves, and what a step computes of whom; it is told what the decoder
hook does in it. Knows neither runner: each reads its own batch and tables (`runner_v1`, `runner_v2`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_flow.engine import backends, mutual_attention, obstacles
from vllm_flow.engine.layout_book import LayoutBook
from vllm_flow.engine.refusals import shares_experts
from vllm_flow.engine.requests import logged_request
from vllm_flow.engine.settings import FlowSettings
from vllm_flow.engine.wire import Rewrites, rewrites_of
from vllm_flow.engine.worker import caches, model_call
from vllm_flow.engine.worker.attention.tap import AttentionTap
from vllm_flow.engine.worker.choosing import merging
from vllm_flow.engine.worker.choosing.ranking import Ranker
from vllm_flow.engine.worker.device_step import DeviceStep
from vllm_flow.engine.worker.metadata import StepBuilder
from vllm_flow.engine.worker.moving import RowMover
from vllm_flow.engine.worker.passes import aux_hidden_states, last_layer
from vllm_flow.engine.worker.passes.decoder import DecoderHook
from vllm_flow.engine.worker.step_inputs import StepInputs
from vllm_flow.engine.worker.step_planner import StepPlanner
from vllm_flow.engine.worker.tower import scores as tower_scores
from vllm_flow.step import StepShares

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput


class WorkerState:
    """One worker's. Made with its runner; a model and a KV cache come when that has them.

    Args:
        settings: the engine's.
        vllm_config: vLLM's finished ``VllmConfig``.
    """

    hook: DecoderHook
    """From :meth:`use_model` on, as the tower is."""
    tower: tower_scores.Tower
    builder: StepBuilder
    """From :meth:`use_cache` on, as the planner is."""
    planner: StepPlanner
    mover: RowMover
    """Likewise, once the cache is not one of profiling's."""

    def __init__(self, settings: FlowSettings, vllm_config: Any) -> None:
        self.settings = settings
        self.shares_experts = shares_experts(vllm_config)
        self.book = LayoutBook(settings.num_layers, mutual_attention.reader(vllm_config))
        self.tap: AttentionTap | None = None
        """Only where the operator configured an attention log."""

    def use_model(self, runner: Any) -> None:
        """Take the decoder of the runner's loaded model over.

        Raises:
            ValueError: see :func:`vllm_flow.engine.worker.model_call.adopt`. Or the decoder does not collect what
                a drafter reads of it.
        """
        config = runner.vllm_config
        self.hook, self.tower = model_call.adopt(runner.model, config, self.settings)
        self.tower.layouts = self.book.layouts
        if aux_hidden_states.reads_between_layers(config):
            aux_hidden_states.check_collects(self.hook.decoder)

    def use_cache(self, runner: Any, kv_cache_config: Any, is_profiling: bool) -> None:
        """Serve steps over a KV cache that the runner has allocated, and whose attention groups it has made."""
        model_config = runner.vllm_config.model_config
        backends.check(runner.attn_groups, self.settings.untested_models)
        mutual_attention.check_backends(model_config, runner.attn_groups)
        compilation = runner.vllm_config.compilation_config
        in_pieces = compilation.cudagraph_mode.has_piecewise_cudagraphs()
        self.builder = StepBuilder(
            runner.attn_groups,
            kv_cache_config,
            runner.device,
            graph_rows=(compilation.max_cudagraph_capture_size or 0) if in_pieces else 0,
        )
        self.planner = StepPlanner(
            self.book,
            spares_last_layers=last_layer.spares(
                self.hook.decoder, runner.attn_groups, mutual=model_config.is_mm_prefix_lm
            ),
            most_runs=last_layer.most_runs(
                runner.attn_groups, runner.vllm_config.scheduler_config.max_num_seqs
            ),
            layers=self.hook.decoder.own,
        )
        if is_profiling:
            return
        caches.widest_first(runner.kv_caches)
        layers, encoded = compilation.static_forward_context, tower_scores.encoded(runner)
        decoder, project = self.hook.decoder, self.tower.project
        self.hook.ranker = Ranker(kv_cache_config, layers, decoder, encoded, project)
        self._unmergeable = merging.unmergeable(decoder, runner.vllm_config.lora_config)
        self.mover = RowMover(kv_cache_config, layers)
        if self.settings.attention_log is not None:
            kernel = self.settings.attention_log_kernel
            self.tap = AttentionTap(kv_cache_config, layers, kernel)

    @property
    def ranker(self) -> Ranker | None:
        """The hook's, once there is a KV cache to read that is not one of profiling's."""
        return self.hook.ranker

    def add(self, request: NewRequestData) -> None:
        """A request comes, or comes back."""
        layout = self.book.add(
            request.req_id,
            request.sampling_params,
            request.mm_features,
            len(request.prompt_token_ids or ()),
        )
        if self.tap is not None:
            logged = logged_request(request, self.settings.num_layers, layout)
            self.tap.add(request.req_id, logged)

    def remove(self, request_id: str) -> None:
        """A request is over, or leaves for now."""
        self.book.remove(request_id)
        if self.ranker is not None:
            self.ranker.late_scores.remove(request_id)
        if self.tap is not None:
            self.tap.remove(request_id)

    def move(self, output: SchedulerOutput) -> Rewrites:
        """Copy what stays of the prompts that lose their images before this step; the runner changes its tables."""
        rewrites = rewrites_of(output)
        if rewrites:
            assert self.ranker is not None
            self.mover.move(rewrites, self.book.layouts, self.ranker.late_scores)
        return rewrites

    def without_graph(self, output: SchedulerOutput) -> bool:
        """Whether no engine may run this step as a graph, whose experts take one number of rows in all layers."""
        if not self.shares_experts:
            return False
        cached = output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        return any(self.book.may_lose_rows(*of_request) for of_request in computed.items())

    @property
    def plans(self) -> bool:
        """Whether a request is here for which steps are planned."""
        return bool(self.book.layouts) or self._logs

    def plan(self, shares: StepShares, inputs: Callable[[], StepInputs]) -> DeviceStep | None:
        """What the decoder hook does in a step; None for a stock pass.

        Args:
            inputs: gathers what else the runner knows; asked where that is needed.
        """
        ours = self.planner.plan(shares)
        goes_on = ours.plan is not None or bool(ours.late) or bool(ours.handing)
        if not goes_on and not self._logs:
            return None
        given = inputs()
        if self._logs:
            assert self.tap is not None
            self.tap.arm(ours.plan, shares, given.block_tables)
        if not goes_on:
            return None
        late = self.builder.late(ours.late, shares.request_ids, given.block_tables)
        return self.builder.build(ours.plan, given, late, ours.handing)

    @property
    def _logs(self) -> bool:
        return self.tap is not None and bool(self.tap.requests)

    def attach(self, output: Any) -> Any:
        """A step's output, with what it logs of attention."""
        return output if self.tap is None else self.tap.attach(output)

    def forget_pictures(self) -> None:
        """Drop what is kept of pictures: vLLM drops their embeddings, whose weights may have changed."""
        if self.ranker is not None:
            self.ranker.forget_pictures()

    def obstacles(self) -> dict[str, str]:
        """What this worker cannot do, and why; see :mod:`vllm_flow.engine.obstacles`."""
        assert self.ranker is not None, "asked once there is a KV cache"
        late = {} if self.mover.unmovable is None else {obstacles.LATE: self.mover.unmovable}
        return {**self.tower.unreadable, **self.ranker.obstacles, **self._unmergeable, **late}
