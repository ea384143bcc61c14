"""``python -m tests.next_vllm``: the suites that show whether the next vLLM breaks this package.

Under Model Runner V1, the engine's and the families', then some under V2, each in a process of its own. What follows
goes to pytest; a file among it takes the place of those named here, under the model runner of the environment. Status
0 as well where the version cannot be had, which is said.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.engine import v2_cpu
from tests.next_vllm.assemble import Unavailable, assembled
from vllm_flow.engine.support import NEXT_VLLM

SUITES = (
    "tests/engine/test_seams.py",
    "tests/engine/test_overrides.py",
    "tests/engine/test_startup.py",
    "tests/engine/test_startup_refusals.py",
    "tests/engine/test_startup_cuda.py",
    "tests/engine/test_exactness.py",
    "tests/engine/test_flashinfer.py",
    "tests/engine/test_compiled.py",
    "tests/engine/test_coordination.py",
    "tests/engine/test_prefix_caching.py",
    "tests/engine/test_prefix_policies.py",
    "tests/engine/test_kv_events.py",
    "tests/engine/test_lifecycle.py",
    "tests/engine/test_last_layer.py",
    "tests/engine/test_late_eviction.py",
    "tests/engine/test_connector.py",
    "tests/engine/test_handing_over.py",
    "tests/engine/test_lora.py",
    "tests/engine/test_prompt_logprobs.py",
    "tests/engine/test_prompt_embeds.py",
    "tests/engine/test_drafters.py",
)
FAMILIES = (
    "tests/families/test_exact.py",
    "tests/families/test_states.py",
    "tests/families/test_cached_states.py",
    "tests/families/test_logged_states.py",
)
"""A few families, one with latent attention among them; states of linear attention, and their cached prefixes."""
V1_ALONE = (
    "tests/families/test_forms.py",
    "tests/engine/test_pipeline.py",
    "tests/families/test_latent.py",
    "tests/families/test_drafted_convolutions.py",
    "tests/families/test_drafted_states.py",
    "tests/families/test_adapted_states.py",
    "tests/families/test_connected_states.py",
)
SUITES_V2 = (
    "tests/engine_v2/test_shared.py",
    "tests/engine_v2/test_drafters.py",
    "tests/engine_v2/test_pipeline.py",
)
NOT_LONG = ("-m", "not long")
V2 = {v2_cpu.SWITCH: "1"}
RUNS: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    (SUITES, {}),
    ((*FAMILIES, *V1_ALONE, *NOT_LONG), {}),
    ((*SUITES_V2, *NOT_LONG), V2),
    ((*FAMILIES, *NOT_LONG), V2),
)
"""What each process is given, and what its environment has beside this one's."""


def main(arguments: list[str]) -> int:
    try:
        folder = assembled(NEXT_VLLM)
    except Unavailable as error:
        print(f"vLLM {NEXT_VLLM} was not tested: {error}")
        return 0
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest"]
    if any(os.path.exists(argument.split("::")[0]) for argument in arguments):
        return subprocess.run([*command, *arguments], env=environment).returncode
    done = [
        subprocess.run([*command, *suites, *arguments], env=environment | runner)
        for suites, runner in RUNS
    ]
    return max(run.returncode for run in done)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
