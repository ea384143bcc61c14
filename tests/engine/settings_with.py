"""An engine's settings for tests, without an engine."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from vllm_flow.engine.engine_facts import EngineFacts
from vllm_flow.engine.settings import FlowSettings

FACTS = {field.name for field in fields(EngineFacts)}


def settings_with(settings: FlowSettings, **values: Any) -> FlowSettings:
    """The same with other values of options, or of what the engine says of itself."""
    facts = {name: value for name, value in values.items() if name in FACTS}
    options = {name: value for name, value in values.items() if name not in FACTS}
    return replace(settings, engine=replace(settings.engine, **facts), **options)
