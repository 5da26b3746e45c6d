"""One adapter here and in PEFT: the same logits, loss and gradient; files that go both ways and lose no bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.laws.peers import SIZES, padded_step, twin_models, wide_norms
from tests.laws.small import disturb, examples, logits_of, relative, run_packs
from tests.model.checkpoints import reference
from torch import Tensor

from tunesmith.adapters import attach
from tunesmith.adapters.peft_format import load_adapter, save_adapter
from tunesmith.data.pack import plan_packs
from tunesmith.export.merge import merged_weights
from tunesmith.files import atomic_folder
from tunesmith.model.layout import Layout
from tunesmith.model.load import load_model

TOKENS = torch.arange(3, 60)
Spec = Mapping[str, Any]


def check_parity(spec: Spec, config: Any, their_key: Callable[[str], str], kind: str = "Llama", **options: Any) -> None:
    """In float64, one pack of ours equals a padded batch of theirs: logits, loss and gradient."""
    with wide_norms():
        ours, theirs = twin_models(getattr(tf, f"{kind}Config")(**{**SIZES, **options}), torch.float64)
        model = peft.get_peft_model(theirs, config).double()
        adapter = attach(ours, spec)
        disturb(adapter)
        known, trained = dict(model.named_parameters()), {}
        for name, value in adapter.trainable.items():
            trained[name] = known.pop(f"base_model.model.{their_key(name)}")
            with torch.no_grad():
                trained[name].copy_(value.view_as(trained[name]))
        assert not [name for name, p in known.items() if p.requires_grad], "PEFT trains what we do not"
        some = examples()
        (pack,) = plan_packs(some, budget=10_000)
        loss, gradient = run_packs(ours, [pack], adapter)
        logits = logits_of(ours, pack.tokens, pack.layout)
        their_logits, their_loss, their_gradient = padded_step(model, some, trained)
    for example, rows in zip(pack.examples, pack.rows, strict=True):
        assert relative(logits[torch.from_numpy(rows)], their_logits[example]) < 1e-8
    assert abs(loss - their_loss) <= 1e-10 * their_loss and their_gradient.norm() > 0
    assert relative(gradient, their_gradient) < 1e-8


def our_logits(model: Any) -> Tensor:
    """Of one fixed text."""
    return logits_of(model, TOKENS, Layout.single(len(TOKENS)))


def their_logits(model: Any) -> Tensor:
    """Of the same."""
    with torch.no_grad():
        return model.eval()(TOKENS[None]).logits[0, -len(TOKENS) :]  # without those of virtual tokens


def agree(a: Tensor, b: Tensor) -> bool:
    """To 1e-5 of the largest."""
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def move(model: Any) -> None:
    """Move everything that PEFT trains away from where it started."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw) * 0.1)


def same_tensors(first: Path, second: Path) -> bool:
    """Do two adapter folders hold the same keys and, bit for bit, the same tensors? PEFT adds a copy of some heads."""
    files = [load_file(folder / "adapter_model.safetensors") for folder in (first, second)]
    a, b = ({key: value for key, value in file.items() if "base_layer" not in key} for file in files)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def save(adapter: Any, folder: Path) -> Path:
    """Write an adapter of ours."""
    with atomic_folder(folder) as target:
        save_adapter(target, adapter, base="base", identity={})
    return folder


def check_ours(spec: Spec, tmp_path: Path, family: str = "llama") -> None:
    """Ours, saved: PEFT and we load it with equal logits, and PEFT writes the same tensors back."""
    reference(family).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    before = our_logits(model)
    adapter = attach(model, spec)
    disturb(adapter)
    live = our_logits(model)
    assert not agree(live, before)
    save(adapter, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(reference(family), tmp_path / "ours")
    assert agree(their_logits(loaded), live)
    again = load_model(tmp_path / "base")
    load_adapter(tmp_path / "ours", again)
    assert torch.equal(our_logits(again), live)
    loaded.save_pretrained(tmp_path / "theirs")
    assert same_tensors(tmp_path / "ours", tmp_path / "theirs")
    third = load_model(tmp_path / "base")
    load_adapter(tmp_path / "theirs", third)
    assert torch.equal(our_logits(third), live)


def check_theirs(config: Any, tmp_path: Path, family: str = "llama") -> None:
    """Theirs, saved: we load it with equal logits, and write the same tensors back, which PEFT loads."""
    reference(family).save_pretrained(tmp_path / "base")
    peer = peft.get_peft_model(reference(family), config)
    move(peer)
    peer.save_pretrained(tmp_path / "theirs")
    expected = their_logits(peer)
    model = load_model(tmp_path / "base")
    before = our_logits(model)
    adapter = load_adapter(tmp_path / "theirs", model)
    assert agree(our_logits(model), expected) and not agree(before, expected)
    save(adapter, tmp_path / "ours")
    assert same_tensors(tmp_path / "theirs", tmp_path / "ours")
    assert agree(their_logits(peft.PeftModel.from_pretrained(reference(family), tmp_path / "ours")), expected)


def check_merged(options: Any, layers: int, folder: Path) -> None:
    """PEFT's adapter merged here is what PEFT merges, to float32's rounding; `layers` weights have changed."""
    peer = peft.get_peft_model(reference("llama"), options)
    move(peer)
    peer.save_pretrained(folder / "a")
    reference("llama").save_pretrained(folder / "base")
    model = load_model(folder / "base")
    tensors, changed, _ = merged_weights(model, load_adapter(folder / "a", model), torch.float32)
    merged = peer.merge_and_unload().state_dict()
    assert len(changed) == layers and merged.keys() >= tensors.keys()
    assert max((tensors[key] - merged[key]).abs().max() for key in tensors) < 1e-6
