"""pyreft's folders: a file of tensors for each edit, and a config.json that says which layer each edits.

A folder does not say which tokens are edited, nor whether the first and the last ones share their edits: training did,
so the user must. Where they don't share, the first half of the edits, in pyreft's order of them, acts on a prompt's
first tokens, and the second half on its last.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from convert_result import Refused, Result
from torch import Tensor, nn
from torch.nn.utils import parametrizations

LAYER = re.compile(r"layer[._](\d+)[._]comp[._]block_output[._]|comp[._]model[._]layers\[(\d+)\][._]output[._]")
IGNORED = ("embed_dim", "interchange_dim")  # buffers that repeat the hidden size
UNEQUAL = (
    "with unequal numbers of first and last tokens, pyreft's make_multiple_position_supervised_data_module fills up "
    "the shorter list with the answer's first token, which it then edits too; that is not converted"
)


def convert_pyreft(files: dict[str, dict[str, Tensor]], config: Mapping[str, Any], given: Namespace) -> Result:
    """Convert the edits in `files`, by their keys. Raises Refused."""
    first, last = _positions(given.positions)
    order = config.get("sorted_keys")
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(files):
        raise Refused("config.json: sorted_keys does not list the folder's intkey_*.bin files; is the folder whole?")
    read, variant = _reader(config.get("intervention_types"))
    tied = given.share_weights and first > 0 and last > 0
    halves = first > 0 and last > 0 and not tied
    found: dict[str, Tensor] = {}
    layers = set()
    for number, key in enumerate(order):
        part = ("first" if number < len(order) / 2 else "last") if halves else _only(first, last)
        layer = _layer(key)
        layers.add(layer)
        for name, tensor in read({k: t for k, t in files[key].items() if k not in IGNORED}, key).items():
            place = f"model.layers.{layer}.resid.edits.{part}.{name}"
            if place in found:
                raise Refused(f"config.json: two edits of the {part} tokens in layer {layer}; were weights shared?")
            found[place] = tensor
    notes = _drop_top(found, max(layers), given.layers) if first > 0 and not tied else []
    if halves and first != last:
        notes.append(UNEQUAL)
    ranks = {len(tensor) for name, tensor in found.items() if name.endswith(".bias")}
    if len(ranks) != 1:
        raise Refused(f"edits of different ranks: {sorted(ranks)}")
    settings = {
        "variant": variant,
        "rank": ranks.pop(),
        "first_positions": first,
        "last_positions": last,
        "tied": tied,
        "layers_to_transform": sorted(layers),
    }
    return Result(kind="reft", settings=settings, tensors=found, notes=tuple(notes))


def _loreft(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """h + R^T (W h + b - R h); the file holds R's transpose."""
    W, b, R = _take(tensors, key, "weight", "bias", "rotate_layer")
    return {"source": W, "bias": b, "basis": R.T}


def _noreft(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """h + V^T (W h + b - V h - c) is the same with b - c."""
    c = tensors.pop("proj_layer.bias", None)
    W, b, V = _take(tensors, key, "learned_source.weight", "learned_source.bias", "proj_layer.weight")
    return {"source": W, "bias": b if c is None else b.float() - c.float(), "basis": V}


def _nodireft(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """h + V^T (W h + b): V's own bias is never used."""
    tensors.pop("proj_layer.bias", None)
    W, b, V = _take(tensors, key, "learned_source.weight", "learned_source.bias", "proj_layer.weight")
    return {"source": W, "bias": b, "basis": V}


def _direft(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """h + R^T (W h + b), R kept as the parameters of torch's orthogonal parametrization."""
    start = "rotate_layer."
    inner = {name.removeprefix(start): tensors.pop(name) for name in list(tensors) if name.startswith(start)}
    W, b = _take(tensors, key, "learned_source.weight", "learned_source.bias")
    layer = nn.Module()
    layer.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(W.shape[1], W.shape[0])))
    parametrizations.orthogonal(layer)
    try:
        layer.load_state_dict({name: tensor.float() for name, tensor in inner.items()})
    except RuntimeError as error:
        raise Refused(f"{key}: {str(error)[:160]}") from None
    return {"source": W, "bias": b, "basis": layer.weight.detach().T}


Reader = Callable[[dict[str, Tensor], str], dict[str, Tensor]]
READERS: dict[str, tuple[Reader, str]] = {
    "LoreftIntervention": (_loreft, "loreft"),
    "NoreftIntervention": (_noreft, "noreft"),
    "DireftIntervention": (_direft, "direft"),
    "NodireftIntervention": (_nodireft, "direft"),
}


def _reader(types: Any) -> tuple[Reader, str]:
    """How to read a file of the class that config.json names, and the variant that it is."""
    found = {re.sub(r"^.*\.|'>$", "", str(name)) for name in types} if isinstance(types, list) else set()
    if len(found) != 1 or not found <= READERS.keys():
        raise Refused(
            f"config.json: intervention_types {', '.join(sorted(found)) or 'missing'}; one of these is read: "
            f"{', '.join(READERS)}"
        )
    return READERS[found.pop()]


def _take(tensors: dict[str, Tensor], key: str, *names: str) -> list[Tensor]:
    """These tensors, of shapes that fit: matrices by their first, and a bias."""
    if tensors.keys() != set(names):
        raise Refused(f"{key}: holds {', '.join(sorted(tensors))[:120]}, expected {', '.join(names)}")
    found = [tensors[name] for name in names]
    rank, hidden = found[0].shape if found[0].ndim == 2 else (0, 0)
    fit = {"bias": [(rank,)], "rotate_layer": [(hidden, rank)]}
    for name, tensor in zip(names, found, strict=True):
        if tuple(tensor.shape) not in fit.get(name.rpartition(".")[2], [(rank, hidden)]):
            raise Refused(f"{key}: {name} has shape {list(tensor.shape)}")
    return found


def _positions(text: str | None) -> tuple[int, int]:
    """How many first and last tokens, from pyreft's f7+l7."""
    match = re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", text or "")
    first, last = (int(match[1] or 0), int(match[2] or 0)) if match else (0, 0)
    if not first + last:
        raise Refused("which tokens were edited is not in the folder: give --positions as in training, such as f7+l7")
    return first, last


def _only(first: int, last: int) -> str:
    return "both" if first and last else "first" if first else "last"


def _layer(key: str) -> int:
    match = LAYER.search(key)
    if match is None:
        raise Refused(f"{key[:80]}: edits something else than a block's output")
    return int(match[1] or match[2])


def _drop_top(found: dict[str, Tensor], highest: int, count: int | None) -> list[str]:
    """Leave out an edit of first tokens at the end of the model's last layer, where nothing reads them."""
    if count is None:
        raise Refused("give --layers, how many layers the base has: edits of first tokens in its last one do nothing")
    if highest >= count:
        raise Refused(f"it edits layer {highest}, and --layers says that there are {count}, from 0 on")
    unread = [name for name in found if name.startswith(f"model.layers.{count - 1}.resid.edits.first.")]
    for name in unread:
        del found[name]
    return ["an edit of first tokens in the last layer is left out: nothing reads what it changes"] if unread else []
