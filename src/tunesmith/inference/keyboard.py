"""Lines typed at a terminal: edited, recalled and completed with prompt_toolkit, else with readline, else as they come.

What is typed stays in memory: nothing of it is written anywhere.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from tunesmith.errors import DataError

Read = Callable[[str], str]  # prompt -> a line; raises EOFError at the end, KeyboardInterrupt on Ctrl-C
Words = Callable[[], Mapping[str, list[str]]]  # the commands, and what may follow each


def reader(stdin: TextIO, stderr: TextIO, interactive: bool, words: Words) -> Read:
    """What reads the next line from `stdin`. The prompt goes to `stderr`: stdout is for answers."""
    if not (interactive and stdin is sys.stdin and stdin.isatty()):
        return _plain(stdin)
    if importlib.util.find_spec("prompt_toolkit") is not None and os.environ.get("TERM", "dumb") != "dumb":
        return _edited(stderr, words)
    return _simple(stderr)


def _plain(stdin: TextIO) -> Read:
    def read(_: str) -> str:
        try:
            line = stdin.readline()
        except UnicodeDecodeError:
            raise DataError("stdin: is not UTF-8 text; convert it first") from None
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")

    return read


def _simple(stderr: TextIO) -> Read:
    """input(), with readline's editing where Python has it."""
    if importlib.util.find_spec("readline") is not None:
        import readline  # noqa: F401  -- importing it is what gives input() editing and history

    def read(prompt: str) -> str:
        if sys.stdout.isatty():
            return input(prompt)  # readline has to know the prompt's width
        stderr.write(prompt)
        stderr.flush()
        return input()

    return read


def _edited(stderr: TextIO, words: Words) -> Read:
    """prompt_toolkit: Alt-Enter begins a new line, and what is pasted stays one message however many lines it has."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    class Commands(Completer):
        """A command, or after one and a space what it takes."""

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            command, space, begun = document.text_before_cursor.partition(" ")
            choices, begun = (words().get(command, []), begun) if space else (list(words()), command)
            yield from (Completion(word, -len(begun)) for word in choices if begun and word.startswith(begun))

    session: PromptSession[str] = PromptSession(
        output=create_output(stdout=stderr), key_bindings=bindings, completer=Commands(), complete_while_typing=False
    )
    return session.prompt
