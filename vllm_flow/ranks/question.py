"""Tokens that the question attends to, on average over its rows.

FastV's text ("An Image is Worth 1/2 Tokens After Layer 2", section 4) ranks by an average over rows where its
released code takes the last one; the rows behind the picture are those that see all of it.
"""

from vllm_flow.ranks.rows import QuestionRank

QUESTION = QuestionRank(
    "question", "what the prompt's text behind the images attends to most, on average"
)
