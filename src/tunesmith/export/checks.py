"""The checks of verification: each a small function from the evidence to a Check, or None where it does not apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.adapters.peft_config import PREFIX, PROMPT
from tunesmith.adapters.peft_format import AdapterInfo, changes_nothing, check_base
from tunesmith.data.templates import from_dict
from tunesmith.errors import TunesmithError
from tunesmith.export.probe import Probe
from tunesmith.export.replay import Answer
from tunesmith.files import MARKER, damage
from tunesmith.model.config import ModelConfig
from tunesmith.tokenizer import Tokenizer, check_fits, load_tokenizer

# How far a fresh load may be from the live model, as a share of the largest logit, where it is not equal bit for bit:
# another machine or another number of threads adds in another order.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Check:
    """One check: whether it held, what was seen, and, where it failed, what to do."""

    name: str
    ok: bool
    detail: str
    cure: str = ""


@dataclass(frozen=True)
class Evidence:
    """What is judged; an `_error` says why the value beside it is None.

    `answer` may still be on its way: a check that asks for it waits.
    """

    adapter: Path
    base: Path
    info: AdapterInfo | None
    tensors: Mapping[str, Tensor] | None
    tensors_error: str | None
    identity: Mapping[str, Any] | None
    identity_error: str | None
    config: ModelConfig | None
    tokenizer: Tokenizer | None
    tokenizer_error: str | None
    probe: Probe | None
    probe_error: str | None
    replayed: Future[tuple[Answer | None, str | None]]
    fresh: bool
    run_dtype: str | None

    @property
    def answer(self) -> Answer | None:
        """What base and adapter compute when they are loaded again; None where they do not load."""
        return self.replayed.result()[0]

    @property
    def answer_error(self) -> str | None:
        """Why there is no answer."""
        return self.replayed.result()[1]


SAVE_AGAIN = "train again from the last checkpoint, or copy the folder again from where it was whole"
RIGHT_BASE = "give the base model that it was trained on, with --base"


def files_whole(e: Evidence) -> Check | None:
    """Every file is there, in its size, with its SHA-256."""
    if e.info is not None and e.info.identity is None and not (e.adapter / MARKER).exists():
        return None  # another tool's folder: it lists no hashes
    wrong = damage(e.adapter)
    return Check("files", wrong is None, wrong or "every file is there, sizes and SHA-256 as written", SAVE_AGAIN)


def tensors_sound(e: Evidence) -> Check:
    """Every tensor is finite, and not all of them leave the base as it is."""
    name = "tensors"
    if e.tensors is None:
        return Check(name, False, e.tensors_error or "not readable", SAVE_AGAIN)
    bad = [key for key, tensor in e.tensors.items() if not bool(torch.isfinite(tensor.float()).all())]
    if bad:
        what = f"{bad[0]} holds NaN or infinity ({len(bad)} of {len(e.tensors)} tensors do)"
        return Check(name, False, what, "go back to the last checkpoint, with a lower learning rate")
    if nothing := changes_nothing(e.tensors):
        return Check(
            name, False, nothing, "raise the learning rate or train for longer; look at grad_norm in metrics.jsonl"
        )
    ups = [tensor for key, tensor in e.tensors.items() if key.endswith(".lora_B.weight")]
    still = sum(not bool(tensor.any()) for tensor in ups)
    count = sum(tensor.numel() for tensor in e.tensors.values())
    note = f"; {still} of {len(ups)} modules never moved" if still else ""
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in e.tensors.values()}))
    return Check(name, True, f"{len(e.tensors)} tensors, {count:,} numbers ({dtypes}), all finite, not all zero{note}")


def keys_exact(e: Evidence) -> Check | None:
    """The keys of a folder of ours are PEFT's own.

    Other tools' folders may carry wrappers' prefixes, which loading here takes away; PEFT would find none of them.
    """
    if e.tensors is None or e.info is None or not e.info.peft or e.info.identity is None:
        return None
    bad = [key for key in e.tensors if key != PROMPT and not key.startswith((f"{PREFIX}model.", f"{PREFIX}lm_head."))]
    detail = f"{bad[0]} ({len(bad)} of {len(e.tensors)} keys) is no key that PEFT would find" if bad else "as PEFT's"
    return Check("keys", not bad, detail, SAVE_AGAIN)


def base_is_its_own(e: Evidence) -> Check:
    """The base is the one that the adapter was trained on."""
    name = "base"
    if e.identity is None:
        return Check(name, False, e.identity_error or "not readable", RIGHT_BASE)
    if e.info is None or e.info.identity is None:
        return Check(name, True, f"{e.base.name}; the adapter does not say by hash which base it is for")
    try:
        check_base(e.info, e.identity)
    except TunesmithError as error:
        return Check(name, False, str(error), RIGHT_BASE)
    return Check(name, True, f"{e.base.name}, the one that it was trained on (sha256 {str(e.identity['sha256'])[:12]})")


def loads(e: Evidence) -> Check:
    """Base and adapter load in a fresh process; every key and shape is exact."""
    where = "a fresh process" if e.fresh else "a fresh model"
    if e.answer is None:
        return Check("reload", False, f"{where}: {e.answer_error}", SAVE_AGAIN)
    if not bool(torch.isfinite(e.answer.adapted.float()).all()):
        return Check(
            "reload", False, f"{where}: its logits are not finite", "use bfloat16 or float32: float16 ends at 65504"
        )
    return Check("reload", True, f"{where} loaded base and adapter: keys and shapes exact, logits finite")


def dtype_kept(e: Evidence) -> Check | None:
    """The probe was made in the dtype that the run's configuration names."""
    made = e.probe.made if e.probe else None
    if not made or e.run_dtype in (None, "auto"):
        return None
    ok = made.get("dtype") == e.run_dtype
    detail = (
        f"trained in {made.get('dtype')}, config.yaml says {e.run_dtype}" if not ok else f"{e.run_dtype} throughout"
    )
    return Check("dtype", ok, detail, "set model.dtype in config.yaml to what it was trained in")


def base_computes_alike(e: Evidence) -> Check | None:
    """The fresh base computes what the base in training did."""
    if e.answer is None or e.probe is None or e.probe.base is None:
        return None
    ok, detail = _alike(e, e.answer.base, e.probe.base)
    return Check("base logits", ok, f"without the adapter: {detail}", RIGHT_BASE)


def logits_equal_live(e: Evidence) -> Check | None:
    """With the adapter, logits are the live model's."""
    if e.probe_error:
        return Check("live logits", False, e.probe_error, "run the training again")
    if e.answer is None or e.probe is None or e.probe.live is None:
        return None
    ok, detail = _alike(e, e.answer.adapted, e.probe.live)
    return Check("live logits", ok, f"reloaded against trained: {detail}", SAVE_AGAIN)


def logits_differ_from_base(e: Evidence) -> Check | None:
    """The adapter changes what the base says."""
    if e.answer is None:
        return None
    base, adapted = e.answer.base.double(), e.answer.adapted.double()
    name, cure = "differs from base", "the adapter does nothing: train for longer or with a higher learning rate"
    most = float((base - adapted).abs().max())
    if not most > 0:
        return Check(name, False, "logits with and without the adapter are equal", cure)
    p, q = base.log_softmax(-1), adapted.log_softmax(-1)
    kl = float((q.exp() * (q - p)).sum(-1).mean())
    top = float((base.argmax(-1) != adapted.argmax(-1)).double().mean())
    likeliest = float((q.exp().max(-1).values - p.exp().max(-1).values).abs().max())
    detail = f"largest change of a logit {most:.3g}, of the top probability {likeliest:.3g}; KL {kl:.3g}; "
    return Check(name, likeliest > 0, f"{detail}another top token at {top:.0%} of {len(base)} places", cure)


def tokenizer_same(e: Evidence) -> Check | None:
    """The base's tokenizer, and a copy saved with the adapter, give the ids of training."""
    name, cure = "tokenizer", "use the tokenizer that the adapter was trained with"
    if e.info is None:
        return None
    if e.tokenizer is None:
        return Check(name, False, e.tokenizer_error or "not readable", cure)
    saved = e.info.tokenizer
    copies = [e.tokenizer]
    try:
        if e.config is not None:
            check_fits(e.tokenizer, e.config)
        if any((e.adapter / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
            copies.append(load_tokenizer(e.adapter))
    except TunesmithError as error:
        return Check(name, False, str(error), cure)
    if saved is None:
        return Check(name, True, "fits the model; the adapter does not say which it was trained with")
    for tokenizer in copies:
        if wrong := _tokenizer_change(tokenizer.fingerprint(), saved):
            return Check(name, False, f"{tokenizer.where}: {wrong}", cure)
    return Check(name, True, f"hash and the ids of {len(saved.get('golden', {}))} golden texts as in training")


def template_same(e: Evidence) -> Check | None:
    """The saved template renders as it did in training."""
    if e.info is None or e.tokenizer is None:
        return None
    if e.info.template is None:
        return Check("template", True, "none saved: chat with the template that it was trained with")
    try:
        template = from_dict(e.info.template, e.tokenizer)
    except TunesmithError as error:
        return Check("template", False, str(error), "restore tunesmith.json, or train again")
    return Check("template", True, f"{template.name}: hash and golden rendering as in training")


CHECKS: tuple[Callable[[Evidence], Check | None], ...] = (
    files_whole,
    tensors_sound,
    keys_exact,
    base_is_its_own,
    loads,
    dtype_kept,
    base_computes_alike,
    logits_equal_live,
    logits_differ_from_base,
    tokenizer_same,
    template_same,
)


def _alike(e: Evidence, found: Tensor, recorded: Tensor) -> tuple[bool, str]:
    if found.shape != recorded.shape:
        return False, f"{tuple(found.shape)} logits where {tuple(recorded.shape)} were recorded"
    if torch.equal(found, recorded):
        return True, f"{len(found)} places equal bit for bit"
    made = e.probe.made if e.probe and e.probe.made else {}
    allowed = TOLERANCE.get(made.get("dtype", "float32"), 1e-5)
    largest, apart = float(recorded.double().abs().max()), float((found.double() - recorded.double()).abs().max())
    share = apart / largest if largest else float("inf")
    word = "within" if share <= allowed else "more than"
    return share <= allowed, f"largest difference {apart:.3g}, {share:.2g} of the largest logit, {word} {allowed:g}"


def _tokenizer_change(now: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
    golden = saved.get("golden")
    for text, ids in (golden if isinstance(golden, dict) else {}).items():
        if now["golden"].get(text) != ids:
            return f"not the tokenizer of training: {text[:40]!r} becomes {now['golden'].get(text)}, it was {ids}"[:240]
    if now["sha256"] != saved.get("sha256"):
        return "not the tokenizer of training: its hash differs (its vocabulary or its special tokens)"
    return None
