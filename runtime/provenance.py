"""What a result was made with: versions, git revision, machine. Written beside every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

_PACKAGES = ("torch", "torchvision", "timm", "diffusers", "accelerate", "numpy", "scipy", "pillow")


def versions() -> dict[str, str]:
    """Version of Python and of each package that can change a number; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str:
    """Commit of this project, with "+changes" if its code differs from it, or "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    code = (".", ":!benchmarks/results")  # what benchmarks write is no change of what they measure
    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno", "--", *code) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine() -> str:
    """Processor, core count and GPU names in words, such as "AMD EPYC 9B14, 2 cores; NVIDIA H100 80GB HBM3 x1"."""
    import torch

    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [line.split(":", 1)[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    text = f"{processor}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        text += f"; {torch.cuda.get_device_name()} x{torch.cuda.device_count()}"
    return text


def now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def stamp() -> dict:
    """All of the above, to be merged into a record."""
    return {"versions": versions(), "git_revision": git_revision(), "machine": machine(), "date": now()}
