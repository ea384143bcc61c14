"""Pipeline parallelism: what is refused beside it, and which of a decoder's layers a worker has.

A stage is given all of a step's rows, and gives all of them on, those that left in their places with nothing in them:
the next one takes those that are alive out again before its first layer. So what vLLM sends keeps its sizes, those of
the CUDA graphs that it pads steps for among them, and a stage in which no row leaves runs as in stock vLLM.

Seams: vLLM's division of layers into stages (``get_pp_indices``), the modules that stand for other stages' layers
(``PPMissingLayer``), and ``intermediate_tensors`` of the runners, into which they copy what is sent to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_flow.engine import states

if TYPE_CHECKING:
    from vllm_flow.engine.families import Decoder

CALLS = ("residual",)
"""Ways in which layers are called, see :data:`vllm_flow.engine.families.decoder_parts.Call`, that were run on a
pipeline's stages."""


def reason_against(config: Any) -> str | None:
    """Why a pipeline's stages cannot evict as configured, to go on after "vLLM-Flow does not support".

    Args:
        config: vLLM's finished ``VllmConfig``.
    """
    from vllm_flow.engine import engine_facts  # which asks for stages

    parallel, model = config.parallel_config, config.model_config
    if parallel.pipeline_parallel_size <= 1:
        return None
    keys_differ = engine_facts.EngineFacts.of_model(model).keys_differ
    for beside, remedy, applies in (
        ("speculative decoding", "leave out speculative_config", bool(config.speculative_config)),
        ("KV connectors", "leave out kv_transfer_config", bool(config.kv_transfer_config)),
        ("data parallelism", "set data_parallel_size=1", parallel.data_parallel_size > 1),
        (
            "torchrun",
            "leave out distributed_executor_backend",
            parallel.distributed_executor_backend == "external_launcher",
        ),
        ("latent attention", "", bool(model.use_mla)),
        ("layers without keys of their own", "", bool(states.attending(model))),
        ("layers whose keys differ in size", "", keys_differ),
        ("pictures whose tokens see one another", "", bool(model.is_mm_prefix_lm)),
    ):
        if applies:
            return (
                f"pipeline parallelism beside {beside}, which nobody has tried: "
                f"{remedy + ', or ' if remedy else ''}set pipeline_parallel_size=1."
            )
    return None


def stages_of(num_layers: int, parallel_config: Any) -> tuple[int, ...]:
    """Decoder layers of each stage, as vLLM divides them; () of a single one.

    Args:
        parallel_config: vLLM's finished ``ParallelConfig``.
    """
    stages: int = parallel_config.pipeline_parallel_size
    if stages <= 1:
        return ()
    from vllm.distributed.utils import get_pp_indices

    edges = (get_pp_indices(num_layers, stage, stages) for stage in range(stages))
    return tuple(end - start for start, end in edges)


def check_stage(decoder: Decoder, stages: tuple[int, ...], untested: bool = False) -> None:
    """Refuse a worker whose layers are not those of its stage, by which storage groups were made, and, unless
    ``untested``, one whose layers are called in a way that nobody has tried with a pipeline.

    Args:
        stages: see :func:`stages_of`, as this process reads the environment.
        untested: the setting ``untested_models``.

    Raises:
        ValueError: names the layers, and what to do.
    """
    if not stages:
        return
    from vllm.distributed.parallel_state import get_pp_group

    if decoder.call not in CALLS and not untested:
        raise ValueError(
            f"vLLM-Flow was not tried with pipeline parallelism of {type(decoder.model).__name__}, whose layers are "
            "called in a way of their own: set pipeline_parallel_size=1, or additional_config['vllm_flow']"
            "['untested_models'] to true to try it."
        )

    stage = get_pp_group().rank_in_group
    first, layers = sum(stages[:stage]), decoder.own
    if layers != range(first, first + stages[stage]):
        raise ValueError(
            f"vLLM-Flow takes decoder layers {first} to {first + stages[stage] - 1} for those of pipeline stage "
            f"{stage}, but its model has layers {layers.start} to {layers.stop - 1}: serve this model without "
            "additional_config['vllm_flow'], or set pipeline_parallel_size=1."
        )


def make_room(runner: Any) -> None:
    """Give a runner of Model Runner V1 the tensors in which it receives an earlier stage's.

    vLLM makes them with the first pass that measures memory or warms up, which its CPU worker never runs where nothing
    is compiled.
    """
    from vllm.distributed.parallel_state import get_pp_group

    if get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
        return
    runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens,
        dtype=runner.model_config.dtype,
        device=runner.device,
    )
