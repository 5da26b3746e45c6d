"""LLaMA-Adapter with images: what a frozen encoder sees is added to every prompt   (arXiv:2303.16199, section 3.3).

    I = W [I_1; ...; I_M] + b         I_m: the image's global features at scale m, each brought to mean 0, deviation 1
    P_l <- P_l + I                    to each of the K rows, in every adapted layer; the rest is LLaMA-Adapter

So the projection W, which all layers share, and the prompts are let in by the same gates, which start at zero: with or
without an image, the model is at the start exactly what it was. An example without an image has P_l alone. That each
scale is brought to one size first is our own: an encoder's layers differ in size by orders of magnitude.

LLaMA-7B, K = 10: 409,920 parameters for every ten adapted layers, and the projection: 4,096 (sum of widths + 1).
It cannot be merged, and PEFT has no such method.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tunesmith.adapters.base import Placement
from tunesmith.adapters.llama_adapter import METHOD as TEXT
from tunesmith.adapters.llama_adapter import LlamaAdapterSettings, PromptAttention, keys_and_values
from tunesmith.adapters.seeing import Looking, Projection, ScaleSettings, standardised
from tunesmith.config import STRICT
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context
from tunesmith.model.sight import Groups, Look


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LlamaAdapterImageSettings(ScaleSettings, LlamaAdapterSettings):
    """Settings under `adapter:` for `kind: llama_adapter_image`: those of LLaMA-Adapter, and the encoder's."""


class GlobalFeatures(Looking):
    """I = W [I_1; ...; I_M] + b, (images, hidden), left for the deltas in the layers."""

    def __init__(self, look: Look, widths: tuple[int, ...], hidden: int) -> None:
        super().__init__(look)
        self.widths = widths
        self.projection = Projection(sum(widths), hidden)

    def read(self, features: Tensor) -> Tensor:
        """(images, sum of widths) -> (images, hidden)."""
        return self.projection(torch.cat([standardised(scale) for scale in features.split(self.widths, -1)], -1))


class ImagePromptAttention(PromptAttention):
    """LLaMA-Adapter's, with the image's vector added to each row of the prompt."""

    def __init__(self, prompt: Tensor, gate: Tensor, kind: str, note: str) -> None:
        super().__init__(prompt, gate, kind, "")
        self.note = note  # of the delta that looks

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """The heads' output and the rotated queries `given`, both (tokens, heads, head_dim)."""
        if ctx.sight is None:
            return super().forward(value, host, ctx, given)
        groups = ctx.sight.groups(self.adapter)
        images = ctx.notes[self.note][groups.image]  # (groups, hidden)
        prompts = (self.prompt + images[:, None]).to(value.dtype)
        return self.let_in(value, attend_by_image(given, prompts, host, ctx.alone(self.adapter), groups))


def attend_by_image(q: Tensor, prompts: Tensor, host: nn.Module, own: Context, groups: Groups) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, every query over the prompt of its own group: (tokens, heads, head_dim).

    q: (tokens, heads, head_dim); prompts: (groups, rows, hidden).
    """
    k, v = (x.unflatten(0, prompts.shape[:2]) for x in keys_and_values(prompts.flatten(0, 1), host, own))
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q[groups.rows].unflatten(2, (k.shape[2], -1)).to(wide)  # (groups, longest, kv_heads, of each, head_dim)
    scores = torch.einsum("glnhd,gpnd->glnhp", grouped * q.shape[-1] ** -0.5, k.to(wide))
    seen = torch.einsum("glnhp,gpnd->glnhd", scores.softmax(-1).to(v.dtype), v)
    return seen.flatten(2, 3).flatten(0, 1)[groups.place]


class LlamaAdapterImage:
    """The method of `kind: llama_adapter_image`."""

    kind = "llama_adapter_image"
    settings = LlamaAdapterImageSettings
    learning_rate = 1e-2

    def identity_at_init(self, settings: LlamaAdapterImageSettings) -> bool:
        """With gates at zero, whatever the image."""
        return settings.init == "zero"

    def mergeable(self, settings: LlamaAdapterImageSettings) -> bool:
        """No: it is an attention of its own."""
        return False

    def place(self, model: Llama, settings: LlamaAdapterImageSettings) -> Iterator[Placement]:
        """One delta at the embedding, which looks, and one in each of the top layers. Raises AdapterError."""
        looking = GlobalFeatures(settings.looks[0], tuple(settings.widths or ()), model.config.hidden_size)
        yield Placement("model", "embed", looking)
        for placement in TEXT.place(model, settings):
            plain = placement.delta
            if isinstance(plain, PromptAttention):
                delta = ImagePromptAttention(plain.prompt.detach(), plain.gate.detach(), plain.kind, looking.note)
                yield Placement(placement.path, placement.seam, delta)

    def unfreeze(self, model: Llama, settings: LlamaAdapterImageSettings) -> Iterator[str]:
        """Nothing of the base."""
        return iter(())

    def lr_scale(self, name: str, settings: LlamaAdapterImageSettings) -> float:
        """One rate for all."""
        return 1.0


METHOD = LlamaAdapterImage()
