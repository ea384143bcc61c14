"""Tokens that the prompt's last token attends to: FastV's choice.

"An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models", section 4, as its released code does it; the text averages over all tokens.
"""

from vllm_flow.ranks.base import AttentionRank, Needs

LAST_PROMPT = AttentionRank(
    "last_prompt", "what the prompt's last token attends to most", Needs.PROMPT
)
"""Sees the question: nothing from the first image on can be shared with another prompt."""
