"""The analysis' attention reference is what an engine's attention log holds, family by family.

Both go by the processor's tokens: text between the rows or tiles of a picture counts as the user's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from vllm import SamplingParams

from tests.families.asking import prompts_of
from tests.families.making import Checkpoint
from tests.families.running import Engine
from tests.longer import some
from vllm_flow.analysis.attention_reference import attention_masses
from vllm_flow.analysis.vlm import Vlm

NAMES = (
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "smolvlm",
    "mistral3",
    "pixtral",
    "glm4_1v",
)
TOLERANCE = 5e-5
"""Of a probability, as for the log."""


@pytest.mark.parametrize("name", some(NAMES, ["qwen2_5_vl", "internvl"]))
def test_the_reference_is_the_engines_log(
    name: str, checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(name)
    flow = {"group_layers": 2, "attention_log": str(tmp_path)}
    engine = Engine(checkpoint, group_layers=2, additional_config={"vllm_flow": flow})
    vlm = Vlm(checkpoint.model, checkpoint.processor, name)
    ask, _ = prompts_of(checkpoint)
    params = SamplingParams(
        temperature=0,
        max_tokens=4,
        ignore_eos=True,
        allowed_token_ids=checkpoint.word_ids,
        extra_args={"flow_log_attention": True, "flow_log_attention_heat": True},
    )
    (output,) = engine.llm.generate([engine.prompt(ask)], params, use_tqdm=False)
    encoded = vlm.encode(ask.text, ask.pictures[0])
    assert encoded.ids_T.tolist() == list(output.prompt_token_ids)
    answer = list(output.outputs[0].token_ids)
    masses = attention_masses(vlm, encoded, answer)
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    assert scheduler.flow_logged.log.flush()
    rows = pq.read_table(tmp_path / "mass").to_pylist()
    assert len(rows) == checkpoint.num_layers * len(answer)
    for row in rows:
        at = row["layer"], row["token"]
        found = [row[span] for span in ("system", "image", "user", "output")]
        np.testing.assert_allclose(found, masses.spans_LAS[at], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(row["images"], masses.images_LAI[at], atol=TOLERANCE, rtol=0)
    for row in pq.read_table(tmp_path / "heat").to_pylist():
        heat = masses.heat_LAP[row["layer"], row["token"]]
        np.testing.assert_allclose(row["heat"], heat, atol=TOLERANCE, rtol=0)
