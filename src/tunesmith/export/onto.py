"""Merge an adapter that was trained on a quantized base onto the 16-bit model that this base was made from.

quantized folder or file -> what it says it was made from, or --onto PATH -> is it that model? -> load adapter -> merge

Which model it is, is told by the hash that `tunesmith quantize` wrote down. Without one: every weight that the
quantized file holds in full must be the dense one's, number by number, and every quantized one must be near it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tunesmith.adapters.peft_format import load_adapter
from tunesmith.data.catalog import resolve_model
from tunesmith.errors import CannotMerge, ConfigError
from tunesmith.export.fold import Originals
from tunesmith.export.hf import DTYPES, sampling_of
from tunesmith.export.merge import Merge, merge_adapter
from tunesmith.export.subject import Subject, probe_rows, reference_of
from tunesmith.model.fields import read_json
from tunesmith.model.load import Weights, load_model, model_identity, open_weights
from tunesmith.tokenizer import Tokenizer, load_tokenizer

FROM = "quantized_from"  # key of a quantized folder's config.json: {"name", "sha256"}
DEQUANTIZED = "dequantized"
# cos(W, Q(W)): two bits of a normal weight keep 0.94; two trainings of one architecture share nearly nothing.
NEAR = 0.9


def merge_subject(
    subject: Subject, out: Path, *, onto: str | None = None, dtype: str = "auto", force: bool = False
) -> dict[str, Any]:
    """Merge a subject's adapter and write a Hugging Face folder; returns `MergeReport.summary()`.

    `onto` names the 16-bit base of a quantized one, or is "dequantized": what the quantized weights stand for. Without
    it, the base itself where that is a dense file (quantized only in memory), or the one that a quantized folder says
    it was made from. Raises CannotMerge, ConfigError, VerificationError.
    """
    if subject.adapter is None:
        raise ConfigError(f"{subject.name}: has no adapter to merge; give a run folder or an adapter folder")
    dense, how = prepared(subject, onto)
    how = replace(how, dtype=dtype, force=force)
    return merge_adapter(dense.model, dense.adapter or subject.adapter, dense.tokenizer, out, how)


def prepared(subject: Subject, onto: str | None) -> tuple[Subject, Merge]:
    """The subject on the base that it is to be folded into, in float32, and how to judge the result."""
    how = Merge(rows=probe_rows(subject), sampling=sampling_of(subject.path), base=_said(subject))
    if onto is not None and subject.quantized is None and not few_bits(subject.path):
        raise ConfigError(f"--onto: {subject.name} is not quantized; leave it out, or name it with --base")
    if subject.quantized is None and onto in (None, DEQUANTIZED):
        return subject, replace(how, originals=_originals(subject))
    if subject.adapter is None or subject.info is None or onto == DEQUANTIZED:
        return subject, replace(how, dequantize=True, base={**how.base, "values": f"{subject.quantized}, dequantized"})
    path, name = _dense_base(subject, onto)
    as_trained = reference_of(subject.model, subject.adapter, how.rows or [])
    told = check_base_of(subject, path)
    _check_tokenizer(subject.tokenizer, path)
    model = load_model(path, dtype=torch.float32, device=subject.model.device)
    adapter = load_adapter(subject.info.folder, model)
    dense = replace(subject, model=model, adapter=adapter, name=name, path=path)
    base = {"name": name, "sha256": model_identity(path)["sha256"], "checked": told}
    return dense, replace(how, as_trained=as_trained, base=base, sampling=sampling_of(path))


def check_base_of(subject: Subject, dense: Path) -> str:
    """Say how it is known that `subject`'s quantized base was made from the model at `dense`. Raises CannotMerge."""
    if model_identity(dense)["sha256"] == subject.identity["sha256"]:
        return "the file that was quantized when it was loaded"
    recorded = made_from(subject.path)
    if recorded is not None and recorded.get("sha256") is not None:
        if recorded["sha256"] != model_identity(dense)["sha256"]:
            raise CannotMerge(
                f"--onto: {dense} is not the model that {subject.path} was quantized from ({recorded.get('name')}, "
                f"sha256 {str(recorded['sha256'])[:12]}); give that one, or --onto {DEQUANTIZED}"
            )
        return f"the hash that {subject.path.name} was quantized from"
    ours, theirs = open_weights(subject.path), open_weights(dense)
    try:
        return _compared(ours, theirs)
    finally:
        ours.close()
        theirs.close()


def made_from(path: Path) -> Mapping[str, Any] | None:
    """What a quantized folder says it was made from, {"name", "sha256"}; None where it does not say."""
    file = path / "config.json"
    said = read_json(file) if file.is_file() else None
    found = said.get(FROM) if isinstance(said, dict) else None
    return found if isinstance(found, dict) else None


def _dense_base(subject: Subject, onto: str | None) -> tuple[Path, str]:
    """The 16-bit base as it is named, or as the quantized one says. Raises ConfigError where nothing says it."""
    if onto is not None:
        return resolve_model(onto), onto
    if subject.path.is_file() or not few_bits(subject.path):  # quantized when it was loaded, or a .gguf, expanded
        return subject.path, subject.name
    recorded = made_from(subject.path)
    name = str(recorded.get("name")) if recorded else ""
    if name and Path(name).exists():  # what a file names is never fetched; its hash is compared before it is used
        return Path(name), name
    hint = f" ({name[:120]}, which is not there)" if name else ""
    raise ConfigError(
        f"--onto: {subject.name} is quantized ({subject.quantized}) and its 16-bit original is not known{hint}; name "
        f"it with --onto MODEL, or fold into what its weights stand for with --onto {DEQUANTIZED}"
    )


def few_bits(path: Path) -> bool:
    """Does this model's file hold any weight in less than 16 bits?"""
    weights = open_weights(path)
    try:
        return any(not _full(weights, name) for name in weights.config.weight_shapes())
    finally:
        weights.close()


def _full(weights: Weights, name: str) -> bool:
    return name not in weights.shapes or weights.sample(name)[0] in ("F64", "F32", "F16", "BF16")


def _compared(ours: Weights, theirs: Weights) -> str:
    """Hold a quantized file against a dense one, weight by weight."""
    if ours.config.weight_shapes() != theirs.config.weight_shapes():
        raise CannotMerge(f"--onto: {theirs.path} has other sizes than {ours.path}: it is another model")
    exact = 0
    for name in theirs.config.weight_shapes():
        a, b = ours.read(name, torch.float32), theirs.read(name, torch.float32)
        if _full(ours, name):
            if not any(torch.equal(a, b.to(dtype).float()) for dtype in DTYPES.values()):
                raise CannotMerge(f"--onto: {name} of {theirs.path} differs from that of {ours.path}: another model")
            exact += 1
        cosine = float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))
        if not cosine > NEAR:
            raise CannotMerge(
                f"--onto: {name} of {theirs.path} is not what {ours.path} was quantized from (cosine {cosine:.2f}): "
                "another model"
            )
    return f"{exact} weights equal, the quantized ones near"


def _originals(subject: Subject) -> Originals | None:
    """Reads the base's own weights again, where the method trained some in place."""
    if subject.adapter is None or not subject.adapter.base:
        return None

    def read(name: str) -> torch.Tensor:
        weights = open_weights(subject.path)
        try:
            held = name if name in weights.shapes else "model.embed_tokens.weight"  # a tied head
            return weights.read(held, torch.float32)
        finally:
            weights.close()

    return read


def _check_tokenizer(tokenizer: Tokenizer, dense: Path) -> None:
    """Token by token: another vocabulary would make an adapter's answers noise."""
    golden = tokenizer.fingerprint()["golden"]
    if load_tokenizer(dense).fingerprint()["golden"] != golden:
        raise CannotMerge(f"--onto: {dense} has another tokenizer than the base that the adapter was trained on")


def _said(subject: Subject) -> dict[str, Any]:
    return {"name": subject.name, "sha256": subject.identity["sha256"]}
