"""Gets the extension into vLLM: an entry point that costs nothing until the key is set.

Seam: the entry-point group ``vllm.general_plugins``, run once in every vLLM process. vLLM swallows
import errors there, so this module imports only what is needed to install the patches.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.vllm_flow.plugin")

WORKER_CLS = "vllm_flow.engine.worker.worker.FlowWorker"
SCHEDULER_CLS = "vllm_flow.engine.core.scheduler.FlowScheduler"
ASYNC_SCHEDULER_CLS = "vllm_flow.engine.core.scheduler.FlowAsyncScheduler"


def register() -> None:
    """Entry point: make vLLM read ``additional_config["vllm_flow"]``. May run more than once."""
    from vllm_flow import models
    from vllm_flow.engine.front_end import metrics
    from vllm_flow.patches import input_processor, output_processor, vllm_config

    models.register()
    vllm_config.apply(configure)
    input_processor.apply()
    output_processor.apply(metrics)


def configure(config: Any) -> None:
    """Select our worker and scheduler in a finished ``VllmConfig``; nothing without the key.

    Raises:
        ValueError: a setting or a feature that is not supported, with the remedy.
    """
    from vllm import __version__

    from vllm_flow import __version__ as FLOW_VERSION
    from vllm_flow.engine.core.attention.writer import check_log
    from vllm_flow.engine.front_end.default_policies import check_policies
    from vllm_flow.engine.setting_values import CONFIG_KEY, with_profile_read
    from vllm_flow.engine.settings import FlowSettings
    from vllm_flow.engine.support import check_supported

    options = _options_of(config)
    if options is None or _is_part(config):
        return
    # Only what is read from a file is new: the user's own object stays as it is.
    read = with_profile_read(options[CONFIG_KEY])
    if read is not options[CONFIG_KEY]:
        config.additional_config = {**options, CONFIG_KEY: read}
    check_supported(config, __version__)
    settings = FlowSettings.of(config)
    check_policies(settings)
    check_log(config, settings)
    _select_classes(config)
    logger.info_once("vLLM-Flow %s: %s", FLOW_VERSION, settings.summary)
    if settings.profile is not None:
        _tell_unlike(settings.profile, config.model_config)
    _equip_front_end(config, settings)


def _options_of(config: Any) -> dict[str, Any] | None:
    """``additional_config`` where it has the key; None without it, and the log says what looks forgotten.

    Raises:
        ValueError: settings of ours stand beside the key.
    """
    from vllm_flow.engine.setting_values import CONFIG_KEY, place_of, strays
    from vllm_flow.engine.settings import FlowSettings

    options = config.additional_config
    if not isinstance(options, dict):
        return None
    misplaced = strays(options, FlowSettings.names())
    if CONFIG_KEY in options:
        if misplaced:
            raise ValueError(
                f"additional_config[{misplaced[0]!r}]: this setting belongs into the object {CONFIG_KEY!r}; "
                f"write {place_of(misplaced[0])}."
            )
        return options
    for name in misplaced:
        logger.warning_once(
            "additional_config[%r] is no setting of vLLM's. If it is meant for vLLM-Flow, which is off: "
            "write %s.",
            name,
            place_of(name),
        )
    return None


def _is_part(config: Any) -> bool:
    """Whether it is a view of a config that was or will be configured as a whole, a drafter's among them."""
    from vllm_flow.engine import drafts

    if config.model_config is None or config.model_config.is_submodel_config:
        return True
    return drafts.is_drafters_config(config)


def _select_classes(config: Any) -> None:
    """Put our scheduler and worker into the config.

    Raises:
        ValueError: somebody else's classes are there.
    """
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


def _equip_front_end(config: Any, settings: Any) -> None:
    """Count in this process, and apply the patches that an engine with the key needs in its front end."""
    from vllm_flow.engine.front_end import metrics
    from vllm_flow.engine.worker.prompt_scores import blank
    from vllm_flow.patches import core_client, endpoint_plugins, logprobs, renderer, run_batch

    metrics.enable(config.model_config.served_model_name, settings.num_layers)
    endpoint_plugins.apply(_key_check)
    renderer.apply()
    core_client.apply()
    logprobs.apply(blank)
    run_batch.apply(lambda line: _line_check(line, settings), _noting)


def _tell_unlike(profile: Any, model: Any) -> None:
    """Warn of a profile that seems to be another model's."""
    from vllm_flow.cliff_file import unlike

    served = model.served_model_name
    others = [served] if isinstance(served, str) else list(served or ())
    reason = unlike(profile, [model.model, *others], list(model.architectures or ()))
    if reason is not None:
        logger.warning_once(
            "The profile that default_policy names has as many layers as this model, but %s: its cliffs say "
            "nothing of another model's answers. If it is not the same model under two names, make one with "
            "`vllm-flow cliff`.",
            reason,
        )


def _key_check() -> Any:
    """What the HTTP server attaches; imported there only, since it needs FastAPI."""
    from vllm_flow.engine.front_end.http import KeyCheck

    return KeyCheck()


def _line_check(line: str, settings: Any) -> str | None:
    """What the batch runner asks of each line; imported there only, as above."""
    from vllm_flow.engine.front_end.http import refusal_of

    return refusal_of(line, settings)


def _noting(request: Any, handled: Any) -> Any:
    """What the batch runner awaits of each line: its handling, with the model's name noted."""
    from vllm_flow.engine.front_end.asked_model import noting

    return noting(getattr(request.body, "model", None), handled)


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
