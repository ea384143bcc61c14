"""The names by which every command takes the demo models where it takes a model."""

from __future__ import annotations

from vllm_flow.model_names import UnreadModel, check_hub

DEMO = "demo"
DEMO_MODELS = (DEMO, "demo-small")
"""Names that stand for the models of this package; each machine assembles its own copy."""


def resolve_model(model: str) -> str:
    """The path or hub name that stands for `model`; assembles a demo model on this machine.

    Raises:
        UnreadModel: (a ValueError) a demo model cannot be assembled here, or one of the hub's cannot be had; says
            why, and names the remedy.
    """
    if model not in DEMO_MODELS:
        check_hub(model)
        return model
    from vllm_flow.demo_model.assemble import AssemblyError, assemble, assemble_small
    from vllm_flow.demo_model.smollm2 import MissingDecoder

    try:
        return str(assemble() if model == DEMO else assemble_small())
    except (AssemblyError, MissingDecoder) as error:
        raise UnreadModel(str(error)) from None
