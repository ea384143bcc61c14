"""Tokens that the image's last token attends to: the paper's Eq. 10, with its row counted from 1.

Counted from 0 that row would be the first token after the image. At a later stage the image's last
token may be gone: the last one left ranks. "From Redundancy to Relevance", section 3.4 and appendix A.2.
"""

from vllm_flow.ranks.base import AttentionRank, Needs

LAST_IMAGE = AttentionRank("last_image", "what the image's last token attends to most", Needs.IMAGE)
"""Sees the picture and what is before it, so another question on the same picture shares its tokens."""
