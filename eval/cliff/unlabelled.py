"""What the cliff finder measures without labels: divergence, agreement, and what attention alone would say.

Asks the engine, or its record; the rule is `vllm_flow.eval.cliff.divergence`'s.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vllm_flow.counts import counted
from vllm_flow.eval.cliff import divergence
from vllm_flow.eval.cliff.engine import CliffEngine
from vllm_flow.eval.cliff.evidence import CliffError
from vllm_flow.eval.statistics import intervals
from vllm_flow.eval.tasks import Item

ATTENTION_ITEMS = 32
"""Questions whose attention is logged."""

NOT_CAUSAL = (
    "Attention is what a layer reads, not what the answer needs: a layer may read the image without "
    "effect, or pass on what earlier layers moved into the text. Shown for comparison; it decides nothing."
)

FIRST_TOKEN, ATTENTION = "first token", "attention"
"""What the record calls the measurements."""


def check_pictures(items: Sequence[Item], rule: str) -> None:
    """Refuse to decide by an interval that too few pictures make.

    Raises:
        CliffError: says how many there are, and how many it takes.
    """
    pictures = len({item.picture_of for item in items})
    if rule == "upper" and pictures < divergence.FEWEST_PICTURES:
        raise CliffError(
            f"the questions are about {counted(pictures, 'picture')}, and the interval by whose upper limit "
            "--kl-rule upper decides is made by resampling pictures: ask about at least "
            f"{divergence.FEWEST_PICTURES}, or decide by the mean with --kl-rule mean."
        )


def unlabelled(engine: CliffEngine, args: Namespace) -> dict[str, Any]:
    """Divergence of the first answer token's distribution and agreement of the answers, layer by layer."""
    count, layers = len(engine.work.items), len(engine.policies) - 1
    divergences = np.empty((layers, count))
    same_token = np.empty((layers, count))
    with tqdm(total=count, unit="question", desc="distributions", dynamic_ncols=True) as bar:
        for at in range(count):
            divergences[:, at], same_token[:, at] = first_token(engine, at)
            bar.update()
    same_answer = agreement(engine)
    numbers: dict[str, int] = {}
    units = [numbers.setdefault(i.picture_of, len(numbers)) for i in engine.work.items]
    means = divergence.bootstrap_means(divergences, args.confidence, units=units)
    # Wilson's interval for shares: a bootstrap of answers that all agree knows no width.
    agreed, token = (
        [intervals.clustered_share(row, units, args.confidence) for row in rows]
        for rows in (same_answer, same_token)
    )
    rule = {
        reading: divergence.divergence_cliff(means, args.kl_threshold, reading)
        for reading in ("mean", "upper")
    }
    return {
        "evidence": {
            "method": "unlabelled",
            "rung": rule[args.kl_rule],
            "metric": "KL(baseline || cliff) of the first answer token, nats, whole vocabulary",
            "items": count,
            "pictures": len(numbers),
            "confidence": args.confidence,
            "threshold": args.kl_threshold,
            "rule": args.kl_rule,
            "by_rule": rule,
            "curve": [
                {
                    "layer": layer,
                    "items": count,
                    "kl": asdict(means[layer]),
                    "same_answer": asdict(agreed[layer]),
                    "same_first_token": asdict(token[layer]),
                }
                for layer in range(layers)
            ],
            "requests": engine.requests,
        },
    }


def first_token(engine: CliffEngine, at: int) -> tuple[list[float], list[float]]:
    """Per layer, how far a question's first answer token moves from the baseline's, and whether it is the same."""
    item = engine.work.items[at]
    known = None if engine.record is None else engine.record.measured(FIRST_TOKEN, item.id)
    if known is not None:
        engine.requests += len(engine.policies)
        return known["kl"], known["same"]
    *layers, full = engine.distributions(at)
    kl = [divergence.divergence(full, one) for one in layers]
    same = [float(one.argmax() == full.argmax()) for one in layers]
    if engine.record is not None:
        engine.record.measure(FIRST_TOKEN, item.id, {"kl": kl, "same": same})
    return kl, same


def agreement(engine: CliffEngine) -> Any:
    """[layers, questions] whether the greedy answer is the baseline's."""
    items, layers = engine.work.items, len(engine.policies) - 1
    texts: dict[tuple[str, int], str] = {}
    wanted = [(at, range(layers + 1)) for at in range(len(items))]
    total = len(items) * (layers + 1)
    with tqdm(total=total, unit="answer", desc="answers", dynamic_ncols=True) as bar:
        for item_id, layer, text, error in engine.answers(wanted, bar.update):
            if text is None:
                raise CliffError(f"question {item_id} at layer {layer}: {error}")
            texts[item_id, layer] = text
    return np.array(
        [
            [float(texts[item.id, layer] == texts[item.id, layers]) for item in items]
            for layer in range(layers)
        ]
    )


def attention(engine: CliffEngine, folder: Path, share: float) -> dict[str, Any] | None:
    """What the attention on the image alone would have said; None where the first questions have no picture."""
    indices = [
        at for at, item in enumerate(engine.work.items[:ATTENTION_ITEMS]) if item.image is not None
    ]
    if not indices:
        return None
    masses = image_masses(engine, indices, folder)
    means = divergence.bootstrap_means(masses.T)
    return {
        "flow_cliff": divergence.stays_below([m.value for m in means], share, len(means)),
        "share": share,
        "items": len(indices),
        "image_mass": [asdict(mean) for mean in means],
        "remark": NOT_CAUSAL,
    }


def image_masses(engine: CliffEngine, indices: list[int], folder: Path) -> Any:
    """[questions, layers] share of the baseline's attention on the image, asked where it is not known."""
    items, record = engine.work.items, engine.record
    known = (
        {at: record.measured(ATTENTION, items[at].id) for at in indices}
        if record is not None
        else {}
    )
    left = [at for at in indices if known.get(at) is None]
    engine.requests += len(indices) - len(left)
    for at, masses in zip(left, engine.image_masses(left, folder) if left else (), strict=True):
        known[at] = masses.tolist()
        if record is not None:
            record.measure(ATTENTION, items[at].id, known[at])
    return np.array([known[at] for at in indices])
