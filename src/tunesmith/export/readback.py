"""Read back what was exported with the other project's own reader, and hold it against what our model computes.

A reader runs in a process of its own (`readers.py`). One whose library is not installed is named: nothing is claimed
that was not read.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.data.encode import encode_prompt
from tunesmith.data.schemas import chat_row
from tunesmith.data.segments import Template
from tunesmith.errors import VerificationError
from tunesmith.export.child import Child
from tunesmith.export.gguf_tokenizer import TEXTS
from tunesmith.export.probe import Probe, logits_at
from tunesmith.export.readers import LIBRARIES
from tunesmith.files import atomic_write_json
from tunesmith.model.llama import Llama
from tunesmith.tokenizer import Tokenizer

LOGITS = 1e-5  # of the largest logit, in float32
# By GGUF type: how far its likeliest token may stand below ours, in log-probability. llama.cpp rounds activations too.
# Rows in a wrong order or a wrong scale are off by several units.
MARGIN = {"F32": 0.01, "F16": 0.1, "BF16": 0.5}
QUANTIZED_MARGIN = 1.5
NEW, ROWS, PROMPT = 16, 4, 64  # tokens that llama.cpp answers, rows, tokens of a prompt
CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


@dataclass(frozen=True)
class Asked:
    """What a reader is asked: the file or folder, the base beside it, rows of ids with their places, texts, a chat."""

    reader: str
    path: Path
    rows: Sequence[Sequence[int]]
    places: Sequence[Sequence[int]] = ()
    base: Path | None = None
    texts: Sequence[str] = ()
    chat: Sequence[dict[str, str]] = ()
    new: int = NEW


@dataclass(frozen=True)
class Read:
    """What a reader said; `logits` (places, vocabulary) of those that give them."""

    answer: dict[str, Any]
    logits: Tensor | None = None


@dataclass
class Checks:
    """What was read back and found equal, and what was not: one line each."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def hold(self, ok: bool, passed: str, failed: str) -> None:
        """Note one comparison."""
        (self.passed if ok else self.failed).append(passed if ok else failed)

    def raise_if_failed(self, where: Path) -> None:
        """Raise VerificationError with what another reader read otherwise."""
        if self.failed:
            raise VerificationError(
                f"{where}: not kept, since it reads otherwise elsewhere: {'; '.join(self.failed)} (or --no-read-back)"
            )


def installed(reader: str, checks: Checks) -> bool:
    """Is the reader's library there? Otherwise it is noted what was not tried."""
    there = importlib.util.find_spec(LIBRARIES[reader]) is not None
    if not there:
        checks.skipped.append(f"not read back with {reader}: {LIBRARIES[reader]} is not installed")
    return there


def read(asked: Asked) -> Read:
    """Let the reader answer in a process of its own. Raises VerificationError with its last line where it fails."""
    context = 64 + max((len(row) for row in asked.rows), default=0) + asked.new
    with tempfile.TemporaryDirectory(prefix="tunesmith-readback-") as name:
        folder = Path(name)
        request = {
            "reader": asked.reader, "path": str(asked.path), "base": None if asked.base is None else str(asked.base),
            "rows": [list(row) for row in asked.rows], "places": [list(places) for places in asked.places],
            "texts": list(asked.texts), "chat": list(asked.chat), "new": asked.new, "context": max(512, context),
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        atomic_write_json(folder / "request.json", request)
        with Child("tunesmith.export.readers", _ENVIRONMENT) as child:
            _, last = child.ask(name)
        if not (folder / "answer.json").is_file():
            raise VerificationError(f"{asked.path}: {asked.reader} does not read it ({last[:300]})")
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        if not (folder / "answer.safetensors").is_file():
            return Read(answer)
        from safetensors.torch import load

        return Read(answer, load((folder / "answer.safetensors").read_bytes())["logits"])


# Nothing is fetched or reported by a reader.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}


def with_places(reader: str, path: Path, probe: Probe, **more: Any) -> Asked:
    """Ask for logits at the probe's places, in the order of the rows."""
    rows = [row.tolist() for row in torch.split(probe.tokens, list(probe.lengths))]
    places, start = [], 0
    for length in probe.lengths:
        inside = probe.positions[(probe.positions >= start) & (probe.positions < start + length)]
        places.append((inside - start).tolist())
        start += length
    return Asked(reader, path, rows, places, **more)


def compare_logits(checks: Checks, reader: str, got: Read, ours: Tensor) -> None:
    """Largest difference as a share of the largest logit."""
    if got.logits is None or got.logits.shape != ours.shape:
        checks.failed.append(f"{reader} gives logits of another shape")
        return
    off = float((got.logits - ours).abs().max()) / float(ours.abs().max())
    said = f"{reader} {got.answer['version']}: logits at {len(ours)} places within {off:.1e} of the largest"
    checks.hold(off <= LOGITS, said, f"{said}, where {LOGITS:.0e} is allowed")


def compare_ids(checks: Checks, reader: str, got: Read, tokenizer: Tokenizer, template: Template | None) -> None:
    """Token ids of TEXTS, and those of a chat's prompt."""
    for special in (False, True):
        theirs = got.answer.get(f"ids_{special}")
        if theirs is None:
            continue
        pairs = zip(TEXTS, theirs, strict=True)
        differ = [text for text, ids in pairs if ids != tokenizer.encode(text, special=special)]
        what = "texts with special tokens" if special else "texts"
        shown = differ[0][:40] if differ else ""
        checks.hold(
            not differ, f"{reader}: the ids of {len(theirs)} {what} equal",
            f"{reader} gives other ids for {len(differ)} of {len(theirs)} {what} (the first: {shown!r})",
        )  # fmt: skip
    if template is not None and "chat_ids" in got.answer:
        ids = encode_prompt(chat_row(CHAT, "chat"), template, tokenizer)
        same = got.answer["chat_ids"] == ids
        checks.hold(same, f"{reader}: a chat's prompt has the same ids", f"{reader} prompts a chat with other ids")


def compare_answers(
    checks: Checks, got: list[dict[str, Any]], prompts: Sequence[Sequence[int]], model: Llama,
    adapters: tuple[str, ...], *, kind: str, what: str,
) -> None:  # fmt: skip
    """llama.cpp's greedy answers, teacher-forced through our model: the same token wherever the choice is clear."""
    margin = MARGIN.get(kind, QUANTIZED_MARGIN)
    if not any(row["ids"] for row in got):
        checks.skipped.append(f"{what}: every answer is empty, so none was compared")
        return
    ours = forced(model, prompts, [row["ids"] for row in got], adapters).log_softmax(-1)
    tokens = torch.tensor([token for row in got for token in row["ids"]])
    behind = ours.max(-1).values - ours.gather(1, tokens[:, None])[:, 0]
    apart = [abs(float(ours[i, t]) - p) for i, step in _steps(got) for t, p in step[:2]]
    agree = float((behind == 0).double().mean())
    near = f"; log-probabilities of the two likeliest within {max(apart):.4f}" if apart else ""
    others = "" if agree == 1 else f", the others within {float(behind.max()):.3f}"
    said = f"{what}: {agree:.1%} of {len(tokens)} greedy tokens equal{others}{near}"
    checks.hold(float(behind.max()) <= margin, said, f"{said}, where {margin} is allowed ({kind})")


def forced(
    model: Llama, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], adapters: tuple[str, ...]
) -> Tensor:
    """Our logits (answers' tokens, vocabulary) at the places where these answers' tokens were chosen."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    places: list[int] = []
    start = 0
    for prompt, row in zip(prompts, rows, strict=True):
        places += range(start + len(prompt) - 1, start + len(row) - 1)
        start += len(row)
    tokens = torch.tensor([token for row in rows for token in row])
    return logits_at(model, Probe(tokens, tuple(map(len, rows)), torch.tensor(places)), adapters).double()


def _steps(rows: list[dict[str, Any]]) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """(place among all answers' tokens, the likeliest tokens with their log-probabilities there)."""
    start = 0
    for row in rows:
        yield from enumerate(row["top"], start)
        start += len(row["ids"])
