"""What is to leave: a model with what belongs to it, and how it computed before anything was done to it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.adapters import Adapter
from tunesmith.adapters.peft_format import AdapterInfo
from tunesmith.data.segments import Template
from tunesmith.errors import ConfigError
from tunesmith.export.probe import PROBE, Probe, built_in_rows, logits_at, make_probe, read_probe
from tunesmith.files import is_complete
from tunesmith.model.llama import Llama
from tunesmith.model.quantize import block_linears
from tunesmith.tokenizer import Tokenizer


@dataclass
class Subject:
    """A model as it is used: `name` and `path` of its base, and its adapter with its folder and template, if any."""

    model: Llama
    tokenizer: Tokenizer
    name: str
    path: Path
    identity: dict[str, Any]
    adapter: Adapter | None = None
    info: AdapterInfo | None = None
    template: Template | None = None

    @property
    def quantized(self) -> str | None:
        """How the linears of the blocks are held; None where they are dense."""
        return next((linear.quant.kind for _, linear in block_linears(self.model) if linear.quant is not None), None)


@dataclass(frozen=True)
class Reference:
    """What the unmerged model computes on the probe: log-probabilities with the adapter and without it.

    `base` is None where there is no adapter, or where it trained the base itself.
    """

    probe: Probe
    trained: Tensor
    base: Tensor | None


def reference_of(model: Llama, adapter: Adapter | None, rows: Sequence[Sequence[int]]) -> Reference:
    """Compute it on `rows` of token ids."""
    probe = make_probe(rows)
    names = () if adapter is None else (adapter.name,)
    trained = log_probabilities(model, probe, names)
    base = log_probabilities(model, probe, ()) if adapter is not None and adapter.deltas else None
    return Reference(probe, trained, base)


def log_probabilities(model: Llama, probe: Probe, adapters: tuple[str, ...] | None = None) -> Tensor:
    """(places, vocabulary), float64."""
    return logits_at(model, probe, adapters).double().log_softmax(-1)


def probe_rows(subject: Subject) -> list[list[int]]:
    """Rows to compare on: those that the run recorded, of its own data, else the tokenizer's golden texts."""
    folder = subject.info.folder.parent if subject.info is not None else None
    if folder is not None and (folder / PROBE).is_file() and (folder / "config.yaml").is_file():
        probe = read_probe(folder / PROBE)
        rows = [row.tolist() for row in torch.split(probe.tokens, list(probe.lengths))]
        if max(max(row) for row in rows) < subject.model.config.vocab_size:
            return rows
    return built_in_rows(subject.tokenizer, subject.model.config)


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean over the places of KL(p || q), of log-probabilities."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def agreement(p: Tensor, q: Tensor) -> float:
    """Share of the places with the same likeliest token."""
    return float((p.argmax(-1) == q.argmax(-1)).double().mean())


def with_chat_template(tokenizer: Tokenizer, text: str | None) -> Tokenizer:
    """The same tokenizer with this chat template."""
    changed = copy.copy(tokenizer)
    changed.chat_template = text
    return changed


def check_out(out: Path, force: bool, *, file: bool = False) -> None:
    """Raise ConfigError where `out` would be overwritten unasked, or is a folder where a file belongs (or the reverse).

    `force` replaces a file, an empty folder, or a folder that was written as a whole before (with its marker).
    """
    if file:
        if out.is_dir():
            raise ConfigError(f"--out: {out} is a folder; this format is one file: {out / 'model.gguf'}, for example")
        if out.exists() and not force:
            raise ConfigError(f"--out: {out} is there already; choose another name, or --force to replace it")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise ConfigError(f"--out: {out} is there already; choose another folder, or --force to replace it")
    if out.is_file():
        raise ConfigError(f"--out: {out} is a file, and this format is a folder; choose another name")
    if out.is_dir() and any(out.iterdir()) and not is_complete(out):
        raise ConfigError(
            f"--out: {out} holds something that was not written by tunesmith, and --force would remove it; choose "
            "another folder"
        )
