"""The terminal around a ChatSession: lines in, answers out as they come, commands that begin with a slash."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from tunesmith.errors import GenerationError, TunesmithError, did_you_mean
from tunesmith.files import atomic_write_text
from tunesmith.inference.keyboard import Read, reader
from tunesmith.inference.sample import GenerationSettings
from tunesmith.inference.session import ChatSession, transcript
from tunesmith.model.llama import Llama

if TYPE_CHECKING:
    from tunesmith.data.segments import Template
    from tunesmith.model.sight import Picture
    from tunesmith.tokenizer import Tokenizer

TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
QUOTES = '"""'


def run_chat(
    model: Llama,
    tokenizer: Tokenizer,
    template: Template,
    *,
    templates: Mapping[str, Template] | None = None,
    adapter: str | None = None,
    settings: GenerationSettings | None = None,
    system: str | None = None,
    picture: Picture | None = None,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
    interactive: bool | None = None,
) -> None:
    """Talk until Ctrl-D, the end of the input, or /exit. Answers go to stdout, everything else to stderr.

    `adapter` acts at first (None: the bare base); `template` is the base's, `templates` those of its adapters; the talk
    is about `picture`. `interactive` (default: is stdin a terminal?) prints a prompt and lets the line be edited.
    Ctrl-C stops the answer, not the program. An error is said in one line and the talk goes on; from piped input it
    ends the program.
    """
    adapters = () if adapter is None else (adapter,)
    session = ChatSession(model, tokenizer, template, settings, system=system, adapters=adapters, templates=templates)
    if picture is not None:
        session.show(picture)
    streams = stdin or sys.stdin, stdout or sys.stdout, stderr or sys.stderr
    if interactive is None:
        interactive = streams[0].isatty()
    Terminal(session, *streams, interactive).run()


@dataclass
class Terminal:
    """One talk on three streams."""

    session: ChatSession
    stdin: TextIO
    stdout: TextIO
    stderr: TextIO
    interactive: bool
    leaving: bool = field(default=False, init=False)
    stopping: bool = field(default=False, init=False)
    ask: Read = field(init=False)

    def __post_init__(self) -> None:
        self.ask = reader(self.stdin, self.stderr, self.interactive, self.words)

    def run(self) -> None:
        """See run_chat."""
        if self.interactive:
            self.note("/help lists the commands; Ctrl-D leaves")
        while not self.leaving:
            try:
                text = self.read()
                if text is None:
                    break
                if text.strip():
                    self.handle(text)
            except KeyboardInterrupt:  # while a line is typed, or by a second Ctrl-C before the answer's first word
                self.note("")
                self.note("Ctrl-D or /exit leaves")
        if self.interactive:
            self.note("")

    def words(self) -> dict[str, list[str]]:
        """The commands, and the adapters' names after /adapter: what a line may be completed to."""
        return {name: [*self.session.names, "off"] if name == "/adapter" else [] for name in COMMANDS}

    def handle(self, text: str) -> None:
        """Carry out a command, or answer."""
        try:
            if text.startswith("/") and not text.startswith("//"):
                self.command(text)
            else:
                self.answer(text[1:] if text.startswith("//") else text)
        except TunesmithError as error:
            if not self.interactive:
                raise
            self.note(str(error))

    def answer(self, text: str) -> None:
        """Print the answer as it comes."""
        pieces = self.session.say(text)
        try:
            with self.stoppable():
                for piece in pieces:
                    self.stdout.write(visible(piece) if self.stdout.isatty() else piece)
                    self.stdout.flush()
                    if self.stopping:
                        pieces.close()  # between two tokens: what was said of the answer joins the history
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            self.note(" [stopped]")
        finally:
            self.stdout.write("\n")
            self.stdout.flush()
        last = self.session.last
        if last is not None and last.finish_reason == "length":
            self.note(f"[cut off after {len(last.ids)} tokens; /settings max_new_tokens=N allows more]")
        while self.session.notices:
            self.note(self.session.notices.pop(0))

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Let the first Ctrl-C be looked at between two tokens, and only a second one break in where it strikes."""
        self.stopping = False
        if not self.interactive or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def command(self, text: str) -> None:
        """Carry out a line that begins with a slash. Raises GenerationError for an unknown one."""
        name, _, rest = text.partition(" ")
        if name not in COMMANDS:
            raise GenerationError(
                f"{name}: no such command{did_you_mean(name, COMMANDS)} (/help lists them; begin with // to say it)"
            )
        COMMANDS[name].act(self, rest.strip())

    def read(self) -> str | None:
        """The next message, which may be of several lines; None at the end of the input."""
        lines = self.lines()
        first = next(lines, None)
        if first is None:
            return None
        if first.lstrip().startswith(QUOTES):
            return _quoted(first.lstrip()[len(QUOTES) :], lines)
        said = [first]
        while said[-1].endswith("\\"):
            said[-1] = said[-1][:-1]
            said.append(next(lines, ""))
        return "\n".join(said)

    def lines(self) -> Iterator[str]:
        """Lines of the input, the first with a prompt before it."""
        prompt = "> "
        while True:
            try:
                yield self.ask(prompt)
            except EOFError:
                return
            prompt = ". "

    def note(self, line: str) -> None:
        """Say something that is not the model's."""
        self.stderr.write((visible(line) if self.stderr.isatty() else line) + "\n")
        self.stderr.flush()


def visible(text: str) -> str:
    """Text without the control characters that could command a terminal."""
    return "".join("\ufffd" if _controls(c) and c not in "\n\t" else c for c in text)


def _controls(character: str) -> bool:
    """C0 and C1 controls, and those that turn the direction of text."""
    return character < " " or "\x7f" <= character <= "\x9f" or character in TURNS


def _quoted(first: str, lines: Iterator[str]) -> str:
    """The text up to the closing quotes (or the end of the input)."""
    said = []
    line: str | None = first
    while line is not None:
        before, closed, _ = line.partition(QUOTES)
        said.append(before)
        if closed:
            break
        line = next(lines, None)
    return "\n".join(said).strip("\n")


@dataclass(frozen=True)
class Command:
    """A slash command: how it is written, what it does, and the function."""

    usage: str
    help: str
    act: Callable[[Terminal, str], None]


def _adapter(terminal: Terminal, name: str) -> None:
    session = terminal.session
    if name:
        session.use(None if name in ("off", "base") else name)
    acting = session.names if session.adapters is None else session.adapters
    others = [n for n in session.names if n not in acting]
    rest = f"; also attached: {', '.join(others)}" if others else ""
    terminal.note(f"adapter: {', '.join(acting) or 'off (the bare base)'}{rest}")


def _system(terminal: Terminal, text: str) -> None:
    terminal.session.system = text or None
    terminal.note(f"system: {text}" if text else "system: none")


def _reset(terminal: Terminal, _: str) -> None:
    terminal.session.reset()
    terminal.note("the conversation is forgotten")


def _settings(terminal: Terminal, text: str) -> None:
    session = terminal.session
    if text:
        session.settings = session.settings.changed(**dict(map(_setting, text.split())))
    terminal.note(" ".join(f"{name}={json.dumps(value)}" for name, value in asdict(session.settings).items()))


def _setting(word: str) -> tuple[str, Any]:
    """A word name=value: none, a number, or a text (for stop, whose escapes such as \\n are read)."""
    name, equals, value = word.partition("=")
    if not equals:
        raise GenerationError(f"/settings {word}: write name=value, for example temperature=0.7")
    if name == "stop":
        return name, (value.replace("\\n", "\n"),) if value and value.lower() != "none" else ()
    if value.lower() == "none":
        defaults = {f.name: f.default for f in fields(GenerationSettings)}
        return name, defaults.get(name)
    for number in (int, float):
        try:
            return name, number(value)
        except ValueError:
            continue
    raise GenerationError(f"/settings {word}: {value!r} is not a number, nor none")


def _image(terminal: Terminal, name: str) -> None:
    if name:
        from tunesmith.vision.open import open_image

        off = name == "off"
        terminal.session.show(None if off else open_image(Path(name).expanduser(), "/image"))
    seen = terminal.session.picture
    terminal.note("image: none" if seen is None else f"image: {getattr(seen, 'image', 'given')}")


def _history(terminal: Terminal, _: str) -> None:
    session = terminal.session
    said = [{"role": "system", "content": session.system}] if session.system else []
    for message in [*said, *session.messages]:
        terminal.note(f"{message['role']}: {message['content']}")
    if not session.messages:
        terminal.note("nothing was said yet")


def _undo(terminal: Terminal, _: str) -> None:
    taken = terminal.session.undo()
    if taken is None:
        raise GenerationError("/undo: nothing was said yet")
    terminal.note(f"taken back: {taken}")


def _save(terminal: Terminal, name: str) -> None:
    if not name:
        raise GenerationError("/save: name a file, for example /save talk.jsonl")
    path = Path(name).expanduser()
    if path.exists():
        raise GenerationError(f"/save: {path} is there already; choose another name")
    atomic_write_text(path, json.dumps(transcript(terminal.session), ensure_ascii=False) + "\n")
    terminal.note(f"saved {path} (a row of the messages schema: it can be trained on)")


def _help(terminal: Terminal, _: str) -> None:
    for command in COMMANDS.values():
        terminal.note(f"{command.usage:<24} {command.help}")
    terminal.note(f"a line that ends with \\ goes on; {QUOTES} opens and closes a text of several lines")
    terminal.note("with prompt_toolkit: Alt-Enter begins a new line, and what is pasted is one message")
    terminal.note("Ctrl-C stops the answer; Ctrl-D leaves")


def _exit(terminal: Terminal, _: str) -> None:
    terminal.leaving = True


COMMANDS: dict[str, Command] = {
    "/adapter": Command("/adapter [NAME|off]", "show the adapters, or let one act; off: the bare base", _adapter),
    "/system": Command("/system [TEXT]", "set the system message; without a text there is none", _system),
    "/history": Command("/history", "show the conversation", _history),
    "/undo": Command("/undo", "take back the last question and its answer", _undo),
    "/reset": Command("/reset", "forget the conversation", _reset),
    "/settings": Command("/settings [name=value]", "show or change how answers are generated", _settings),
    "/image": Command("/image [FILE|off]", "talk about an image, if the adapter looks at images", _image),
    "/save": Command("/save FILE", "write the conversation as JSON", _save),
    "/help": Command("/help", "this list", _help),
    "/exit": Command("/exit", "leave", _exit),
}
