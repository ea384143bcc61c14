"""How the extension gets into vLLM: an entry point that costs nothing until the key is set.

Seam: the entry-point group ``vllm.general_plugins``, run once in every vLLM process. vLLM swallows
import errors there, so this module imports only what is needed to install the patches.
"""

from __future__ import annotations

from typing import Any

WORKER_CLS = "vllm_flow.engine.worker.FlowWorker"
SCHEDULER_CLS = "vllm_flow.engine.scheduler.FlowScheduler"
ASYNC_SCHEDULER_CLS = "vllm_flow.engine.scheduler.FlowAsyncScheduler"


def register() -> None:
    """Entry point: make vLLM read ``additional_config["vllm_flow"]``. May run more than once."""
    from vllm_flow import models
    from vllm_flow.engine import metrics
    from vllm_flow.patches import input_processor, output_processor, vllm_config

    models.register()
    vllm_config.apply(configure)
    input_processor.apply()
    output_processor.apply(metrics.observe)


def configure(config: Any) -> None:
    """Select our worker and scheduler in a finished ``VllmConfig``; nothing without the key.

    Raises:
        ValueError: a setting or a feature that is not supported, with the remedy.
    """
    from vllm import __version__

    from vllm_flow.engine import metrics
    from vllm_flow.engine.attention.writer import check_log
    from vllm_flow.engine.settings import CONFIG_KEY, FlowSettings, with_profile_read
    from vllm_flow.engine.support import check_supported
    from vllm_flow.patches import endpoint_plugins

    options = config.additional_config
    if not isinstance(options, dict) or CONFIG_KEY not in options:
        return
    if config.model_config is None or config.model_config.is_submodel_config:
        return  # a view of a config that was or will be configured as a whole
    # Only what is read from a file is new: the user's own object stays as it is.
    read = with_profile_read(options[CONFIG_KEY])
    if read is not options[CONFIG_KEY]:
        config.additional_config = {**options, CONFIG_KEY: read}
    check_supported(config, __version__)
    check_log(config, FlowSettings.of(config))
    asynchronous = config.scheduler_config.async_scheduling
    _select(
        config.scheduler_config,
        "scheduler_cls",
        ASYNC_SCHEDULER_CLS if asynchronous else SCHEDULER_CLS,
        replaces=(None,),
    )
    _select(
        config.parallel_config,
        "worker_cls",
        WORKER_CLS,
        replaces=(
            "vllm.v1.worker.cpu_worker.CPUWorker",
            "vllm.v1.worker.gpu_worker.Worker",
        ),
    )
    metrics.enable(config.model_config.served_model_name)
    endpoint_plugins.apply(_key_check)


def _key_check() -> Any:
    """What the HTTP server attaches; imported there only, since it needs FastAPI."""
    from vllm_flow.engine.http import KeyCheck

    return KeyCheck()


def _select(section: Any, name: str, chosen: str, replaces: tuple[str | None, ...]) -> None:
    current = getattr(section, name)
    if current in (SCHEDULER_CLS, ASYNC_SCHEDULER_CLS, WORKER_CLS):
        return
    if current not in replaces:
        raise ValueError(
            f"vLLM-Flow sets {name}={chosen!r} and cannot be combined with {name}={current!r}; "
            f"leave out {name}, or leave out additional_config['vllm_flow']."
        )
    setattr(section, name, chosen)
