"""Draws docs/glossary.svg: ``python docs/site/drawing.py``. What is drawn is computed, not copied.

One prompt, asked with two cliffs, in three storage groups. Tokens, rows and blocks come from the same
functions that the engine calls; ``tests/unit/test_glossary.py`` compares the file with what this prints.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from vllm_flow.block_counts import predict_blocks
from vllm_flow.boundaries import packed_boundary
from vllm_flow.grouping import DecoderLayers
from vllm_flow.layout import TokenLayout
from vllm_flow.plan import ScheduledRequest, plan_step
from vllm_flow.policy import FlowPolicy
from vllm_flow.spans import ImageSpans

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this folder is no package

from sheet import HEIGHT, INK, LINE, WIDTH, Sheet  # noqa: E402

FILE = Path(__file__).resolve().parents[1] / "glossary.svg"
TOKENS, BLOCK, LAYERS, GROUP = 21, 4, 6, 2
SPANS = ImageSpans(((3, 16),))
CLIFFS = {"A": 3, "B": 2}
PREFIX = 5
"""Whole blocks of tokens in the prefix of the last panel."""

TEXT, IMAGE, FRAME, CLIFF = "#0072b2", "#e69f00", "#56b4e9", "#d55e00"
EMPTY = "#f1f2f4"
LEFT = 132
COLUMNS = {"A": LEFT, "B": LEFT + 380}
CELL = 16
"""Width of a token in the lower panels: 21 of them are as wide as six blocks of 56."""
SLOT, BLOCK_WIDTH = 13, 56

LAYOUTS = {
    name: TokenLayout.of(FlowPolicy.withdrawal(cliff), SPANS) for name, cliff in CLIFFS.items()
}
STARTS = DecoderLayers(LAYERS).group_starts(GROUP)
POSITIONS = np.arange(TOKENS)
IS_IMAGE = SPANS.is_image(POSITIONS)


def color_of(token: int) -> str:
    return IMAGE if IS_IMAGE[token] else TEXT


def draw_prompt(sheet: Sheet, top: float) -> None:
    """The tokens, their positions, and the ranks of those that are kept."""
    pitch = 34
    sheet.text(LEFT, top, "A prompt", size=15, color=INK, bold=True)
    packed = LAYOUTS["A"].stored_positions(POSITIONS, LAYERS - 1)
    for token in range(TOKENS):
        x = LEFT + pitch * token
        sheet.box(x, top + 36, pitch - 3, 24, color_of(token))
        middle = x + (pitch - 3) / 2
        sheet.text(middle, top + 53, str(token), color="#ffffff", anchor="middle", bold=True)
        rank = "–" if IS_IMAGE[token] else str(packed[token])
        sheet.text(middle, top + 78, rank, color=INK, anchor="middle")
    (start, end), last = SPANS.ranges[0], TOKENS - 1
    sheet.bracket(LEFT + pitch * start, LEFT + pitch * end - 3, top + 28)
    middle = LEFT + pitch * (start + end) / 2
    sheet.text(middle, top + 23, f"*span* [{start}, {end}): its image tokens", anchor="middle")
    middle = LEFT + pitch * (end + last + 1) / 2
    sheet.bracket(LEFT + pitch * end, LEFT + pitch * (last + 1) - 3, top + 28)
    sheet.text(middle, top + 23, "text: *kept* tokens", anchor="middle")
    sheet.text(LEFT - 12, top + 53, "*position*", anchor="end")
    sheet.text(LEFT - 12, top + 78, "*packed position*", anchor="end")
    sheet.notes(
        top + 14,
        "*cliff*: layers with index >= cliff see no",
        "image token",
        "*layout*: spans and cliff, so what a",
        "request stores where",
        "*packed position*: rank among kept tokens",
    )


def draw_rows(sheet: Sheet, top: float) -> None:
    """Both requests' rows, layer by layer, as the plan of one step has them."""
    plan = plan_step([ScheduledRequest(0, TOKENS, LAYOUTS[name]) for name in CLIFFS])
    assert plan is not None
    sheet.text(LEFT, top, "A step: it computes this prompt for two requests", size=15, color=INK,
               bold=True)  # fmt: skip
    first = top + 44
    for index, (name, x) in enumerate(COLUMNS.items()):
        sheet.text(
            x, top + 24, f"Request {name}, flow_cliff = {CLIFFS[name]}", color=INK, bold=True
        )
        for layer in range(LAYERS):
            variant = plan.variant_at(layer)
            rows = range(plan.num_rows) if variant is None or variant.rows is None else variant.rows
            alive = {int(row) - TOKENS * index for row in rows}
            for token in range(TOKENS):
                place = (x + CELL * token, first + 22 * layer, CELL - 2, CELL - 2)
                if token in alive:
                    sheet.box(*place, color_of(token))
                else:
                    sheet.box(*place, EMPTY, "#d5d8dd", dashed=True)
        y = first + 22 * CLIFFS[name] - 4
        sheet.line([(x - 4, y), (x + CELL * TOKENS + 2, y)], CLIFF, 2)
        middle = x + CELL * (SPANS.ranges[0][0] + SPANS.end) / 2
        sheet.box(middle - 22, y - 8, 44, 16, "#ffffff", CLIFF)
        sheet.text(middle, y + 4, "*cliff*", anchor="middle")
    for layer in range(LAYERS):
        sheet.text(LEFT - 34, first + 12 + 22 * layer, f"layer {layer}", anchor="end")
    for start in STARTS:
        y, end = first + 22 * start - 1, first + 22 * (start + GROUP) - 7
        sheet.line([(LEFT - 24, y), (LEFT - 29, y), (LEFT - 29, end), (LEFT - 24, end)])
    second, third = (variant.first_layer for variant in plan.variants)
    rows_left = [variant.num_rows for variant in plan.variants]
    sheet.notes(first - 20, "*row*: a token of the step's batch")
    sheet.notes(first + 16, f"no variant: all {plan.num_rows} rows are alive")
    sheet.notes(
        first + 22 * second + 5, f"*variant* from layer {second}: B's image rows",
        f"are dropped, {rows_left[0]} rows are alive",
    )  # fmt: skip
    sheet.notes(
        first + 22 * third + 29, f"*variant* from layer {third}: A's too,",
        f"{rows_left[1]} rows. After the last layer rows",
        "return to their places in the batch.",
    )  # fmt: skip


def stored(name: str, layer: int) -> dict[int, int]:
    """Slot -> token of what one layer stores for a request."""
    layout = LAYOUTS[name]
    slots = layout.stored_positions(POSITIONS, layer)
    return {
        int(slots[token]): token
        for token in range(TOKENS)
        if not (layout.evicts_at(layer) and IS_IMAGE[token])
    }


def kind(name: str, start: int) -> str:
    """What a storage group is to a request, by the rule of `FlowAttentionManager`."""
    layout = LAYOUTS[name]
    if layout.evicts_at(start):
        return "packed"
    return "mixed" if layout.evicts_at(start + GROUP - 1) else "whole"


def draw_block(sheet: Sheet, x: float, y: float, index: int, pages: list[dict[int, int]]) -> None:
    """A block: per layer of its group a page of slots."""
    sheet.box(x, y, BLOCK_WIDTH - 3, SLOT * len(pages) + 3, "#ffffff", FRAME, thick=2)
    for layer, page in enumerate(pages):
        for slot in range(BLOCK):
            token = page.get(index * BLOCK + slot)
            fill = EMPTY if token is None else color_of(token)
            sheet.box(x + 2.5 + 12.2 * slot, y + 2.5 + SLOT * layer, 11, 11, fill)


def draw_blocks(sheet: Sheet, top: float) -> None:
    """The blocks of both requests in every storage group."""
    sheet.text(LEFT, top, "Their KV blocks, of one pool", size=15, color=INK, bold=True)
    whole = -(-TOKENS // BLOCK)
    pitch = 66
    for name, x in COLUMNS.items():
        counts = predict_blocks(TOKENS, LAYOUTS[name], STARTS, BLOCK)
        for group, (start, count) in enumerate(zip(STARTS, counts, strict=True)):
            y = top + 42 + pitch * group
            pages = [stored(name, layer) for layer in range(start, start + GROUP)]
            sheet.text(x, y - 7, f"{name}: *{kind(name, start)}*, {count} blocks")
            for index in range(whole):
                if index < count:
                    draw_block(sheet, x + BLOCK_WIDTH * index, y, index, pages)
                else:
                    sheet.box(x + BLOCK_WIDTH * index, y, BLOCK_WIDTH - 3, 29, "#ffffff", LINE,
                              dashed=True)  # fmt: skip
        said = " + ".join(map(str, counts))
        y = top + 42 + pitch * len(STARTS) - 8
        sheet.text(x, y, f"*footprint* of {name}: {said} blocks instead of {whole * len(STARTS)}")
    for group, start in enumerate(STARTS):
        y = top + 42 + pitch * group
        sheet.text(LEFT - 12, y + 12, "*storage group*", anchor="end")
        sheet.text(LEFT - 12, y + 27, f"layers {start}, {start + GROUP - 1}", anchor="end")
    sheet.notes(
        top + 30,
        "*block*: 4 *slots*, one *page* per layer of its",
        "group; a group has a *block table* per request",
        "*whole*: every layer is before the cliff;",
        "token at slot = position",
        "*mixed*: the cliff is inside; positions in the",
        "layers before it, packed positions in the",
        "others, in the first blocks of the same table",
        "*packed*: every layer is past the cliff;",
        "token at slot = packed position; dashed:",
        "never allocated, free for others",
        "*footprint*: the blocks that a request held",
    )


def draw_prefix(sheet: Sheet, top: float) -> None:
    """What the prefix cache keeps of whole blocks of tokens."""
    layout = LAYOUTS["A"]
    boundary = packed_boundary(SPANS, PREFIX, BLOCK)
    assert boundary.completed is not None and boundary.tail is not None
    prefix = PREFIX * BLOCK
    title = (
        f"A prefix for the cache: {PREFIX} whole blocks of tokens, {prefix} tokens, of request A"
    )
    sheet.text(LEFT, top, title, size=15, color=INK, bold=True)
    by_position = {token: token for token in range(prefix)}
    by_rank = {slot: token for slot, token in stored("A", LAYERS - 1).items() if token < prefix}
    left, right, y = COLUMNS["A"], COLUMNS["B"], top + 44
    sheet.text(left, y - 8, "in a *whole* group: a block is found by position")
    for index in range(PREFIX):
        draw_block(sheet, left + BLOCK_WIDTH * index, y, index, [by_position])
    sheet.bracket(left, left + BLOCK_WIDTH * PREFIX - 3, y + 28, -5)
    sheet.text(left, y + 44, "*prefix*")
    sheet.text(right, y - 8, "in a *packed* group: its *boundary*")
    for index, word in ((boundary.completed, "completed"), (boundary.tail, "tail")):
        x = right + 76 * index
        draw_block(sheet, x, y, index, [by_rank])
        sheet.text(x + BLOCK_WIDTH / 2 - 1, y + 32, f"*{word}*", anchor="middle")
    y += 74
    shared = layout.stored_tokens(prefix, STARTS[1] + GROUP - 1) // BLOCK
    sheet.text(left, y - 8, "in a *mixed* group: shared, or copied on write")
    for index in range(PREFIX):
        draw_block(sheet, left + BLOCK_WIDTH * index, y, index, [by_position, by_rank])
    cut = left + BLOCK_WIDTH * shared
    sheet.bracket(left, cut - 3, y + 40, -5)
    sheet.text(left, y + 55, "*shared*")
    sheet.bracket(cut, left + BLOCK_WIDTH * PREFIX - 3, y + 40, -5)
    sheet.text(cut + 6, y + 55, "*copied*: later tokens are written here")
    sheet.notes(
        top + 22,
        "*completed*: the packed block that became",
        "full since the prefix one block shorter",
        "*tail*: the packed block that the prefix fills in",
        "part; its last slot is anybody's, so a hit",
        "copies it",
        "*shared*: written by nobody any more",
        "*salt*: begins the hash of a prefix, one per",
        "cliff; three keys per hash: by position,",
        "COMPLETED and TAIL",
    )


def draw() -> str:
    """The whole picture."""
    sheet = Sheet()
    draw_prompt(sheet, 26)
    draw_rows(sheet, 158)
    draw_blocks(sheet, 376)
    draw_prefix(sheet, 646)
    for y in (126, 344, 614):
        sheet.line([(24, y), (WIDTH - 24, y)], "#e3e5e9")
    y = HEIGHT - 18
    for x, color, said in (
        (LEFT, TEXT, "text token"),
        (LEFT + 110, IMAGE, "image token"),
        (LEFT + 232, EMPTY, "unused slot, or a row that was dropped"),
    ):
        sheet.box(x, y - 10, 12, 12, color, "#d5d8dd" if color == EMPTY else "none")
        sheet.text(x + 18, y, said)
    return sheet.svg()


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
    print(FILE)
