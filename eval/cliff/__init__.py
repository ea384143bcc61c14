"""`vllm-flow cliff`: the smallest layer that is shown to lose no more than tolerated."""
