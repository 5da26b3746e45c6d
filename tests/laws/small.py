"""Small models with sensible random weights, and ragged examples with common beginnings, for the laws.

Some of the examples have an image: what does not look at images must not notice, what does must see its own.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.adapters import Adapter
from tunesmith.data.encode import Example
from tunesmith.data.pack import Pack, plan_packs
from tunesmith.model.config import ModelConfig
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.sight import Look
from tunesmith.train.loss import pack_loss

VOCAB = 61
TINY = ModelConfig(
    model_type="llama",
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


class Shown:
    """An image whose features are drawn from its name: a Picture without an encoder."""

    def __init__(self, key: str) -> None:
        self.key = key

    def look(self, look: Look) -> Tensor:
        """See `Picture`; no two scales or tokens are of one size."""
        draw = torch.Generator().manual_seed(zlib.crc32(f"{self.key} {look}".encode()))
        return torch.randn(look.shape, generator=draw) * torch.linspace(1, 9, look.shape[-1])


Loss = Callable[[Llama, Pack, object, Tensor], Tensor]


def build(config: ModelConfig = TINY, dtype: torch.dtype = torch.float64, seed: int = 0) -> Llama:
    """A model whose weights are drawn so that activations keep their size; norms and biases are not neutral."""
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu").to(dtype)
    model.tie_weights()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float64)
            scale = p.shape[-1] ** -0.5 if p.ndim == 2 and "embed" not in name else 0.3
            p.copy_(noise * scale + (1 if name.endswith("norm.weight") else 0))
    return model.requires_grad_(False).eval()


def examples(seed: int = 0, count: int = 8, vocab: int = VOCAB, prefix: int = 13) -> list[Example]:
    """Unequal examples behind a preamble; one a prefix of the others, two identical, one that begins differently.

    Three have one image, two have none, the others one each; the identical ones have the same.
    """
    rng = np.random.default_rng(seed)
    preamble, question = rng.integers(0, vocab, prefix), rng.integers(0, vocab, 9)
    made = []
    for i in range(count - 3):
        parts = [preamble, question] if i % 2 else [preamble]
        ids = np.concatenate([*parts, rng.integers(0, vocab, int(rng.integers(1, 24)))]).astype(np.int32)
        supervised = np.zeros(len(ids), bool)
        supervised[prefix - 4 if i % 3 == 0 else max(1, len(ids) - 6) :] = True  # some supervise a part of the preamble
        picture = Shown(("one", "one", "two")[i % 3]) if i < 3 else None
        made.append(Example(ids, supervised, f"made:{i}", picture=picture))
    made.append(Example(preamble.astype(np.int32), np.ones(prefix, bool), "made:prefix"))
    stranger = np.roll(made[0].ids, 5)
    stranger[0] = (preamble[0] + 1) % vocab
    return [*made, made[1], Example(stranger, made[0].supervised, "made:stranger", picture=Shown("three"))]


def run_packs(
    model: Llama, packs: Iterable[Pack], adapter: Adapter, loss: Loss = pack_loss, recompute: bool | str = False
) -> tuple[float, Tensor]:
    """One optimizer step's loss (a mean over supervised tokens) and the gradient of what is trained, as one vector."""
    packs = list(packs)
    supervised = sum(p.supervised for p in packs)
    for p in adapter.trainable.values():
        p.grad = None
    total = 0.0
    for pack in packs:
        ctx = model.context(pack.layout)
        rows = pack.read if loss is pack_loss else None  # a twin's last block runs for all tokens
        hidden = model.run(pack.tokens, ctx, recompute, rows)
        value = loss(model, pack, ctx, hidden[pack.read] if rows is None else hidden) / supervised
        if value.requires_grad:
            value.backward()
        total += value.item()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in adapter.trainable.values()]
    return total, torch.cat([g.flatten() for g in grads])


def packs_of(model: Llama, some: Sequence[Example], budget: int = 10_000, **options: Any) -> list[Pack]:
    """The examples packed as training packs them for this model and what is attached to it."""
    return plan_packs(some, budget=budget, needs=model.needs(), **options)


def padded(model: Llama, some: Sequence[Example], pad: int = 0) -> list[Pack]:
    """The plain formulation: every example in a row of its own, padded at its end to the longest."""
    longest = max(len(e.ids) for e in some)
    wide = []
    for e in some:
        gap = longest - len(e.ids)
        ids, supervised = np.pad(e.ids, (0, gap), constant_values=pad), np.pad(e.supervised, (0, gap))
        wide.append(Example(ids, supervised, e.source, picture=e.picture))
    return packs_of(model, wide, longest, max_rows=1, share=False)


def logits_of(model: Llama, tokens: Tensor, layout: Layout, adapters: tuple[str, ...] | None = None) -> Tensor:
    """Logits of every token of a row, without gradients."""
    with torch.no_grad():
        ctx = model.context(layout, adapters=adapters)
        return model.logits(model.run(tokens, ctx), ctx)


def sample_row(vocab: int = VOCAB, seed: int = 3) -> tuple[Tensor, Layout]:
    """A row of four segments, two of them behind a common one, which have an image; the fourth has none."""
    near = np.array([*[0] * 7, *[0, 0, 0, 4, 3, 2, 1, 0, 0, 0, 0], *[0, 4, 3, 2, 1], *[0, 4, 3, 2, 1, 0, 0, 0, 0]])
    seen = [Shown("one")] * 3 + [None]
    layout = Layout.of([7, 11, 5, 9], [-1, 0, 0, -1], answer_ends=near, pictures=seen)  # the third's answer is to come
    return torch.randint(0, vocab, (layout.tokens,), generator=torch.Generator().manual_seed(seed)), layout


def disturb(adapter: Adapter, seed: int = 1, std: float = 0.1) -> None:
    """Move everything trained away from where it started."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.trainable.values():
            p.add_(torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype) * std)


def relative(a: Tensor, b: Tensor) -> float:
    """Distance of two vectors over the length of the second."""
    return float((a - b).norm() / b.norm())


def snapshot(model: Llama) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {k: v.detach().clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}


def clone(model: Llama) -> Llama:
    """The same model in other storage."""
    return copy.deepcopy(model)
