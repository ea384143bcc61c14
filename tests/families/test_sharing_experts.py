"""Two engines that compute a model's experts for one another are exact, whatever each evicts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vllm.utils.network_utils import get_open_port

from tests.longer import some

MODULE = "tests.families.sharing_experts"
SECONDS = 600


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two engines need two cores")
@pytest.mark.parametrize(
    "name", some(("qwen3_vl_moe", "kimi_vl", "qwen3_5_moe"), kept=("qwen3_vl_moe",))
)
def test_two_engines_that_share_experts_are_exact(name: str, tmp_path: Path) -> None:
    """Each is asked other things, one for longer: what one loses between its layers, the other is told."""
    port = str(get_open_port())
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    engines = []
    for rank, log in enumerate(logs):
        folder = tmp_path / str(rank)
        folder.mkdir()
        with log.open("w") as written:
            engines.append(
                subprocess.Popen(
                    [sys.executable, "-m", MODULE, str(rank), port, str(folder), name],
                    stdout=written,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        end = time.monotonic() + SECONDS
        while None in [engine.poll() for engine in engines] and time.monotonic() < end:
            if any(engine.poll() for engine in engines):
                break  # the other one waits for it
            time.sleep(0.5)
        ends = [engine.poll() for engine in engines]
        assert ends == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)
    finally:
        for engine in engines:
            engine.kill()
    counts = [re.search(r"STEPS (\d+) KEPT UP (\d+)", log.read_text()) for log in logs]
    for count in counts:
        assert count is not None
        assert int(count[1]) > 0, "no rows left"
        # Of Kimi-VL's picture no chunk is without text.
        assert name == "kimi_vl" or int(count[2]) > 0, "no step was of image tokens alone"
