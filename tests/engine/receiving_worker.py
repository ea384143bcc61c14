"""Stock vLLM's CPU worker, able to receive what an earlier pipeline stage sends.

vLLM 0.32 makes the tensors for that while it profiles or warms up, which its CPU worker leaves out where nothing is
compiled and the KV cache has a set size: the first step then ends the engine. Engines with the extension make them.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_flow.engine.pipeline import make_room


class ReceivingWorker(CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        make_room(self.model_runner)
