"""vLLM-Flow: evict image tokens from vLLM's paged KV cache after a per-request cliff layer.

Importing this package imports neither torch nor vLLM.
"""

from vllm_flow.policy import FlowPolicy
from vllm_flow.policy_error import PolicyError

__all__ = ["FlowPolicy", "PolicyError", "__version__"]

__version__ = "0.1.0"
