"""Methods that withdraw all image tokens at one layer, alone or after some were dropped before the decoder."""

from vllm_flow.policy import Stage
from vllm_flow.presets.base import Paper, Preset, share

_HORIZON = Paper(
    "When Token Pruning is Worse than Random: Understanding Visual Token Information in VLLMs",
    "2512.07580",
    where="version 1 is called All You Need Are Random Visual Tokens? Demystifying Token Pruning in VLLMs",
)


def _horizon(budget: int, tokens: int, layer: int, average: str) -> Preset:
    return Preset(
        f"horizon-{budget}",
        "Information Horizon",
        (Stage(0, share(tokens), "diversity"), Stage(layer)),
        (
            f"DivPrune keeps {tokens} of 576 tokens before the decoder. They are withdrawn at layer {layer} of 32: "
            f"an average of {average} a layer, for the paper's budget of {budget}.",
        ),
        (
            "Counts and layer are those cited from the paper. Its code had not been released when this was written, "
            "so nothing could be compared with it.",
            "The abstract speaks of random tokens in deep layers. Here none are left there.",
            "Kept tokens keep their positions.",
        ),
        _HORIZON,
    )


PAPER = Preset(
    "paper",
    "Information-flow cliff",
    (Stage(22),),
    ("All image tokens leave at layer 22 of 32, where section 4.2 puts POPE's cliff.",),
    (
        "The paper masks the image's keys. Here its rows leave, which gives the same answers for less work.",
    ),
    Paper(
        "From Redundancy to Relevance: Information Flow in LVLMs Across Reasoning Tasks",
        "2406.06579",
        where="section 4.2",
    ),
)
VTW = Preset(
    "vtw",
    "VTW",
    (Stage(15),),
    (
        "All image tokens leave at layer 15 of 32: K = 15, as in the released evaluation of LLaVA-1.5-7B.",
        "Text keeps its positions.",
    ),
    (
        "K is not searched for per task; `vllm-flow cliff --unlabelled` does that.",
        "The released chat takes K = 16.",
    ),
    Paper(
        "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference",
        "2405.05803",
        where="section 3",
        code="lzhxmu/VTW",
    ),
)
HORIZONS = (_horizon(192, 284, 20, "177.5"), _horizon(64, 98, 21, "64.3"))
