"""Values of logs and records, to compute with and to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def finite(value: Any) -> Any:
    """A finite number as it is; None for everything else."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None


def evenly(items: Sequence, limit: int) -> list:
    """At most `limit` (at least 1) of the items at even distances, the first and the last among them.

    Of a limit of one, the last.
    """
    items = list(items)
    if len(items) <= limit:
        return items
    if limit == 1:
        return items[-1:]
    return [items[round(k * (len(items) - 1) / (limit - 1))] for k in range(limit)]


def format_number(value: Any) -> str:
    """A number to be read: four digits of a fraction. NaN in the log are of steps that were not applied."""
    if value is None:
        return "–"
    if not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(items: Sequence, most: int = 12) -> str:
    rest = f", ... ({len(items):,} in all)" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + rest or "none"


def shortened(text: str, most: int, from_end: float = 2 / 3) -> str:
    """Text in one line of at most so many characters.

    Its middle is left out, since names and paths differ at their ends: of what stays, a share of `from_end` is the end.
    """
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    if len(text) <= most:
        return text
    end = int((most - 3) * from_end)
    return f"{text[: most - 3 - end].rstrip(' ,')}...{text[len(text) - end :]}"


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in cells)
