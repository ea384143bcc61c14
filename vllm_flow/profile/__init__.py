"""Measuring what eviction saves: on top of vLLM, beside what arithmetic allows."""
