"""Pages and cards from the templates in reporting/templates/, and the writing of results.

In `*.html` every value is escaped, so that what comes from files cannot become markup. In other templates (`*.md`, the
style, the script) values stand as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from runtime.files import write_atomically

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> jinja2.Environment:
    """Where templates are found, and how they are read: an unknown name is an error, not an empty string.

    Filters and globals may be added to it before `get_template(name).render(**values)`.
    """
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,  # a line that holds only {% ... %} leaves no empty line
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}  # of {{ value | tojson }}
    return jinja


def render(template: str, **values: Any) -> str:
    """The text of a template, such as "report.html"."""
    return environment().get_template(template).render(**values)


def write_result(path: str | Path, content: str | bytes, flag: str) -> None:
    """Write a file that the user asked for; a reader sees all of it or none.

    Raises:
        ValueError: it cannot be written where `flag` says.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise ValueError(f"{flag}: cannot write {path} ({error.strerror}); choose another place") from error
