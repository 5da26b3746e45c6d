"""A command line whose rooms below are stand-ins that note how they were called."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

import tunesmith
from tunesmith.cli import main


class FakeApi(SimpleNamespace):
    """Stands in for tunesmith.api and workflow: `calls` holds (name, args, kwargs), `answers` what to do."""

    def __init__(self) -> None:
        super().__init__(calls=[], answers={})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            answer = self.answers.get(name)
            if isinstance(answer, BaseException):
                raise answer
            return answer(*args, **kwargs) if callable(answer) else answer

        return call


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "tunesmith.api", fake)
    monkeypatch.setattr(tunesmith, "api", fake, raising=False)
    monkeypatch.setitem(sys.modules, "tunesmith.workflow", fake)
    monkeypatch.setitem(sys.modules, "tunesmith.demo", fake)
    return fake


@pytest.fixture
def tunesmith_command(capsys: pytest.CaptureFixture[str]):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        code = main(args)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run
