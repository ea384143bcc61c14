"""What `gated_delta` puts in, for workers that are processes of their own: vLLM's ``worker_extension_cls``."""

from tests.families import gated_delta

gated_delta.install()


class InWorkers:
    """Adds nothing: a worker imports this module before it builds its model."""
