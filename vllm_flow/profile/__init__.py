"""`vllm-flow profile`: what eviction saves on one machine, beside what it could save at most."""
