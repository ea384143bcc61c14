"""What eviction saves on one machine, beside what arithmetic allows; on top of vLLM."""
