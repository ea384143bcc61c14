"""`vllm-flow report`: from a run's answers to scores, figures and one page."""
