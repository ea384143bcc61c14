"""Tokens that the prompt's last token would attend to most if nothing told it how far away they are.

Rotary positions make far tokens fade, so that `last_prompt` favours the bottom of a picture. "Feather the
Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration" (arXiv 2412.13180).
"""

from vllm_flow.ranks.rows import UnrotatedRank

UNROTATED = UnrotatedRank(
    "unrotated", "what the prompt's last token would attend to most without rotary positions"
)
