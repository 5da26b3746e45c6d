"""`tunesmith export`: a model, or an adapter with its base, in the format of another tool, read back before it is kept.

hf   peft   gguf   gguf-lora   ollama   vllm
write -> read with our loader, hold against base + adapter -> read with the other project's own reader -> keep or not
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tunesmith.data.segments import Template
from tunesmith.data.templates import get_template
from tunesmith.errors import ConfigError, VerificationError, did_you_mean
from tunesmith.export import gguf, ollama, readback
from tunesmith.export.fold import merged_weights
from tunesmith.export.gguf_lora import write_lora
from tunesmith.export.gguf_tokenizer import TEXTS, tokenizer_fields
from tunesmith.export.hf import SHARD
from tunesmith.export.merge import check_attention, compared, merge_adapter, refuse_lossy
from tunesmith.export.onto import prepared
from tunesmith.export.peft import base_folder, write_peft
from tunesmith.export.probe import logits_at, make_probe
from tunesmith.export.readback import CHAT, Asked, Checks
from tunesmith.export.subject import Reference, Subject, check_out, probe_rows, reference_of, with_chat_template
from tunesmith.export.turns import chat_template
from tunesmith.export.vllm import export_vllm
from tunesmith.files import atomic_file, atomic_folder, atomic_write_text
from tunesmith.model.llama import Llama
from tunesmith.model.load import load_model

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MOST_BYTES = 8 << 30  # of a base that is written only to read an adapter back on it


@dataclass(frozen=True)
class Options:
    """How to export: number type, the 16-bit base of a quantized one, overwriting, a name, reading back, file size."""

    type: str | None = None
    onto: str | None = None
    force: bool = False
    name: str | None = None
    read_back: bool = True
    shard: int = SHARD


def export_subject(subject: Subject, to: str, out: Path, options: Options) -> dict[str, Any]:
    """Write `subject` to `out` as `to` says; returns what was written, checked and noted.

    Raises ConfigError, CannotMerge, CannotExchange, TokenizerError, ModelError; VerificationError where what was
    written is not what was trained, or another project's reader reads it otherwise: nothing is kept then.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to: {to!r} is not known{did_you_mean(to, FORMATS)}; there are {', '.join(FORMATS)}")
    sources = {subject.path.resolve(), *([subject.info.folder.resolve()] if subject.info is not None else [])}
    if out.resolve() in sources:
        raise ConfigError(f"--out: {out} is what is to be exported; choose another place")
    return {"to": to, "out": str(out), **FORMATS[to](subject, out, options)}


def _hf(subject: Subject, out: Path, options: Options) -> dict[str, Any]:
    text, notes = _template(subject)
    kind = None if options.type is None else options.type.upper()
    dtype = "auto" if kind is None else DTYPES.get(kind, options.type or "auto")
    checks = Checks()
    dense, how = prepared(subject, options.onto)

    def check(folder: Path, written: Llama, reference: Reference) -> None:
        if not options.read_back or not readback.installed("transformers", checks):
            return
        told = {"texts": TEXTS, "chat": CHAT if text else ()}
        got = readback.read(readback.with_places("transformers", folder, reference.probe, **told))
        readback.compare_logits(checks, "transformers", got, logits_at(written, reference.probe, ()))
        readback.compare_ids(checks, "transformers", got, subject.tokenizer, _prompting(subject, text))
        checks.raise_if_failed(out)

    how = replace(how, dtype=dtype, force=options.force, shard=options.shard, check=check)
    tokenizer = with_chat_template(dense.tokenizer, text)
    report = merge_adapter(dense.model, dense.adapter, tokenizer, out, how)
    return _report(report, checks, notes, options)


def _peft(subject: Subject, out: Path, options: Options) -> dict[str, Any]:
    _no_type(options, "peft")
    check_out(out, options.force)
    text, notes = _template(subject)
    checks = Checks()
    with atomic_folder(out) as folder:
        write_peft(folder, subject, text)
        if _worth_reading(subject, "peft", options, checks) and subject.adapter is not None:
            probe = make_probe(probe_rows(subject))
            with base_folder(subject) as base:
                got = readback.read(readback.with_places("peft", folder, probe, base=base))
            readback.compare_logits(checks, "peft", got, logits_at(subject.model, probe, (subject.adapter.name,)))
            checks.raise_if_failed(out)
    return _report({}, checks, notes, options)


def _gguf(subject: Subject, out: Path, options: Options) -> dict[str, Any]:
    check_out(out, options.force, file=True)
    with atomic_file(out) as temporary:
        return _write_gguf(subject, temporary, out, options)


def _gguf_lora(subject: Subject, out: Path, options: Options) -> dict[str, Any]:
    check_out(out, options.force, file=True)
    if subject.adapter is None:
        raise ConfigError(f"--to gguf-lora: {subject.name} has no adapter; give a run folder or an adapter folder")
    kind, checks = gguf.check_type(options.type, "F32"), Checks()
    with atomic_file(out) as temporary:
        pairs = write_lora(temporary, subject.adapter, subject.model.config, kind, options.name or out.stem)
        if _worth_reading(subject, "llama.cpp", options, checks):
            with TemporaryDirectory(prefix="tunesmith-base-") as name:
                base = _gguf_base(subject, Path(name))
                _read_lora(subject, temporary, base, kind, checks)
        checks.raise_if_failed(out)
    return _report({"type": kind, "pairs": pairs}, checks, [], options)


def _ollama(subject: Subject, out: Path, options: Options) -> dict[str, Any]:
    check_out(out, options.force)
    with atomic_folder(out) as folder:
        report = _write_gguf(subject, folder / "model.gguf", out, options)
        text, notes = ollama.modelfile(_own_template(subject), subject.tokenizer, prepared_sampling(subject))
        if found := ollama.faults(text, folder):
            raise VerificationError(f"{out}: against Ollama's rules: {'; '.join(found)}")
        atomic_write_text(folder / "Modelfile", text)
    return {**report, "notes": [*report["notes"], *notes], "run_by_ollama": False}


def _vllm(subject: Subject, out: Path, options: Options) -> dict[str, Any]:
    _no_type(options, "vllm")
    folder = None if subject.info is None else subject.info.folder
    own = folder.parent.name if folder is not None and folder.name == "adapter" else folder.name if folder else ""
    return export_vllm(subject, out, options.name or own, options.force)


FORMATS: dict[str, Callable[[Subject, Path, Options], dict[str, Any]]] = {
    "hf": _hf,
    "peft": _peft,
    "gguf": _gguf,
    "gguf-lora": _gguf_lora,
    "ollama": _ollama,
    "vllm": _vllm,
}


def prepared_sampling(subject: Subject) -> dict[str, Any]:
    """How the base's authors would sample."""
    from tunesmith.export.hf import sampling_of

    return sampling_of(subject.path)


def _write_gguf(subject: Subject, path: Path, out: Path, options: Options) -> dict[str, Any]:
    """Write the merged model as one GGUF file, and read it back."""
    kind, checks = gguf.check_type(options.type), Checks()
    check_attention(subject.model, options.force)
    text, notes = _template(subject)
    dense, how = prepared(subject, options.onto)
    reference = reference_of(dense.model, dense.adapter, how.rows or [])
    tensors, layers, config = merged_weights(
        dense.model,
        dense.adapter,
        torch.float32,
        rounding=lambda name, weight: gguf.rounded(name, weight, kind),
        dequantize=how.dequantize,
        originals=how.originals,
    )
    vocabulary, more = tokenizer_fields(subject.tokenizer, config.vocab_size, text)
    model = gguf.GgufModel(config, tensors, vocabulary, options.name or out.stem)
    odd = gguf.write_gguf(path, model, kind)
    checks.passed.append(gguf.read_back(path, model, kind))
    written = load_model(path, device=dense.model.device)
    report = compared(written, reference, layers, kind, how)
    refuse_lossy(report, out, options.force)
    if options.read_back and readback.installed("llama.cpp", checks):
        _read_gguf(subject, path, written, kind, text, checks)
        checks.raise_if_failed(out)
    if odd:
        notes.append(f"{len(odd)} tensors whose rows are no whole blocks of 32 are F16 ({odd[0]})")
    return _report({**report.summary(), "file_bytes": path.stat().st_size}, checks, [*notes, *more], options)


def _read_gguf(subject: Subject, path: Path, written: Llama, kind: str, text: str | None, checks: Checks) -> None:
    prompts = _prompts(subject)
    got = readback.read(Asked("llama.cpp", path, prompts, texts=TEXTS, chat=CHAT if text else ()))
    checks.passed.append(f"llama.cpp (xllamacpp {got.answer['version']}) loads it")
    readback.compare_ids(checks, "llama.cpp", got, subject.tokenizer, _prompting(subject, text))
    readback.compare_answers(checks, got.answer["rows"], prompts, written, (), kind=kind, what="llama.cpp")


def _read_lora(subject: Subject, path: Path, base: Path, kind: str, checks: Checks) -> None:
    """llama.cpp with the adapter answers as base + adapter, and without it as the base."""
    prompts = _prompts(subject)
    got = readback.read(Asked("llama.cpp", path, prompts, base=base))
    name = "" if subject.adapter is None else subject.adapter.name
    stored = "of any type" if base == subject.path else kind  # the user's own base may be quantized
    for adapters, key, how in (((), "without", "without"), ((name,), "rows", "with")):
        what = f"llama.cpp {how} the adapter"
        readback.compare_answers(checks, got.answer[key], prompts, subject.model, adapters, kind=stored, what=what)
    pairs = zip(got.answer["rows"], got.answer["without"], strict=True)
    moved = sum(a["top"] != b["top"] for a, b in pairs)
    checks.hold(moved > 0, f"the adapter changes {moved} of {len(prompts)} answers", "the adapter changes nothing")


def _gguf_base(subject: Subject, folder: Path) -> Path:
    """The base as a GGUF file: its own, or one written for as long as it takes."""
    if subject.path.is_file() and subject.quantized is None:
        return subject.path
    tensors, _, config = merged_weights(subject.model, None, torch.float32)
    vocabulary, _ = tokenizer_fields(subject.tokenizer, config.vocab_size, None)
    gguf.write_gguf(folder / "base.gguf", gguf.GgufModel(config, tensors, vocabulary), "F32")
    return folder / "base.gguf"


def _prompts(subject: Subject) -> list[list[int]]:
    return [row[: readback.PROMPT] for row in probe_rows(subject)[: readback.ROWS]]


def _worth_reading(subject: Subject, reader: str, options: Options, checks: Checks) -> bool:
    """Should an adapter be read back on its base? Not where that would write more than MOST_BYTES."""
    if not options.read_back or not readback.installed(reader, checks):
        return False
    size = 4 * sum(parameter.numel() for parameter in subject.model.parameters())
    if size <= MOST_BYTES or subject.quantized is None and subject.path.is_file() == (reader == "llama.cpp"):
        return True
    checks.skipped.append(f"not read back with {reader}: that would write the base, {size / 1e9:.0f} GB")
    return False


def _own_template(subject: Subject) -> Template | None:
    """The template of training; of a bare model its own chat template."""
    if subject.template is not None:
        return subject.template
    return get_template("chat", subject.tokenizer) if subject.tokenizer.chat_template else None


def _template(subject: Subject) -> tuple[str | None, list[str]]:
    return chat_template(_own_template(subject), subject.tokenizer)


def _prompting(subject: Subject, text: str | None) -> Template | None:
    return _own_template(subject) if text else None


def _no_type(options: Options, to: str) -> None:
    if options.type is not None:
        raise ConfigError(f"--type: --to {to} keeps the adapter's own numbers; leave it out")


def _report(report: dict[str, Any], checks: Checks, notes: list[str], options: Options) -> dict[str, Any]:
    skipped = checks.skipped if options.read_back else ["not read back: --no-read-back"]
    return {**report, "read_back": checks.passed, "not_read_back": skipped, "notes": notes}
