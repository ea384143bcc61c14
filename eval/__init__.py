"""Evaluation: tasks, sweeps on Ray, statistics, reports. Installed as `vllm_flow.eval`."""
