"""Numbers and names as the report writes them: percent, points, p values, verdicts, metric names. (pure)"""

from __future__ import annotations

from vllm_flow.eval.report.results import Compared, Options, Policy, PolicyResult, TaskResult
from vllm_flow.eval.statistics.intervals import Interval
from vllm_flow.eval.statistics.verdicts import FoundCliff

TASKS = {
    "ai2d": "AI2D", "amber": "AMBER", "chair": "CHAIR", "chartqa": "ChartQA", "docvqa": "DocVQA", "gqa": "GQA",
    "infovqa": "InfoVQA", "mmbench": "MMBench", "mme": "MME", "mmstar": "MMStar", "ocrbench": "OCRBench",
    "pope": "POPE", "realworldqa": "RealWorldQA", "refcoco": "RefCOCO", "scienceqa": "ScienceQA",
    "textvqa": "TextVQA", "vizwiz": "VizWiz",
}  # fmt: skip
ACROSS_TASKS = (
    "Each task stands by itself, with 95 % for its own interval and Holm's correction over its own policies; nothing "
    "corrects across tasks."
)
METRICS = {
    "f1": "F1", "chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "chair": "CHAIR", "anls": "ANLS", "mean_iou": "mean IoU",
    "hal": "Hal", "cog": "Cog", "cover": "Cover", "img_accuracy": "accuracy (IMG)",
}  # fmt: skip


def task_title(name: str) -> str:
    """`textvqa-no-ocr` -> `TextVQA (no ocr)`; names that are not known stay as they are."""
    stem, _, variant = name.partition("-")
    if stem not in TASKS:
        return name
    return f"{TASKS[stem]} ({variant.replace('-', ' ')})" if variant else TASKS[stem]


def metric_title(name: str) -> str:
    """`f1_random` -> `F1 random`."""
    for known in sorted(METRICS, key=len, reverse=True):
        if name == known or name.startswith(known + "_"):
            return (METRICS[known] + " " + name[len(known) + 1 :].replace("_", " ")).strip()
    return name.replace("_", " ")


def policy_title(policy: Policy) -> str:
    """`cliff=12` -> `cliff 12`; kinds that are not known keep their names."""
    if policy.kind == "text-only":
        return "text only"
    if policy.kind in ("cliff", "downsample"):
        return policy.name.replace("=", " ")
    return policy.name


def is_share(result: TaskResult, metric: str) -> bool:
    """Whether a metric is shown in percent: it is nowhere outside [0, 1]."""
    values = [r.values[metric].value for r in result.policies if metric in r.values]
    return all(0 <= value <= 1 for value in values)


def number(value: float, share: bool = True) -> str:
    """A share in percent with one decimal, or a number with two."""
    return f"{100 * value:.1f}" if share else f"{value:.2f}"


def signed(value: float, share: bool = True) -> str:
    """A difference with its sign; zero has none."""
    text = f"{100 * value:+.1f}" if share else f"{value:+.2f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def limits(interval: Interval, share: bool = True, sign: bool = False) -> str:
    """An interval in brackets."""
    form = signed if sign else number
    return f"[{form(interval.low, share)}, {form(interval.high, share)}]"


def p_text(p: float) -> str:
    """A p value with as many digits as it deserves."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{min(p, 1):.2f}"


def unit(share: bool) -> str:
    """What a difference is counted in."""
    return "points" if share else "units"


def verdict_text(
    compared: Compared,
    tolerance: float,
    share: bool = True,
    higher_is_better: bool = True,
    level: float = 0.05,
) -> str:
    """The verdict on a difference, in words that say no more than was found."""
    verdict = compared.verdict
    size = number(abs(compared.comparison.difference.value), share)
    within = f"within ±{exact(tolerance, share)} {unit(share)}"
    if verdict.finding == "identical":
        text = "every answer scored the same"
    elif verdict.finding in ("worse", "better"):
        return f"{verdict.finding} by {size}" + (f", {within}" if verdict.within_tolerance else "")
    elif compared.comparison.p_value < level:
        worse = (compared.comparison.difference.value < 0) == higher_is_better
        return f"{'worse' if worse else 'better'} by {size}, but not beyond chance after correction"
    else:
        text = "no difference found"
    if verdict.within_tolerance:
        return f"{text}; {within}"
    if share and compared.detectable >= 1:
        return f"{text}; too few questions to show any"
    return f"{text}; ±{number(compared.detectable, share)} or more would likely show"


def compared(
    against: Compared, result: PolicyResult, share: bool, task: TaskResult, options: Options
) -> dict[str, str]:
    """The cells of a comparison: how far, how surely, which answers, and what is found.

    Args:
        result: whose answers flipped, and by how many.
    """
    c = against.comparison
    return {
        "difference": signed(c.difference.value, share),
        "difference_limits": limits(c.difference, share, sign=True),
        "p": p_text(c.p_value),
        "corrected": p_text(against.p_corrected),
        "flips": f"+{result.gained} −{result.lost}",
        "mcnemar": "" if result.mcnemar_p is None else p_text(result.mcnemar_p),
        "verdict": verdict_text(
            against, options.tolerance, share, task.higher_is_better, options.level
        ),
        "finding": against.verdict.finding,
    }


def cliff_text(cliff: FoundCliff | None, tolerance: float, share: bool = True) -> str:
    """What a sweep shows, then what it found and what it saw, in a sentence or two."""
    if cliff is None:
        return "There is no cliff to compare with the baseline."
    size = tolerance_text(tolerance, share)
    if cliff.found is None:
        return f"A loss beyond {size} was found even at the deepest cliff asked, {cliff.asked[-1]}."
    if cliff.shown is not None:
        first = f"From cliff {cliff.shown} on it is shown that no more than {size} is lost."
    else:
        first = f"Too few questions to show of any cliff asked that it loses no more than {size}."
    if cliff.seen is None:
        return f"{first} A larger loss is seen even at the deepest one, {cliff.asked[-1]}."
    if cliff.seen == cliff.shown:
        return first
    return f"{first} No larger loss was seen, and none found, from cliff {cliff.seen} on."


def cliff_headline(cliff: FoundCliff | None) -> str:
    """The shown cliff, or why there is none, in a word or three."""
    if cliff is None:
        return "none asked"
    if cliff.shown is not None:
        return f"cliff {cliff.shown}"
    return "too few questions" if cliff.too_few else "none: a loss at every cliff"


def share_text(interval: Interval | None) -> str:
    """A share in per cent; a dash where there is none."""
    return "–" if interval is None else number(interval.value)


def tolerance_text(tolerance: float, share: bool = True) -> str:
    """`1 point`, `0.25 points`."""
    name = "point" if share and exact(tolerance) == "1" else unit(share)
    return f"{exact(tolerance, share)} {name}"


def exact(tolerance: float, share: bool = True) -> str:
    """A tolerance as it was given, a share in points: `0.25`."""
    return f"{100 * tolerance if share else tolerance:g}"
