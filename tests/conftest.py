"""Property tests have no deadline: a busy machine is no fault, and speed is measured elsewhere."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("vllm-flow", deadline=None)
settings.load_profile("vllm-flow")
