"""The probe: what the live model computed at the end of training, kept to hold a fresh load of the saved files against.

verify_probe.safetensors   tokens, lengths, positions; live (places, vocabulary); base likewise where it can be had;
                           images: what the adapter looks at of each row's image, where it looks at any
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tunesmith import __version__
from tunesmith.data.encode import Example, picture_of
from tunesmith.data.pack import plan_packs
from tunesmith.errors import AdapterError
from tunesmith.files import atomic_save_safetensors
from tunesmith.inference.generate import evaluation_mode
from tunesmith.model.config import ModelConfig
from tunesmith.model.llama import Llama
from tunesmith.model.sight import Look, Picture, distinct, looked_up
from tunesmith.tokenizer import Tokenizer
from tunesmith.tokenizer.base import GOLDEN

PROBE = "verify_probe.safetensors"
MAX_ROWS, MAX_TOKENS, PLACES = 8, 256, 8  # rows, tokens of a row, places of a row whose logits are kept
ENOUGH = 512  # tokens: two rows are always taken, others while no more than these are taken in all


@dataclass(frozen=True)
class Images:
    """Features (images, ...) of each look, in the order of `Needs.looks`, and every row's image, (rows,); -1: none."""

    features: tuple[Tensor, ...]
    of_row: Tensor


@dataclass(frozen=True)
class _Kept:
    """An image of a probe: a Picture without an encoder. Without `features` it is one drawn at random."""

    key: str
    features: Mapping[Look, Tensor] | None = None

    def look(self, look: Look) -> Tensor:
        """See `Picture`."""
        if self.features is not None:
            return self.features[look]
        return torch.randn(look.shape, generator=torch.Generator().manual_seed(int(self.key)))


@dataclass(frozen=True)
class Probe:
    """`tokens` of rows of `lengths` end to end; `positions` index them; `live` and `base` are logits there, or None.

    `made` says with what they were made: dtype, device, threads, versions.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    positions: Tensor
    live: Tensor | None = None
    base: Tensor | None = None
    made: Mapping[str, str] | None = None
    images: Images | None = None


def write_probe(
    folder: Path, model: Llama, rows: Sequence[Sequence[int]], adapters: tuple[str, ...] | None = None
) -> None:
    """Record in `folder` (the run's) what `model` computes for the first `rows` of ids, with adapters and without.

    Each row is cut to MAX_TOKENS; there are fewer of long ones; logits are kept at PLACES places of each. Rows may be
    `Prompt`s with an image. Raises AdapterError where no row has any tokens.
    """
    probe = make_probe(rows)
    pictures = [picture_of(row) for row in rows if len(row)][: len(probe.lengths)]
    probe = replace(probe, images=_images(pictures, model.needs(adapters).looks))
    live = logits_at(model, probe, adapters)
    tensors = {
        "tokens": probe.tokens,
        "positions": probe.positions,
        "lengths": torch.tensor(probe.lengths),
        "live": live,
    }
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not any(parameters[name].requires_grad for name in model.config.weight_shapes()):  # trained: the base is gone
        tensors["base"] = logits_at(model, probe, ())
    tensors |= image_tensors(probe)
    atomic_save_safetensors(Path(folder) / PROBE, tensors, made_with(model))


def make_probe(rows: Sequence[Sequence[int]]) -> Probe:
    """Rows of token ids as a probe without logits. Raises AdapterError where no row has tokens."""
    cut = [list(row[:MAX_TOKENS]) for row in rows if len(row)][:MAX_ROWS]
    while len(cut) > 2 and sum(map(len, cut)) > ENOUGH:
        cut.pop()
    if not cut:
        raise AdapterError("verification needs at least one row of tokens to compare logits on; give it data")
    starts, start = [], 0
    for row in cut:
        places = torch.linspace(len(row) - 1, 0, min(PLACES, len(row))).round().long()
        starts.append(start + places)
        start += len(row)
    tokens = torch.tensor([token for row in cut for token in row])
    return Probe(tokens, tuple(len(row) for row in cut), torch.cat(starts))


def built_in_rows(tokenizer: Tokenizer | None, config: ModelConfig) -> list[list[int]]:
    """Rows where there is no data: the tokenizer's golden texts, and ids spread over the vocabulary."""
    rows = [tokenizer.encode(text) for text in GOLDEN] if tokenizer else []
    rows.append([(1 + 7919 * i) % config.vocab_size for i in range(48)])
    return [row for row in rows if row and max(row) < config.vocab_size]


def read_probe(path: Path) -> Probe:
    """Read what `write_probe` wrote. Raises AdapterError for a missing or damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            made = file.metadata() or {}
        lengths = tuple(int(n) for n in tensors["lengths"])
        live = tensors["live"] if tensors["live"].numel() else None
        probe = Probe(tensors["tokens"], lengths, tensors["positions"], live, tensors.get("base"), made)
        if "images" in tensors:
            features = tuple(tensors[f"image.{i}"] for i in range(sum(name.startswith("image.") for name in tensors)))
            probe = replace(probe, images=Images(features, tensors["images"]))
        if sum(lengths) != probe.tokens.numel() or probe.positions.max() >= probe.tokens.numel():
            raise ValueError("its lengths do not add up")
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise AdapterError(
            f"{path}: no usable probe ({str(error)[:80]}); run the training again, or verify the adapter folder alone"
        ) from None
    return probe


@torch.no_grad()
def logits_at(model: Llama, probe: Probe, adapters: tuple[str, ...] | None) -> Tensor:
    """Logits (places, vocabulary), on the CPU, that `model` computes at the probe's places with these adapters."""
    if int(probe.tokens.max()) >= model.config.vocab_size:
        raise AdapterError(
            f"the probe holds token {int(probe.tokens.max())}, this base has {model.config.vocab_size}: another model"
        )
    with evaluation_mode(model):
        parts = probe.tokens.numpy().astype(np.int32)
        needs = model.needs(adapters)
        pictures = _pictures(probe, needs.looks)
        rows = [_half(*row) for row in zip(np.split(parts, np.cumsum(probe.lengths)[:-1]), pictures, strict=True)]
        (pack,) = plan_packs(rows, budget=1 << 30, share=False, device=model.device, needs=needs)
        ctx = model.context(pack.layout, adapters=adapters)
        hidden = model.run(pack.tokens, ctx)[pack.tokens >= 0]  # the probe's own tokens, without an adapter's infix
        return model.logits(hidden[probe.positions.to(model.device)], ctx).cpu()


def _half(ids: np.ndarray, picture: Picture | None) -> Example:
    """The ids as a prompt and its answer, so that what acts where a prompt ends is seen too."""
    return Example(ids, np.arange(len(ids)) >= (len(ids) + 1) // 2, "probe", picture=picture)


def _images(pictures: Sequence[Picture | None], looks: Sequence[Look]) -> Images | None:
    """What is looked at of the rows' images; None where nothing is."""
    different, of_row = distinct(pictures)
    if not looks or not different:
        return None
    found = looked_up(different, looks, torch.device("cpu"))
    return Images(tuple(found[look] for look in looks), torch.tensor(of_row))


def image_tensors(probe: Probe) -> dict[str, Tensor]:
    """A probe's images as it is saved with them."""
    if probe.images is None:
        return {}
    return {f"image.{i}": features for i, features in enumerate(probe.images.features)} | {
        "images": probe.images.of_row
    }


def _pictures(probe: Probe, looks: Sequence[Look]) -> list[Picture | None]:
    """Each row's image: as kept; drawn at random for a probe without any, so that what only images move is seen.

    Raises AdapterError for images that do not fit what is looked at.
    """
    if not looks or probe.images is None:
        return [_Kept(str(i)) if looks and probe.live is None else None for i in range(len(probe.lengths))]
    features, of_row = probe.images.features, probe.images.of_row.tolist()
    if [f.shape[1:] for f in features] != [look.shape for look in looks] or len(of_row) != len(probe.lengths):
        raise AdapterError("the probe's images are not what this adapter looks at: another adapter, or a damaged probe")
    kept = [
        _Kept(str(i), {look: f[i] for look, f in zip(looks, features, strict=True)}) for i in range(len(features[0]))
    ]
    return [None if i < 0 else kept[i] for i in of_row]


def made_with(model: Llama) -> dict[str, str]:
    """What decides the last bits of a result: dtype, device, threads, machine, versions."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": str(torch.get_num_threads()),
        "machine": f"{platform.machine()} {platform.node()}",
        "torch": torch.__version__,
        "tunesmith": __version__,
    }
