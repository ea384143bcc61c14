"""`vllm-flow demo`: held-out questions at a range of cliffs in one engine, and what came of it."""
