"""`vllm-flow eval`: many questions under many policies, on every engine there is."""
