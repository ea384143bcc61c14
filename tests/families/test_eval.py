"""The evaluation and the server ask a family in the same words; `vllm-flow eval` over Ray keeps its answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.eval.files import json_lines
from tests.families.chats import STRING, asked, give_template
from tests.families.making import Checkpoint, picture, words
from tests.families.running import Engine
from vllm_flow import cli
from vllm_flow.eval.sweep.model_facts import read_facts
from vllm_flow.eval.sweep.records import Run
from vllm_flow.eval.tasks.pope import SUFFIX

pytestmark = pytest.mark.skipif("VLLM_FLOW_FAMILIES" not in os.environ, reason="make test-families")
CLIFF = 1
MARKS = {
    "internvl_chat_qwen2": "<image>",
    "minicpm_v_2_6": "(<image>./</image>)",
    "molmo_qwen2": "",
    "phi3v": "<|image_1|>",
    "qwen_vl": None,
}
"""What stands for a picture in a template of texts; "" where the processor adds it, None where the template does."""


def ready(checkpoint: Checkpoint) -> Path:
    """A checkpoint with a chat template, its own where it brings one."""
    if MARKS[checkpoint.where.name] is not None:
        give_template(checkpoint.where, STRING)
    return checkpoint.where


def chat(engine: Engine, text: str, shown: Any, tokens: int, cliff: int | None = None) -> Any:
    """What vLLM itself makes of a chat."""
    from vllm import SamplingParams

    keys = None if cliff is None else {"flow_cliff": cliff}
    params = SamplingParams(temperature=0, max_tokens=tokens, extra_args=keys)
    return engine.llm.chat(asked(text, shown), params, use_tqdm=False)[0]


@pytest.mark.parametrize("name", MARKS)
def test_a_prompt_is_the_servers(name: str, checkpoint_of: Callable[[str], Checkpoint]) -> None:
    checkpoint = checkpoint_of(name)
    facts = read_facts(str(ready(checkpoint)), trust_remote_code=True)
    assert facts.conversation.mark == MARKS[name]
    engine = Engine(checkpoint, group_layers=2)
    text, shown = words(5, 1), picture(1, checkpoint.sizes[0])
    theirs = chat(engine, text, shown, 1).prompt_token_ids
    from vllm import SamplingParams

    prompt = {
        "prompt": facts.conversation.prompt(text, image=True),
        "multi_modal_data": {"image": shown},
    }
    ours = engine.llm.generate(
        prompt,
        SamplingParams(max_tokens=1),
        use_tqdm=False,
        tokenization_kwargs={"add_special_tokens": facts.conversation.add_special_tokens},
    )[0].prompt_token_ids
    assert list(ours) == list(theirs)
    assert set(checkpoint.image_ids) & set(ours)


@pytest.mark.parametrize("name", ["qwen_vl", "internvl_chat_qwen2"])
def test_eval_answers_as_a_chat_does(
    name: str, checkpoint_of: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(name)
    where, folder = ready(checkpoint), tmp_path / "data" / "pope"
    questions = [words(5, seed) for seed in (1, 2, 3)]
    labels = [
        {"question_id": number + 1, "image": f"{number}.png", "text": text, "label": "yes"}
        for number, text in enumerate(questions)
    ]
    json_lines(folder / "coco_pope_random.json", labels)
    pictures = [picture(seed, checkpoint.sizes[0]) for seed in range(len(questions))]
    for number, shown in enumerate(pictures):
        shown.save(folder / f"{number}.png")
    out = tmp_path / "run"
    # Qwen-VL needs no code of the checkpoint, which raises when it runs.
    trusted = () if name == "qwen_vl" else ("--trust-remote-code",)
    arguments = [
        *("eval", "--model", str(where), "--data", str(folder.parent), "--tasks", "pope"),
        *(
            "--policies",
            f"baseline,cliff={CLIFF}",
            "--image-preparation",
            "plain",
            "--engines",
            "1",
        ),
        *("--dtype", "float32", "--max-model-len", "1024", "--kv-cache-gib", "0.25", *trusted),
        *("--engine-args", '{"skip_mm_profiling": true}', "--out", str(out)),
    ]
    assert cli.main(arguments) == 0
    rows = {
        (row["item_id"].rpartition("/")[2], row["policy"]): row
        for row in Run.open(out).answers().to_pylist()
    }
    assert len(rows) == 2 * len(questions)
    engine, differ = Engine(checkpoint, group_layers=2), 0
    for number, (text, shown) in enumerate(zip(questions, pictures, strict=True)):
        for policy, cliff in (("baseline", None), (f"cliff={CLIFF}", CLIFF)):
            (row,) = (
                r
                for key, r in rows.items()
                if key[0].endswith(str(number + 1)) and key[1] == policy
            )
            said = chat(engine, text + SUFFIX, shown, row["output_tokens"], cliff)
            assert row["answer"] == said.outputs[0].text.strip()
            assert row["prompt_tokens"] == len(said.prompt_token_ids)
            evicted = 0 if cliff is None else checkpoint.num_layers - cliff
            assert row["prefill_rows_saved"] == evicted * row["image_tokens"] > -1
        answers = {rows[key]["answer"] for key in rows if key[0].endswith(str(number + 1))}
        differ += len(answers) > 1
    assert differ, "the picture hardly matters"
