"""A Prometheus server that scrapes one target, from whichever package the machine has it (Debian: prometheus)."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.serving import free_port

SCRAPE_SECONDS = 1
CONFIGURATION = """
global: {{scrape_interval: {seconds}s, scrape_timeout: {seconds}s}}
scrape_configs:
  - job_name: server
    static_configs: [{{targets: ["{target}"]}}]
"""


class Prometheus:
    """A running server's HTTP interface."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=30)

    def query(self, expression: str) -> list[Any]:
        """The expression now; fails the test where it is refused or not without warnings."""
        answer = self.client.get("/api/v1/query", params={"query": expression})
        found = answer.json()
        assert answer.status_code == 200 and found["status"] == "success", (expression, found)
        assert not found.get("warnings"), (expression, found["warnings"])
        result: list[Any] = found["data"]["result"]
        return result

    def wait_for(self, expression: str, seconds: float = 60) -> list[Any]:
        """The expression's result, as soon as there is one.

        A busy server misses scrapes; after one that it missed, what it told is stale, and an expression has
        no result until the next one.
        """
        end = time.monotonic() + seconds
        while not (found := self.query(expression)):
            assert time.monotonic() < end, f"{expression} has no result after {seconds} s"
            time.sleep(0.2)
        return found


@contextmanager
def scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus whose one target is ``target`` (host and port); the test is skipped without one."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("there is no Prometheus server: apt install prometheus")
    file = folder / "prometheus.yml"
    file.write_text(CONFIGURATION.format(seconds=SCRAPE_SECONDS, target=target))
    address = f"127.0.0.1:{free_port()}"
    command = [
        *(program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address={address}", "--log.level=warn"),
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        running = Prometheus(f"http://{address}")
        end = time.monotonic() + 60
        while not _ready(running):
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < end, "Prometheus does not answer"
            time.sleep(0.2)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _ready(running: Prometheus) -> bool:
    try:
        return running.client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
