"""JSON files that tell when a bit of them has changed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_INDENT = 1


def seal(content: dict[str, Any]) -> str:
    """The text of a file that holds `content`, and the SHA-256 of the text without it as "seal"."""
    return _dump(content | {"seal": _digest(content)})


def unseal(text: str) -> dict[str, Any]:
    """The content of a sealed file.

    Raises:
        ValueError: it is not JSON, or not what was written.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or "seal" not in content:
        raise ValueError("it does not hold settings with a seal")
    found = content.pop("seal")
    # The text must be the one that would be written now: 1E5 for 1e5 is a changed bit, too.
    if found != _digest(content) or text != _dump(content | {"seal": found}):
        raise ValueError("it was changed since it was written")
    return content


def _dump(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=_INDENT) + "\n"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(_dump(content).encode()).hexdigest()
