"""Evaluation: statistics now, tasks and drivers later. Installed as `vllm_flow.eval`."""
