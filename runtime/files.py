"""Files that are whole or absent, JSON that tells when it was damaged, locks, and records that outlive the code.

A record (`config.json`, `state.json`, `meta.json`, `samples.json`, ...) is read by code that may be newer than it is. A
field that a record lacks was unknown when it was written: it has its historic value, which stands beside the field's
definition. A field that the code does not know is of newer code, and refused in one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

LOCK = ".lock"  # a file in a directory that one program writes at a time
REQUIRED: Any = object()  # of a record: every one has the field; of a flag: it must be given


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: str | Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fdatasync(descriptor: int) -> None:
    """Wait until a file's content is on the disk; where a system has no such call, its names and times, too."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it: a reader sees all of it or none."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")  # several processes may write it at once
    try:
        temporary.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_at(descriptor: int, content: Any, offset: int) -> None:
    """Write all bytes of `content` (bytes, or a contiguous array) at an offset: `os.pwrite` may stop short."""
    view = memoryview(content).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextlib.contextmanager
def full_disk_is_an_error(directory: str | Path) -> Iterator[None]:
    """A disk that runs full inside, a quota or a limit of size that is reached, becomes one line.

    While training all but a checkpoint is a warning instead: see `reporting/log.py`, `training/ema.py`, and
    `log_samples` and `write_html_report` in `train.py`; `training/checkpoint.py` keeps the last good one.

    Raises:
        ValueError: the disk of `directory` is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = "the disk is full" if error.errno == errno.ENOSPC else f"the disk says '{error.strerror}'"
        raise ValueError(f"{directory}: {reason}; make room and run the same command again") from error


def to_json(content: Any) -> str:
    """Indented JSON text that ends in a newline."""
    return json.dumps(content, indent=1) + "\n"


def to_checksummed_json(content: dict[str, Any]) -> str:
    """JSON text of `content`, and as "seal" the SHA-256 of the text without it."""
    return to_json(content | {"seal": hashlib.sha256(to_json(content).encode()).hexdigest()})


def read_checksummed_json(path: str | Path) -> dict[str, Any]:
    """The content of a file that `to_checksummed_json` made.

    Raises:
        ValueError: it cannot be read, is not JSON, or is not what was written.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    content = json.loads(text)
    if not isinstance(content, dict) or "seal" not in content:
        raise ValueError("it has no checksum")
    del content["seal"]
    # The text must be the one that would be written now: 1E5 for 1e5 is a changed bit, too.
    if text != to_checksummed_json(content):
        raise ValueError("it was changed since it was written")
    return content


def lock_directory(directory: str | Path, busy: str) -> Any:
    """Hold a directory that two programs must not write at once. Hold the result; its `release()`, or exit, ends it.

    Raises:
        ValueError: with the text `busy`, another process holds the directory; or it cannot be made.
    """
    from filelock import FileLock, Timeout  # 40 ms, which --help need not wait for

    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        lock = FileLock(Path(directory) / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(busy) from error
    except OSError as error:
        raise ValueError(f"--output-dir: cannot make {directory} ({error.strerror}); choose another") from error
    return lock


@dataclasses.dataclass(frozen=True)
class Field:
    """How a record's field is read.

    Args:
        historic: its value in records that lack it; `REQUIRED` if all have it.
        old_names: what older records call it.
        read_old: from a value of an older type to today's; today's values must pass unchanged.
    """

    historic: Any = REQUIRED
    old_names: tuple[str, ...] = ()
    read_old: Callable[[Any], Any] | None = None


def fields_of(config_class: type) -> dict[str, Field]:
    """The record fields of a dataclass: the metadata "record" of each of its fields, or else its default.

    A field whose default is changed later must be given `Field(historic=...)` with the old default.
    """
    fields = {}
    for field in dataclasses.fields(config_class):
        default = REQUIRED if field.default is dataclasses.MISSING else field.default
        assert field.default_factory is dataclasses.MISSING, field.name  # its historic value would be unknown
        fields[field.name] = field.metadata.get("record") or Field(default)
    return fields


def read_record(values: Mapping[str, Any], fields: Mapping[str, Field], source: str | Path) -> dict[str, Any]:
    """A record's values by today's names, with historic values for what it lacks.

    Args:
        values: as they were written. Lists become tuples.
        fields: the record's definition.
        source: named in errors.

    Raises:
        ValueError: it lacks a field that all records have, or has one that this code does not know.
    """
    left, read = dict(values), {}
    for name, field in fields.items():
        found = next((known for known in (name, *field.old_names) if known in left), None)
        if found is None and field.historic is REQUIRED:
            raise ValueError(f"{source}: damaged, it lacks {name!r}")
        value = field.historic if found is None else left.pop(found)
        value = tuple(value) if isinstance(value, list) else value
        read[name] = field.read_old(value) if field.read_old and found is not None else value
    if left:
        which = f"revision {values['git_revision']}" if values.get("git_revision") else "newer code"
        raise ValueError(f"{source} was written by newer code: it has {', '.join(map(repr, left))}; use {which}")
    return read


def given_differences(saved: Mapping[str, Any], now: Mapping[str, Any], given: set[str] | frozenset[str]) -> list[str]:
    """Names of `given` settings whose value now is not the saved one. What was not given is taken from the record."""
    return [name for name in now if name in given and saved[name] != now[name]]
