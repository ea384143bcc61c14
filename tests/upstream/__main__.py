"""``python -m tests.upstream RUN [pytest options]``: one run with all its output, e.g. to revise the list.

RUN is ``stock``, which recomputes what fails without the extension, or a number of storage groups.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.upstream import fetch
from tests.upstream.run import Run


def main(name: str = "", *options: str) -> int:
    if name not in ("stock", "1", "2"):
        print(__doc__)
        return 2
    try:
        folder = fetch.tests_of(fetch.installed_version())
    except fetch.Unavailable as reason:
        print(f"not run: {reason}")
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(name, folder, Path(scratch))
        return subprocess.call(run.command("-ra", *options), cwd=folder, env=run.environment())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
