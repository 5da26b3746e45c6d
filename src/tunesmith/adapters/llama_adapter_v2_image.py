"""LLaMA-Adapter v2 with images: the first layers see the image, the last ones the instruction   (arXiv:2304.15010).

    queries:   Z = first rows of T([Q; LN(W_v X + b)]),   V = LN(W_o Z + c)      X: the image's tokens, T: a transformer
    first layers (early fusion):   y + g * softmax(q (W_k V)^T / sqrt(head_dim)) W_v V,    g = 0 a head at the start
    last layers:                   LLaMA-Adapter's prompts, which know nothing of the image

So visual knowledge and instructions have parameters of their own in layers of their own. With `linears`, as in version
2, every norm is trained and every linear has a scale and a bias; without, nothing of the base's width is added. An
example without an image has no part in the first. T's blocks are x + A(LN(x)), x + M(LN(x)), M four times as wide, with
GELU; keys have no bias, which no softmax can see. The published code has W_v to 768, 8 blocks, 16 heads and 10 queries
of CLIP's tokens: vision_width: 768, vision_depth: 8, vision_heads: 16.

It cannot be merged, and PEFT has no such method.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.adapters.base import Delta, Placement
from tunesmith.adapters.llama_adapter import METHOD as TEXT
from tunesmith.adapters.llama_adapter import adapted_layers
from tunesmith.adapters.llama_adapter_image import attend_by_image
from tunesmith.adapters.llama_adapter_v2 import METHOD as V2
from tunesmith.adapters.llama_adapter_v2 import LlamaAdapterV2Settings
from tunesmith.adapters.seeing import Looking, Projection, TokenSettings, standardised
from tunesmith.config import STRICT
from tunesmith.errors import AdapterError, CannotMerge
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LlamaAdapterV2ImageSettings(TokenSettings, LlamaAdapterV2Settings):
    """Settings under `adapter:` for `kind: llama_adapter_v2_image`."""

    visual_layers: int | None = Field(
        default=None, ge=1, description="How many of the first layers see the image; none is all below `layers`."
    )
    queries: int = Field(default=10, ge=1, description="Rows that stand for an image in each of the first layers.")
    vision_width: int = Field(default=256, ge=1, description="Width of the transformer that makes them.")
    vision_depth: int = Field(default=2, ge=1, description="Its blocks.")
    vision_heads: int = Field(default=4, ge=1, description="Its heads.")
    linears: bool = Field(
        default=True, description="Train norms, and a scale and a bias on every linear, as version 2 does."
    )

    @model_validator(mode="after")
    def _divides(self) -> LlamaAdapterV2ImageSettings:
        if self.vision_width % self.vision_heads:
            raise ValueError(f"vision_width {self.vision_width} cannot be shared by {self.vision_heads} heads")
        return self


class VisionBlock(nn.Module):
    """x + A(LN(x)); x + M(LN(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.value, self.out = (Projection(width, width) for _ in range(3))
        self.key = nn.Parameter(Projection(width, width).weight.detach())
        self.up, self.down = Projection(width, 4 * width), Projection(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(images, rows, width) -> the same."""
        y = self.norm_1(x)
        parts = self.query(y), functional.linear(y, self.key), self.value(y)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class VisualQueries(Looking):
    """V, (images, queries, hidden), left for the deltas in the first layers."""

    def __init__(self, settings: LlamaAdapterV2ImageSettings, hidden: int) -> None:
        super().__init__(settings.looks[0])
        width = settings.vision_width
        self.inward = Projection(settings.looks[0].shape[-1], width)
        self.inward_norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(settings.queries, width))
        self.blocks = nn.ModuleList(VisionBlock(width, settings.vision_heads) for _ in range(settings.vision_depth))
        self.outward, self.outward_norm = Projection(width, hidden), nn.LayerNorm(hidden)

    def read(self, features: Tensor) -> Tensor:
        """(images, tokens, token_width) -> (images, queries, hidden)."""
        tokens = self.inward_norm(self.inward(standardised(features)))
        x = torch.cat([self.queries.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.outward_norm(self.outward(x[:, : len(self.queries)]))


class VisualAttention(Delta):
    """value + g * softmax(q k_V^T / sqrt(head_dim)) v_V on the heads of one Attention, for what sees an image."""

    def __init__(self, heads: int, note: str) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(heads))
        self.note = note  # of the delta that looks

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """The heads' output and the rotated queries `given`, both (tokens, heads, head_dim)."""
        if ctx.sight is None:
            return value
        groups, made = ctx.sight.groups(self.adapter), ctx.notes[self.note]
        prompts = made[groups.image].to(value.dtype)
        seen = attend_by_image(given, prompts, host, ctx.alone(self.adapter), groups)
        sees = (groups.image < len(made) - 1)[groups.place // groups.rows.shape[1]].to(value.dtype)
        return torch.addcmul(value, self.gate.to(value.dtype)[:, None], seen * sees[:, None, None])

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raises CannotMerge."""
        raise CannotMerge("what an image lets in depends on the image, and no weight of the base can hold it")


class LlamaAdapterV2Image:
    """The method of `kind: llama_adapter_v2_image`."""

    kind = "llama_adapter_v2_image"
    settings = LlamaAdapterV2ImageSettings
    learning_rate = 1e-3

    def trains_base(self, settings: LlamaAdapterV2ImageSettings) -> bool:
        """The norms, with `linears`."""
        return settings.linears

    def identity_at_init(self, settings: LlamaAdapterV2ImageSettings) -> bool:
        """With gates at zero, whatever the image."""
        return settings.init == "zero"

    def mergeable(self, settings: LlamaAdapterV2ImageSettings) -> bool:
        """No: it has attentions of its own."""
        return False

    def place(self, model: Llama, settings: LlamaAdapterV2ImageSettings) -> Iterator[Placement]:
        """What looks, at the embedding; the first layers; then version 2's, or LLaMA-Adapter's. Raises AdapterError."""
        config = model.config
        lowest = adapted_layers(config, settings.layers).start
        count = lowest if settings.visual_layers is None else settings.visual_layers
        if not 1 <= count <= lowest:
            raise AdapterError(
                f"adapter.visual_layers: {count} of the first layers, and {lowest} are left below the "
                f"{config.num_hidden_layers - lowest} with prompts; set adapter.layers lower"
            )
        looking = VisualQueries(settings, config.hidden_size)
        yield Placement("model", "embed", looking)
        for layer in range(count):
            delta = VisualAttention(config.num_attention_heads, looking.note)
            yield Placement(f"model.layers.{layer}.self_attn", "mix", delta)
        yield from (V2 if settings.linears else TEXT).place(model, settings)

    def unfreeze(self, model: Llama, settings: LlamaAdapterV2ImageSettings) -> Iterator[str]:
        """With `linears`, the weight of every norm."""
        return V2.unfreeze(model, settings) if settings.linears else iter(())

    def lr_scale(self, name: str, settings: LlamaAdapterV2ImageSettings) -> float:
        """One rate for all."""
        return 1.0


METHOD = LlamaAdapterV2Image()
