"""Executes docs/first_steps.ipynb from top to bottom: ``python docs/site/notebook.py OUT``, `make docs-check`.

OUT is the notebook with what it printed, fit to be committed: without what went to the standard error
stream, and with one form of each picture. A cell that fails ends it with the cell's traceback, exit status 1; so
does one that takes too long, and a kernel that dies.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

NOTEBOOK = Path(__file__).resolve().parents[1] / "first_steps.ipynb"
CELL_SECONDS = 600
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop messages about this machine and second forms of pictures; join printed text; in place."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # time stamps
        kept: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                if output.name == "stderr":
                    continue
                lines = COLOURS.sub("", output.text).splitlines(keepends=True)
                output.text = "".join(line.rstrip() + "\n" for line in lines if line.strip())
                if kept and kept[-1].output_type == "stream":
                    kept[-1].text += output.text
                    continue
            else:
                output.get("data", {}).pop("image/jpeg", None)
            kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
    return notebook


def execute(out: Path) -> None:
    """Run every cell in a fresh kernel, in the notebook's folder.

    Raises:
        CellExecutionError: a cell fails.
        CellTimeoutError: one takes more than `CELL_SECONDS`.
        DeadKernelError: the kernel died.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=CELL_SECONDS, resources=folder).execute()
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(tidy(notebook), out)


if __name__ == "__main__":
    try:
        execute(Path(sys.argv[1]))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        sys.exit(f"{NOTEBOOK.name}: {error}")
    print(f"docs: every cell ran; with its output: {sys.argv[1]}")
