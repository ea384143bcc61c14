"""What tests read of a report: the words of its page, the rows of its tables."""

from __future__ import annotations

import csv
import html
import re
from pathlib import Path


def words(page: Path) -> str:
    """The page's visible text."""
    body = re.sub(r"(?s)<style>.*?</style>|<[^>]+>", " ", page.read_text())
    return re.sub(r"\s+", " ", html.unescape(body))


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))
