"""The models that a server answers as: the bare base, and adapters that come, are replaced and go while it answers.

    name -> Entry: the adapter's name in the seams, its version, its template

An adapter's public name never reaches the seams or a path: each loading gets a name of its own there, so that requests
which began with one version end with it. Adapters of plain LoRA share a bank; the others are attached one by one.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.adapters.bank import Bank, fits
from tunesmith.adapters.base import uninstall
from tunesmith.adapters.peft_format import adapter_folder, load_adapter, read_info
from tunesmith.data.encode import encode_prompt
from tunesmith.data.schemas import chat_row
from tunesmith.data.segments import Template
from tunesmith.errors import ConfigError, RequestError, did_you_mean
from tunesmith.hardware import leave_cores
from tunesmith.inference.history import Turns, fitting
from tunesmith.inference.prefill import check_prompt, context_limit
from tunesmith.inference.templates import base_template, saved_template
from tunesmith.model.llama import Llama

if TYPE_CHECKING:
    from tunesmith.model.sight import Look, Picture
    from tunesmith.tokenizer import Tokenizer

BASE = "base"  # what the bare base may always be called
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
BANK = "served"


@dataclass(eq=False)
class Entry:
    """One version of one model. `seams`: the adapters that act (none for the base); `users`: who holds on to it."""

    name: str
    seams: tuple[str, ...]
    version: int
    kind: str
    template: Template
    tokenizer: Tokenizer
    model: Llama
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0
    take_off: Callable[[], None] = lambda: None

    @property
    def key(self) -> tuple[str, tuple[str, ...], int]:
        """Under which prompts may share what they begin with; of one server, so of one base."""
        return self.name, self.seams, self.version

    @property
    def looks(self) -> tuple[Look, ...]:
        """What it looks at of an image; empty where it sees none."""
        return self.model.needs(self.seams).looks

    def chat(self, messages: Sequence[Mapping[str, Any]], picture: Picture | None = None) -> list[int]:
        """The tokens of a conversation that waits for its answer, by this model's own template.

        `picture`: what it is about, from `Registry.see`. Raises DataError, TemplateError, GenerationError.
        """
        row = chat_row(messages, "messages")
        row = row if picture is None else replace(row, image=picture)
        return self._checked(encode_prompt(row, self.template, self.tokenizer))

    def turn(self, asked: Turns, answer_tokens: int) -> tuple[list[int], list[str]]:
        """The tokens of a question with as much of its history as there is room for, and what was left out.

        Raises DataError, TemplateError, GenerationError.
        """
        limit = context_limit(self.model.config)
        ids, notices = fitting(asked, self.template, self.tokenizer, limit, answer_tokens)
        return self._checked(ids), notices

    def text(self, text: str) -> list[int]:
        """The tokens of a plain text, BOS included where the model expects it. Raises GenerationError."""
        begin = [self.tokenizer.bos_id] if self.tokenizer.add_bos and self.tokenizer.bos_id is not None else []
        return self._checked([*begin, *self.tokenizer.encode(text)])

    def ids(self, ids: Sequence[int]) -> list[int]:
        """Tokens as they are. Raises GenerationError."""
        return self._checked(list(ids))

    def _checked(self, ids: list[int]) -> list[int]:
        check_prompt(self.model.config, ids, "the prompt")
        return ids


class Registry:
    """Models by name. `folder`: where adapters may be loaded from while the server runs; None: nowhere.

    `add`, `remove` and `sweep` change the model, so they belong to the thread that runs it; the rest may be called from
    any.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, identity: Mapping[str, Any], name: str, folder: Path | None = None
    ) -> None:
        self.model, self.tokenizer, self.identity = model, tokenizer, identity
        self.name = check_name(name)
        self.folder = None if folder is None else Path(folder).resolve()
        self.bank = Bank(model, BANK)
        self._lock = threading.Lock()
        self._eyes = threading.Lock()  # one image at a time through an encoder
        self._given: dict[str, Path] = {}  # folders that whoever started the server named
        self._retired: list[Entry] = []
        self._loaded = 0
        base = Entry(self.name, (), 1, BASE, base_template(tokenizer), tokenizer, model)
        self._entries: dict[str, Entry] = {self.name: base}

    @property
    def entries(self) -> list[Entry]:
        """The base, then the adapters by name."""
        with self._lock:
            first, *rest = self._entries.values()
        return [first, *sorted(rest, key=lambda entry: entry.name)]

    @property
    def retired(self) -> int:
        """Replaced or removed versions that requests still use."""
        with self._lock:
            return len(self._retired)

    @property
    def fingerprint(self) -> str:
        """Tells one base from another."""
        return str(self.identity.get("sha256", ""))[:12]

    def see(self, entry: Entry, image: Path | str, where: str) -> Picture:
        """Open an image, a file or a data URL, and find in it what this model looks at.

        Raises RequestError for a model that looks at none, DataError for an image that cannot be read.
        """
        if not entry.looks:
            raise RequestError(f"{entry.name!r} looks at no images; leave the image out, or ask a model that sees")
        from tunesmith.vision.open import look_all, open_image

        with self._eyes:
            seen = open_image(image, where)
            look_all([seen], entry.looks, show=False)
            leave_cores()  # the engine's thread has its own
        return seen

    @contextmanager
    def using(self, name: str) -> Iterator[Entry]:
        """The model of this name as it is now; it stays until the end, whatever is loaded meanwhile.

        Raises RequestError (404) for a name that is not there.
        """
        with self._lock:
            entry = self._entries.get(self.name if name == BASE else name)
            known = list(self._entries)
            if entry is not None:
                entry.users += 1
        if entry is None:
            shown, more = name[:80], f" and {len(known) - 20} more" if len(known) > 20 else ""
            raise RequestError(
                f"there is no model {shown!r}{did_you_mean(shown, known)}; there are {', '.join(known[:20])}{more}",
                404,
                "model_not_found",
            )
        try:
            yield entry
        finally:
            with self._lock:
                entry.users -= 1

    def add(self, name: str, folder: Path | None = None) -> Entry:
        """Load an adapter, or its new version if the name is there; `folder` None: the one it is found in by its name.

        Requests that came before go on with the version that they began with. Raises AdapterError, TokenizerError,
        TemplateError, RequestError; nothing has changed then.
        """
        check_name(name)
        if name in (self.name, BASE):
            raise RequestError(f"{name!r} is the base; an adapter needs another name", 409, "name_taken")
        where = self._folder_of(name) if folder is None else folder
        info = read_info(where)
        template = saved_template(info, self.tokenizer, self.name) or base_template(self.tokenizer)
        self._loaded += 1
        seam = f"v{self._loaded}"
        adapter = load_adapter(where, self.model, seam, identity=self.identity, routed=True)
        take_off = partial(uninstall, self.model, adapter)
        for delta in adapter.deltas.values():
            delta.eval()
        if fits(adapter):
            self.bank.add(adapter)
            take_off = partial(self.bank.remove, seam)
        if folder is not None:
            self._given[name] = folder
        with self._lock:
            old = self._entries.get(name)
            version = 1 if old is None else old.version + 1
            entry = Entry(name, (seam,), version, info.kind, template, self.tokenizer, self.model, take_off=take_off)
            self._entries[name] = entry
            self._retired += [] if old is None else [old]
        return entry

    def remove(self, name: str) -> Entry:
        """Take an adapter off; requests that use it end as they began. Raises RequestError."""
        if name in (self.name, BASE):
            raise RequestError("the base cannot be removed; stop the server", 409, "name_taken")
        with self.using(name) as entry, self._lock:
            del self._entries[name]
            self._given.pop(name, None)
            self._retired.append(entry)
        return entry

    def sweep(self, busy: Collection[Entry]) -> list[Entry]:
        """Take off the versions that were replaced or removed and that nobody uses, and return them."""
        with self._lock:
            free = [entry for entry in self._retired if not entry.users and entry not in busy]
            self._retired = [entry for entry in self._retired if entry not in free]
        for entry in free:
            entry.take_off()
        return free

    def loadable(self) -> list[str]:
        """Names in the folder of adapters that hold one."""
        if self.folder is None or not self.folder.is_dir():
            return []
        names = sorted(path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name))
        return [name for name in names if _within(self.folder, name) is not None]

    def _folder_of(self, name: str) -> Path:
        """Where an adapter is loaded from by its name alone: never outside of what the server was given."""
        if name in self._given:
            return self._given[name]
        if self.folder is None:
            raise RequestError(
                "this server loads no adapters while it runs; start it with --adapters FOLDER", 403, "no_folder"
            )
        found = _within(self.folder, name)
        if found is None:
            raise RequestError(
                f"the folder of adapters holds no {name!r}{did_you_mean(name, self.loadable())}", 404, "model_not_found"
            )
        return found


def check_name(name: str) -> str:
    """Return a name that may be a model's. Raises RequestError."""
    if not NAME.fullmatch(name):
        raise RequestError(
            f"{name[:80]!r} cannot be a model's name: use up to 64 letters, digits, '.', '_' and '-', a letter or "
            "digit first"
        )
    return name


def model_name(name: str) -> str:
    """A base's public name, from the path or hub name that it was loaded by. Raises ConfigError where none is left."""
    last = Path(name).name.removesuffix(".gguf")
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")[:64]
    if not found:
        raise ConfigError(f"{name}: no name for the server can be made of this; give one with --name")
    return found


def _within(root: Path, name: str) -> Path | None:
    """The adapter folder `name` in `root` (or in the run of that name), if it truly lies there."""
    found = adapter_folder(root / name)
    return found if found is not None and found.resolve().is_relative_to(root) else None
