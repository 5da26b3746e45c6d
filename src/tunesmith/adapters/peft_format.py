"""Adapter folders: written for us and for Hugging Face PEFT, and read from either.

    adapter_config.json         PEFT's settings          } where PEFT has such a method; else adapter.safetensors with
    adapter_model.safetensors   PEFT's keys, minimal     } our own names
    tunesmith.json              method and settings as trained, base identity, template, tokenizer, versions
    README.md                   model card

For a method that PEFT knows, adapter_config.json alone decides what is loaded, so a folder says one thing only.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from tunesmith import __version__
from tunesmith.adapters import Adapter, Method, attach, find_method, kinds
from tunesmith.adapters.base import Exchangeable
from tunesmith.adapters.model_card import model_card
from tunesmith.adapters.peft_config import (
    PREFIX,
    PROMPT,
    check_tensors,
    open_tensors,
    read_object,
    read_tensors,
    refuse_pickle,
)
from tunesmith.config import AttentionSettings, validate_section
from tunesmith.errors import AdapterError, CannotExchange, ConfigError, ModelError, did_you_mean
from tunesmith.files import atomic_save_safetensors, atomic_write_json, atomic_write_text
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Seam
from tunesmith.model.sparse import evaluated, pattern_of, said

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NATIVE, OWN_WEIGHTS = "tunesmith.json", "adapter.safetensors"
FORMAT = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter folder says of itself; None where it does not say.

    `settings` are the method's as trained (or PEFT's, for a folder of another tool), `identity` is that of its base
    (see `model.load.model_identity`), `template` and `tokenizer` what `Template.to_dict` and `Tokenizer.fingerprint`
    gave, `parameters` and `tensors` count what the weights file holds, `notes` is what the run said about itself,
    `attention` the sparse attention that it was trained with (None: full).
    """

    folder: Path
    kind: str
    peft: bool
    base: str | None
    settings: dict[str, Any]
    parameters: int
    tensors: int
    identity: dict[str, Any] | None = None
    template: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    notes: dict[str, Any] | None = None
    attention: dict[str, Any] | None = None

    @property
    def weights(self) -> Path:
        """The file that holds the tensors."""
        return self.folder / (WEIGHTS if self.peft else OWN_WEIGHTS)


def save_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    base: str,
    identity: Mapping[str, Any],
    template: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    attention: Mapping[str, Any] | None = None,
) -> None:
    """Write `adapter` into `folder` (make it with `files.atomic_folder`). Raises AdapterError for what is not finite.

    `base` is the name or path a user gave for the base model and `identity` its `model_identity`; `template` is
    `Template.to_dict()`, `tokenizer` `Tokenizer.fingerprint()`; `notes` (data, its hash, results: plain values) go
    into the model card; `attention` is the model's sparse attention (None: full).
    """
    config, tensors = exported(adapter)
    bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise AdapterError(
            f"adapter {adapter.name!r}: {bad[0]} holds NaN or infinity ({len(bad)} of {len(tensors)} tensors do): "
            "it is not saved; go back to the last checkpoint with a lower learning rate"
        )
    if config is not None:
        common = {"base_model_name_or_path": base, "revision": None, "inference_mode": True, "auto_mapping": None}
        atomic_write_json(folder / CONFIG, dict(sorted({**config, **common}.items())))
        atomic_save_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    else:
        atomic_save_safetensors(folder / OWN_WEIGHTS, tensors, {"format": "pt"})
    own = {
        "format": FORMAT,
        "kind": adapter.kind,
        "settings": TypeAdapter(type(adapter.settings)).dump_python(adapter.settings, mode="json"),
        "base": {"name": base, "identity": dict(identity)},
        "template": None if template is None else dict(template),
        "tokenizer": None if tokenizer is None else dict(tokenizer),
        "parameters": sum(parameter.numel() for parameter in adapter.trainable.values()),
        "versions": {"tunesmith": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "attention": dict(attention) if attention else None,
        "notes": dict(notes or {}),
    }
    atomic_write_json(folder / NATIVE, own)
    atomic_write_text(folder / "README.md", model_card(own, peft=config is not None))


def exported(adapter: Adapter) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Return adapter_config.json (None where PEFT cannot say it) and the tensors as they are saved, on the CPU."""
    if isinstance(adapter.method, Exchangeable):
        try:
            own, tensors = adapter.method.to_peft(adapter)
        except CannotExchange as reason:
            logger.info("adapter %r: %s; its file is Tunesmith's own", adapter.name, reason)
        else:
            config = {"peft_type": adapter.method.peft_type, "task_type": "CAUSAL_LM", **own}
            return config, {key if key == PROMPT else f"{PREFIX}{key}": _plain(t) for key, t in tensors.items()}
    return None, {key: _plain(tensor) for key, tensor in adapter.state().items()}


def load_adapter(
    folder: Path,
    model: Llama,
    name: str = "default",
    *,
    identity: Mapping[str, Any] | None = None,
    routed: bool = False,
) -> Adapter:
    """Attach the adapter saved in `folder` (ours, or any PEFT LoRA) to `model` under `name`.

    With `identity`, the model's `model_identity`, an adapter that was trained on another base is refused; `routed`:
    also one whose method trains the base's own weights, which others on this base would have as well. Raises
    AdapterError for a folder that is damaged, not understood or does not fit; `model` is then as it was before.
    """
    info = read_info(folder)
    if identity is not None:
        check_base(info, identity)
        if info.identity is not None and info.identity.get("quant") != identity.get("quant"):
            held = [str((i.get("quant") or {}).get("kind", "not quantized")) for i in (info.identity, identity)]
            logger.warning("%s: was trained on this base %s; here it is %s, so logits differ a little", folder, *held)
    use_attention(info, model)
    if info.peft:
        method = _peft_method(info)
        where = str(info.folder / CONFIG)
        config, tensors = read_object(info.folder / CONFIG), read_tensors(info.weights)
        settings, state = method.from_peft(config, tensors, model, where)
    else:
        settings, state = dict(info.settings), read_tensors(info.weights)
        _check_finite(state, info.weights)
    try:
        adapter = attach(model, {**settings, "kind": info.kind}, name)
    except ConfigError as error:
        raise AdapterError(f"{info.folder}: {error}") from None
    if routed and adapter.base:
        weight = next(iter(adapter.base))
        _take_off(adapter, model)
        raise AdapterError(
            f"{info.folder}: its method ({adapter.kind}) trains weights of the base itself, such as {weight}, so it "
            "cannot act on some requests and not on others; merge it, and serve the merged model by itself"
        )
    _fill(adapter, state, model, str(info.weights))
    if dead := changes_nothing(exported(adapter)[1]):
        logger.warning("%s: %s", info.weights, dead)
    return adapter


def adapter_folder(path: Path) -> Path | None:
    """The adapter folder at `path` or in the run folder `path`; None where there is none."""
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file() or (folder / NATIVE).is_file():
            return folder
    return None


def read_info(folder: Path) -> AdapterInfo:
    """Say what an adapter folder holds, from its JSON files and the weights' header. Raises AdapterError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    own = read_object(folder / NATIVE) if (folder / NATIVE).is_file() else None
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else None
    if own is None and config is None:
        refuse_pickle(folder)
        raise AdapterError(f"{folder}: no {CONFIG} and no {NATIVE} here; give the folder of an adapter")
    if own is not None and own.get("format") != FORMAT:
        raise AdapterError(f"{folder / NATIVE}: format {own.get('format')!r}, known is {FORMAT}: use the newer version")
    own = own or {}
    sizes = _sizes(folder / (WEIGHTS if config is not None else OWN_WEIGHTS))
    kind = own.get("kind") or _kind_of(config or {}, folder)
    said = _mapping(own, "base", folder) or {}
    base = (config or {}).get("base_model_name_or_path") or said.get("name")
    return AdapterInfo(
        folder=folder,
        kind=str(kind),
        peft=config is not None,
        base=base if isinstance(base, str) else None,
        settings=_mapping(own, "settings", folder) or dict(config or {}),
        parameters=sum(sizes.values()),
        tensors=len(sizes),
        identity=_mapping(said, "identity", folder),
        **{key: _mapping(own, key, folder) for key in ("template", "tokenizer", "versions", "notes", "attention")},
    )


def use_attention(info: AdapterInfo, model: Llama) -> None:
    """Let `model` attend as it did when the adapter was trained (see model/sparse.py).

    Raises AdapterError where that is not understood, or another adapter is attached that was trained otherwise.
    """
    try:
        settings = validate_section(AttentionSettings, info.attention or {}, "attention")
        wanted = pattern_of(settings, model.config.num_key_value_heads)
    except (ConfigError, ModelError) as error:
        raise AdapterError(f"{info.folder / NATIVE}: {error}") from None
    if not any(isinstance(seam, Seam) and len(seam) for seam in model.modules()):
        model.pattern = wanted
    elif evaluated(wanted) != evaluated(model.pattern):
        raise AdapterError(
            f"{info.folder}: was trained with other attention ({said(wanted)}) than what is attached already "
            f"({said(model.pattern)}), and a model has one at a time: load this adapter alone"
        )


def check_base(info: AdapterInfo, identity: Mapping[str, Any]) -> None:
    """Raise AdapterError where `info` says that it was trained on another base than the one of `identity`."""
    if info.identity is None or info.identity.get("sha256") == identity.get("sha256"):
        return
    theirs, ours = info.identity.get("config") or {}, identity.get("config") or {}
    differ = [
        f"{key} {theirs[key]} there, {ours[key]} here" for key in theirs if key in ours and theirs[key] != ours[key]
    ]
    shown = "; ".join(differ[:3]) or f"same sizes, other weights or another file kind ({info.identity.get('kind')})"
    raise AdapterError(
        f"{info.folder}: this adapter is for another base: it was trained on {info.base or 'an unnamed model'} "
        f"({shown}); give that model"
    )


def changes_nothing(tensors: Mapping[str, Tensor]) -> str | None:
    """Say why an adapter with these tensors leaves its base as it is, or None: every lora_B, or everything, is zero."""
    ups = {key: tensor for key, tensor in tensors.items() if key.endswith(".lora_B.weight")} or tensors
    if any(bool(tensor.any()) for tensor in ups.values()):
        return None
    what = "every lora_B" if len(ups) < len(tensors) else "every tensor"
    return f"this adapter changes nothing: {what} is zero; it was saved before training, or training never moved it"


def _fill(adapter: Adapter, state: Mapping[str, Tensor], model: Llama, where: str) -> None:
    """Load the state; an adapter that does not fit is taken off again."""
    try:
        adapter.load_state(state, where)
    except AdapterError:
        _take_off(adapter, model)
        raise


def _take_off(adapter: Adapter, model: Llama) -> None:
    """Take off an adapter whose state was not loaded yet: nothing of the base has changed."""
    for place in adapter.deltas:
        seam = model.get_submodule(place)
        if isinstance(seam, Seam):
            del seam[adapter.name]
    for parameter in adapter.base.values():
        parameter.requires_grad_(False)


def _peft_method(info: AdapterInfo) -> Exchangeable:
    method: Method = find_method(info.kind)
    if not isinstance(method, Exchangeable):
        raise AdapterError(
            f"{info.folder / CONFIG}: kind {info.kind!r} has no PEFT format; remove {CONFIG} or {NATIVE}"
        )
    return method


def _kind_of(config: Mapping[str, Any], folder: Path) -> str:
    wanted = config.get("peft_type")
    known: dict[str, list[str]] = {}
    for kind in kinds():
        if isinstance(method := find_method(kind), Exchangeable):
            known.setdefault(method.peft_type, []).append(kind)
    if not isinstance(wanted, str) or wanted not in known:
        hint = did_you_mean(str(wanted).upper(), known)
        raise AdapterError(
            f"{folder / CONFIG}: peft_type {str(wanted)[:60]!r} is not supported{hint}; known: "
            f"{', '.join(sorted(known))}"
        )
    for kind in known[wanted]:  # methods that share a type say which files are theirs
        reads = getattr(find_method(kind), "reads", None)
        if reads is None or reads(config):
            return kind
    raise AdapterError(f"{folder / CONFIG}: no method for peft_type {wanted!r} reads a file with these keys")


def _sizes(path: Path) -> dict[str, int]:
    """Elements of each tensor of a safetensors file, from its header."""
    with open_tensors(path) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    return {name: int(torch.Size(shape).numel()) for name, shape in shapes.items()}


def _mapping(values: Mapping[str, Any], key: str, folder: Path) -> dict[str, Any] | None:
    value = values.get(key)
    if value is not None and not isinstance(value, dict):
        raise AdapterError(f"{folder / NATIVE}: {key} should be an object; copy the file again")
    return value


def _check_finite(state: Mapping[str, Tensor], where: Path) -> None:
    """NaN and wrong types by name; names and shapes are checked against the model by `Adapter.load_state`."""
    check_tensors(
        {key: tuple(tensor.shape) for key, tensor in state.items()},
        {key: (key, tensor) for key, tensor in state.items()},
        str(where),
        "",
    )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to(tensor.device if tensor.is_meta else "cpu").contiguous()  # meta: only counted
