"""Draws docs/policies.svg: ``python docs/site/policies.py``. What is drawn is computed, not copied.

Three policies of the same cost on one prompt, layer by layer: which tokens are left, and the blocks that each
storage group holds. Kept tokens and blocks come from the functions that the engine calls.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from vllm_flow.block_counts import predict_blocks
from vllm_flow.grouping import DecoderLayers
from vllm_flow.layout import TokenLayout
from vllm_flow.policy import FlowPolicy, stages_text
from vllm_flow.policy_keys import parse_policy
from vllm_flow.spans import ImageSpans

sys.path.insert(0, str(Path(__file__).parent))
from sheet import INK, LINE, SOFT, Sheet  # noqa: E402

FILE = Path(__file__).resolve().parents[1] / "policies.svg"
LAYERS, GROUP, BLOCK = 8, 2, 4
BEFORE, TOKENS, AFTER = 2, 12, 3
PROMPT = BEFORE + TOKENS + AFTER
KEYS = (
    {"flow_cliff": 2},
    {"flow_cliff": 0, "flow_keep": 3, "flow_rank": "uniform"},
    {"flow_stages": "0:5 uniform, 4:2 uniform, 6:0"},
)
TEXT, IMAGE, GONE = "#0072b2", "#e69f00", "#f1f2f4"
WIDTH, HEIGHT, LEFT, TOP = 1060, 330, 58, 74
CELL, PITCH, PANEL = 11, 26, 345
SPANS = ImageSpans(((BEFORE, BEFORE + TOKENS),))


def policy_of(keys: dict[str, object]) -> FlowPolicy:
    found = parse_policy(keys, LAYERS)
    assert found is not None
    return found


def layout_of(policy: FlowPolicy) -> TokenLayout:
    found = TokenLayout.of(policy, SPANS, PROMPT)
    assert found is not None
    return found


def draw_panel(sheet: Sheet, left: float, policy: FlowPolicy) -> None:
    """Layers from top to bottom, tokens from left to right; behind each storage group its blocks."""
    layout, positions = layout_of(policy), np.arange(PROMPT)
    blocks = predict_blocks(PROMPT, layout, DecoderLayers(LAYERS).group_starts(GROUP), BLOCK)
    (stages,) = policy.images
    text = stages_text(stages)
    sheet.text(left, 24, f"flow_cliff = {text[:-2]}" if text.endswith(":0") and "," not in text else text,
               size=15, color=INK, bold=True)  # fmt: skip
    rows = sum(policy.kept(layer, 0, TOKENS) for layer in range(LAYERS))
    sheet.text(
        left, 43, f"{rows} image rows of {TOKENS * LAYERS}, {rows / LAYERS:g} tokens a layer; "
        f"{sum(blocks)} blocks",
    )  # fmt: skip
    for layer in range(LAYERS):
        y = TOP + PITCH * layer
        gone = layout.evicted(layer)
        for token in positions:
            image = BEFORE <= token < BEFORE + TOKENS
            left_out = image and gone is not None and bool(gone.is_image(positions)[token])
            color = GONE if left_out else IMAGE if image else TEXT
            sheet.box(left + (CELL + 2) * token, y, CELL, 16, color)
    for group, start in enumerate(DecoderLayers(LAYERS).group_starts(GROUP)):
        x, y = left + (CELL + 2) * PROMPT + 8, TOP + PITCH * start
        sheet.line([(x, y), (x + 4, y), (x + 4, y + PITCH + 16), (x, y + PITCH + 16)])
        for block in range(blocks[group]):
            sheet.box(x + 12 + 13 * block, y + 16, 11, 11, "#56b4e9", LINE)


def draw() -> str:
    """The file's text."""
    sheet = Sheet()
    for layer in range(LAYERS):
        sheet.text(LEFT - 8, TOP + PITCH * layer + 12, f"layer {layer}", anchor="end", size=11)
    for number, keys in enumerate(KEYS):
        draw_panel(sheet, LEFT + PANEL * number, policy_of(keys))
    y = TOP + PITCH * LAYERS + 22
    for x, color, said in (
        (LEFT, TEXT, "text, always kept"),
        (LEFT + 150, IMAGE, "image token that the layer computes and stores"),
        (LEFT + 470, GONE, "gone"),
        (LEFT + 545, "#56b4e9", f"KV block of {BLOCK} tokens, per storage group of {GROUP} layers"),
    ):
        sheet.box(x, y - 11, 13, 13, color, LINE)
        sheet.text(x + 19, y, said, color=SOFT)
    label = "Three policies of the same cost, layer by layer: tokens kept, and KV blocks held"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, DejaVu Sans, sans-serif" role="img" aria-label="{label}">'
    )
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    return "\n".join([head, ground, *sheet.parts, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
    print(FILE)
