"""InfographicVQA: questions about infographics. (Mathew et al., WACV 2022) Scored by ANLS, see anls.py.

Layouts read: official, `infographicsVQA_val_v1.0_withQT.json` in the directory or its `val`, pictures
`image_local_name` in `infographicsvqa_images` or `images`; hub (lmms-lab/DocVQA),
`InfographicVQA/validation-*.parquet`. The scores per type of answer are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_flow.eval.tasks.anls import AnlsTask
from vllm_flow.eval.tasks.reading import Row


@dataclass(frozen=True)
class InfoVQA(AnlsTask):
    """InfographicVQA's validation split."""

    name = "infovqa"
    prompts: str = "llava"

    questions = ("infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_val_v1.0.json")
    hub = ("InfographicVQA", "lmms-lab/DocVQA")
    folders = ("infographicsvqa_images", "../infographicsvqa_images", "images", ".")

    def picture_name(self, row: Row) -> str:
        return row.identifier("image_local_name")


TASK = InfoVQA()
