"""Progress in a log file: few lines, each of them whole."""

import io
import sys

from runtime import progress
from runtime.progress import Progress


def shown(monkeypatch, seconds, terminal=False):
    monkeypatch.setattr(progress, "SECONDS", seconds)
    file = io.StringIO()
    file.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", file)
    with Progress(range(1000), "training", initial=0, unit="step") as bar:
        for _ in bar:
            bar.set_postfix(loss="0.5", refresh=False)
    return file.getvalue()


def test_a_log_file_gets_a_line_now_and_then(monkeypatch):
    text = shown(monkeypatch, seconds=30)
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) <= 3
    assert lines[-1].startswith("training: 1000 of 1000, ")
    assert "left, loss=0.5" in lines[-1]


def test_a_terminal_gets_a_bar(monkeypatch):
    assert "\r" in shown(monkeypatch, seconds=30, terminal=True)
