"""Chat on a real terminal (a pty): typing, several lines, Ctrl-C, Ctrl-D; with prompt_toolkit and without it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("slow_chat.py")
SOURCE = Path(__file__).parents[2] / "src"
CTRL_C, CTRL_D, ALT_ENTER = "\x03", "\x04", "\x1b\r"
MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|[\r\x08]")  # what a terminal does not show
PROMPT = r"(?m)^> ?"


class Tty:
    """A child process whose terminal is ours. `stdout` may go to a file instead."""

    def __init__(self, model: Path, term: str, stdout: Path | None = None) -> None:
        self.fd, child = os.openpty()
        env = {**os.environ, "TERM": term, "PYTHONPATH": str(SOURCE), "PROMPT_TOOLKIT_NO_CPR": "1"}
        out = child if stdout is None else os.open(stdout, os.O_WRONLY | os.O_CREAT)
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), str(model)],
            stdin=child, stdout=out, stderr=child, env=env, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(child)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, pattern: str, seconds: float = 90) -> str:
        """What is shown up to a match of `pattern`; what comes after it is kept for the next call."""
        end = time.monotonic() + seconds
        while True:
            plain = MOVES.sub("", self.seen)
            if match := re.search(pattern, plain):
                self.seen = plain[match.end() :]
                return plain[: match.end()]
            if time.monotonic() > end or self.process.poll() is not None and not self._ready(0):
                raise AssertionError(f"{pattern!r} never came; shown: {plain[-2000:]!r}")
            self._ready(0.2)

    def _ready(self, seconds: float) -> bool:
        if not select.select([self.fd], [], [], seconds)[0]:
            return False
        try:
            found = os.read(self.fd, 65536)
        except OSError:  # the other end is closed
            return False
        self.seen += found.decode("utf-8", "replace")
        return bool(found)

    def interrupt(self, pattern: str) -> None:
        """Ctrl-C until `pattern` is shown: one that comes between readline's prompt and its wait for a key is seen
        by Python with the next key only, and a person presses it again."""
        for _ in range(10):
            self.type(CTRL_C)
            try:
                self.until(pattern, seconds=9)
                return
            except AssertionError as e:
                last = e
        raise last

    def end(self) -> int:
        """Ctrl-D at the prompt, and the exit code."""
        self.until(PROMPT)
        self.type(CTRL_D)
        while self._ready(5) and self.process.poll() is None:
            continue
        return self.process.wait(30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture(params=["xterm", "dumb"], ids=["prompt_toolkit", "readline"])
def term(request: pytest.FixtureRequest) -> str:
    if request.param == "xterm":
        pytest.importorskip("prompt_toolkit", reason="NOT TESTED: editing lines; install prompt_toolkit (extra chat)")
    return request.param


@pytest.fixture
def tty(tiny_base: Path, term: str) -> Iterator[Tty]:
    made = Tty(tiny_base, term)
    made.until("Ctrl-D leaves\n")
    yield made
    made.close()


def test_a_talk(tty: Tty, tmp_path: Path) -> None:
    """Ctrl-C stops the answer and then, at the prompt, nothing; the talk goes on, is shown, saved and left."""
    tty.until(PROMPT)
    tty.type("hello\r")
    tty.until("hello\n(.|\n)*?\\S{3}")
    tty.type(CTRL_C)
    tty.until(r"\[stopped\]\n")
    tty.until(PROMPT)
    tty.interrupt("Ctrl-D or /exit leaves\n")
    tty.type('"""one\r')
    tty.until(r"(?m)^\. ?")
    tty.type('two"""\r')
    tty.until(r"\[cut off after 150 tokens")
    tty.type("/history\r")
    shown = tty.until("user: one\ntwo\nassistant: ")
    assert "user: hello\nassistant: " in shown
    tty.type("/nothing\r")
    tty.until("/nothing: no such command")
    tty.type(f"/save {tmp_path / 'talk.jsonl'}\r")
    tty.until("saved ")
    tty.type("/undo\r")
    tty.until("taken back: one\ntwo")
    assert tty.end() == 0
    saved = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))["messages"]
    assert [(m["role"], m["content"][:5]) for m in saved[::2]] == [("user", "hello"), ("user", "one\nt")]
    assert len(saved) == 4 and len(saved[1]["content"]) < len(saved[3]["content"])  # the first answer was stopped


def test_stdout_holds_the_answers_alone(tiny_base: Path, tmp_path: Path) -> None:
    """tunesmith chat MODEL > answers.txt: prompts and notes stay on the terminal."""
    tty = Tty(tiny_base, "dumb", tmp_path / "answers.txt")
    try:
        tty.until(PROMPT)
        tty.type("/settings max_new_tokens=3\r")
        tty.until("max_new_tokens=3 ")
        tty.type("hello\r")
        tty.until("cut off after 3 tokens")
        assert tty.end() == 0
    finally:
        tty.close()
    text = (tmp_path / "answers.txt").read_text(encoding="utf-8")
    assert text.endswith("\n") and "> " not in text and "/help" not in text and "settings" not in text


def test_lines_that_are_pasted_or_typed_with_alt_enter_are_one_message(tiny_base: Path) -> None:
    pytest.importorskip("prompt_toolkit", reason="NOT TESTED: editing lines; install prompt_toolkit (extra chat)")
    tty = Tty(tiny_base, "xterm")
    try:
        tty.until(PROMPT)
        tty.type("/settings max_new_tokens=30\r")
        tty.until("max_new_tokens=30 ")
        tty.until(PROMPT)
        tty.type(f"a{ALT_ENTER}b\r")
        tty.until("cut off after 30")
        tty.until(PROMPT)
        tty.type("\x1b[200~c\nd\x1b[201~\r")
        tty.until("cut off after 30")
        tty.until(PROMPT)
        tty.type("/history\r")
        tty.until("user: a\nb\nassistant: ")
        tty.until("user: c\nd\nassistant: ")
        tty.until(PROMPT)
        tty.type("/exi\t")
        tty.until("t ?$")  # completed
        tty.type("\r")
        assert tty.process.wait(30) == 0
    finally:
        tty.close()
