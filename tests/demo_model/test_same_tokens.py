"""transformers and vLLM load the very same folder and give the same greedy tokens in float32.

In `make test-long`; `make test` has tests/engine/test_demo_model.py, and an evaluation by the small one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.demo_model.test_assemble import needs_decoder

pytest.importorskip("transformers")
pytest.importorskip("vllm")

QUESTIONS, TOKENS = 6, 6


WITH_VLLM = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams
from vllm_flow.demo_model.heldout import load_questions

folder, count, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, block_size=32,
          kv_cache_memory_bytes=2**28, limit_mm_per_prompt={"image": 1})
prompts = [
    {"prompt": q.prompt, "multi_modal_data": {"image": Image.open(q.image_path)}}
    for q in load_questions("seen")[:count]
]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=length))
print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""


def transformers_tokens(folder: Path) -> list[list[int]]:
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vllm_flow.demo_model.heldout import load_questions

    processor = AutoProcessor.from_pretrained(folder)
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    rows = []
    for question in load_questions("seen")[:QUESTIONS]:
        picture = Image.open(question.image_path)
        inputs = processor(images=picture, text=question.prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        rows.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return rows


def vllm_tokens(folder: Path) -> list[list[int]]:
    """In an interpreter of its own: vLLM must not see this package's plugin."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Stock vLLM: what the checkpoint gives must not depend on this package's plugin.
        "VLLM_PLUGINS": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", WITH_VLLM, str(folder), str(QUESTIONS), str(TOKENS)],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("TOKENS "))
    return json.loads(line.removeprefix("TOKENS "))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["assemble_small", "assemble"])
def test_same_greedy_tokens(kind: str, tmp_path: Path) -> None:
    from vllm_flow.demo_model import assemble

    if kind == "assemble":
        needs_decoder()
    folder = getattr(assemble, kind)(tmp_path)
    assert transformers_tokens(folder) == vllm_tokens(folder)
