"""DocVQA: questions about scanned documents. (Mathew et al., WACV 2021) Scored by ANLS, see anls.py.

Layouts read: official, `val_v1.0_withQT.json` or `val_v1.0.json` in the directory or its `val`, pictures as the
records name them (`documents/x.png`); hub (lmms-lab/DocVQA), `DocVQA/validation-*.parquet`. The test split's
answers are not public.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_flow.eval.tasks.anls import AnlsTask
from vllm_flow.eval.tasks.reading import Row


@dataclass(frozen=True)
class DocVQA(AnlsTask):
    """DocVQA's validation split."""

    name = "docvqa"
    prompts: str = "llava"

    questions = ("val_v1.0_withQT.json", "val_v1.0.json")
    hub = ("DocVQA", "lmms-lab/DocVQA")
    folders = (".", "..", "spdocvqa_images", "../spdocvqa_images")

    def picture_name(self, row: Row) -> str:
        return row.identifier("image")


TASK = DocVQA()
