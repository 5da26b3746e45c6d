"""The LLaMA family in one file: LLaMA 1-3, Mistral, Qwen2, Qwen3 and kin, told apart by fields of ModelConfig.

    h = embed(tokens)
    for each block:   h = h + attention(norm(h));   h = h + mlp(norm(h))
    logits = lm_head(norm(h))

Tokens of all segments lie end to end in one row; there is no batch dimension and no padding, and a `Layout` says who
sees whom. Parameters carry Hugging Face's names, in memory as on disk. Every value that a method may edit passes
through a `Seam`, which is the identity until something is attached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.errors import ModelError
from tunesmith.model.attention import attend
from tunesmith.model.cache import Cache
from tunesmith.model.config import ModelConfig
from tunesmith.model.fused import rms_norm, rotate, swiglu
from tunesmith.model.gated import gated_mlp
from tunesmith.model.layout import Layout
from tunesmith.model.linear import Linear
from tunesmith.model.recompute import run_block
from tunesmith.model.seam import Context, Seam
from tunesmith.model.sparse import Pattern, evaluated
from tunesmith.model.token_step import TokenStep
from tunesmith.model.virtual import VIRTUAL, Needs, make_context

HEAD_ROWS = 256  # rows of logits that exist at once: 256 x 49,152 in float32 are 50 MB; half of it is slower


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in float32   (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.edit = Seam()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(..., size) -> (..., size)."""
        y = rms_norm(x, self.weight, self.eps)
        return self.edit(y, self, ctx, x) if len(self.edit) else y


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Seams: `past` edits (k, v) before attention; `mix` edits the heads' output (tokens, heads, head_dim) before o_proj
    and is given q with its rotary embedding.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.index, self.heads, self.kv_heads, self.head_dim = index, heads, kv_heads, width
        self.window = config.sliding_window if index in config.window_layers else None
        self.q_proj = Linear(config.hidden_size, heads * width, config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_heads * width, config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_heads * width, config.qkv_bias)
        self.o_proj = Linear(heads * width, config.hidden_size, config.o_bias)
        self.q_norm = RMSNorm(width, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(width, config.rms_norm_eps) if config.qk_norm else None
        self.past, self.mix = Seam(whole=True), Seam()

    def forward(self, x: Tensor, ctx: Context, end: Context | None = None) -> Tensor:
        """(tokens, hidden_size) -> (tokens, hidden_size); with `end`, of its rows only."""
        q = self.q_proj(x, ctx).view(-1, self.heads, self.head_dim)
        k = self.k_proj(x, ctx).view(-1, self.kv_heads, self.head_dim)
        v = self.v_proj(x, ctx).view(-1, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, ctx), self.k_norm(k, ctx)
        q, k = rotate(q, ctx.cos, ctx.sin), rotate(k, ctx.cos, ctx.sin)
        if len(self.past):
            k, v = self.past((k, v), self, ctx)
        if ctx.cache is None:
            out = attend(q, k, v, ctx.layout, self.window, ctx.pattern, dropout=ctx.dropout)
        else:
            out = ctx.cache.attend(self.index, q, k, v, ctx.layout, self.window, ctx.pattern)
        if len(self.mix):
            out = self.mix(out, self, ctx, q)
        return self.o_proj(_cut(out, end).flatten(1), end or ctx)


def _cut(value: Tensor, end: Context | None) -> Tensor:
    """The rows that `end` is for; all without it."""
    return value if end is None or end.rows is None else value.index_select(0, end.rows)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))   (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(tokens, hidden_size) -> (tokens, hidden_size)."""
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        if ctx.kept is None and all(linear.bare for linear in linears):
            gate, up, down = ((linear.weight, linear.quant) for linear in linears)
            y = gated_mlp(x, gate, up, down)
            if y is not None:
                return y
        return self.down_proj(swiglu(self.gate_proj(x, ctx), self.up_proj(x, ctx)), ctx)


class Block(nn.Module):
    """One decoder layer.

    Seams: `after_attn` and `after_mlp` edit what is added to the residual and are given the sub-layer's input;
    `resid` edits the residual stream at the block's end.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.after_attn, self.after_mlp, self.resid = Seam(), Seam(), Seam()
        self.token_step = TokenStep(self)

    @property
    def ends_plainly(self) -> bool:
        """Is down_proj's product only added to the residual, so that no gradient depends on its value?"""
        return not (len(self.mlp.down_proj.edit) or len(self.after_mlp) or len(self.resid))

    def forward(self, h: Tensor, ctx: Context, end: Context | None = None) -> Tensor:
        """(tokens, hidden_size) -> (tokens, hidden_size).

        With `end`, a context for some of the tokens, the result is theirs only: what stands behind attention, most of
        the work, is then done for them alone.
        """
        if ctx.cache is not None and not torch.compiler.is_compiling():
            out = self.token_step(h, ctx)
            if out is not None:
                return out
        x = self.input_layernorm(h, ctx)
        out = self.self_attn(x, ctx, end)
        if end is not None:
            h, x, ctx = _cut(h, end), _cut(x, end), end
        h = h + self.after_attn(out, self, ctx, x)
        x = self.post_attention_layernorm(h, ctx)
        h = h + self.after_mlp(self.mlp(x, ctx), self, ctx, x)
        return self.resid(h, self, ctx)


class Decoder(nn.Module):
    """Embedding, blocks and final norm: Hugging Face's `model.` prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Not nn.Embedding(...): its random start on the meta device imports torch._dynamo, over a second.
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embed = Seam(whole=True)


class Llama(nn.Module):
    """A decoder-only language model over flat rows.

    Build it with `load_model`, or on the meta device from a ModelConfig.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.pattern: Pattern | None = None  # sparse attention; None is full
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Where the configuration ties them, let head and embedding be the same Parameter."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream: the embedding's."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the embedding lies."""
        return self.model.embed_tokens.weight.device

    def context(
        self,
        layout: Layout,
        cache: Cache | None = None,
        adapters: tuple[str, ...] | None = None,
        routes: Sequence[tuple[str, ...]] | None = None,
        dropout: float = 0.0,
    ) -> Context:
        """What the edits of this batch may know.

        `adapters`: those that act on every segment (None: all attached). `routes`: instead, those that act on each
        segment of `layout`; a segment's must be its parent's. Raises ModelError where they differ. `dropout`: of
        attention's probabilities.
        """
        ctx = make_context(self, layout, cache, adapters, routes)
        pattern = self.pattern if self.training else evaluated(self.pattern)
        if pattern is not None and cache is None:
            size, layers = self.config.sliding_window, self.config.window_layers
            pattern.prepare(ctx.layout, {size if i in layers else None for i in range(len(self.model.layers))})
        return replace(ctx, pattern=pattern, dropout=dropout)

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        *,
        cache: Cache | None = None,
        adapters: tuple[str, ...] | None = None,
        recompute: bool | str = False,
    ) -> Tensor:
        """Hidden states after the final norm, (tokens, hidden_size), for token ids (tokens,).

        `cache`: see `Cache`. `adapters`: the attached adapters that act (None: all, (): the bare base). `recompute`:
        keep only the blocks' inputs for the backward and run each block again there, or their products too
        ("selective"): see recompute.py.
        """
        ctx = self.context(layout, cache, adapters)
        return self.run(tokens, ctx, recompute)

    def embedded(self, tokens: Tensor, ctx: Context) -> Tensor:
        """What the first block gets, (virtual tokens + tokens, hidden_size). Infix tokens are the ids below 0."""
        h = functional.embedding(tokens.clamp(min=0) if self.needs().infix else tokens, self.model.embed_tokens.weight)
        if ctx.extra:
            h = torch.cat([h.new_zeros(ctx.extra, h.shape[1]), h])
            tokens = torch.cat([tokens.new_full((ctx.extra,), VIRTUAL), tokens])
        return self.model.embed(h, self.model, ctx, tokens) if len(self.model.embed) else h

    def run(self, tokens: Tensor, ctx: Context, recompute: bool | str = False, rows: Tensor | None = None) -> Tensor:
        """`forward` with a context already made, for callers that need it again for `logits`.

        `rows` (m,), distinct and in order: only these tokens' states are wanted, (m, hidden_size), by a caller without
        a cache. The last block is then run for them alone where attention no longer needs the others.
        """
        h = self.embedded(tokens, ctx)
        end = ctx if rows is None else ctx.only(rows)
        *blocks, last = cast(Iterable[Any], self.model.layers)
        for layer in blocks:
            h = run_block(layer, h, ctx, recompute)
        h = run_block(last, h, ctx, recompute, None if rows is None else end)
        if ctx.cache is not None:
            ctx.cache.advance()
        h = self.model.norm(h, end)
        return h[ctx.extra :] if rows is None else h

    def needs(self, adapters: tuple[str, ...] | None = None) -> Needs:
        """What these attached adapters (None: all) must find in every row that they act on."""
        deltas = [delta for name, delta in self.model.embed.items() if adapters is None or name in adapters]
        return Needs(
            ends=max((getattr(delta, "answer_ends", 0) for delta in deltas), default=0),
            infix=max((getattr(delta, "infix_tokens", 0) for delta in deltas), default=0),
            looks=tuple(dict.fromkeys(look for delta in deltas for look in getattr(delta, "looks", ()))),
        )

    def logits(self, hidden: Tensor, ctx: Context) -> Tensor:
        """(n, hidden_size) -> (n, vocab_size), in float32 (float64 stays).

        `hidden` holds all of the caller's tokens, in order; for some of them, and with routes, give `ctx.at(rows)`.
        """
        if ctx.by_row and ctx.rows is None:
            if len(hidden) != ctx.layout.tokens - ctx.extra:
                raise ModelError(f"logits of {len(hidden)} tokens with routes: say which they are, with ctx.at(rows)")
            ctx = ctx.at(torch.arange(len(hidden), device=hidden.device))
        logits = self.lm_head(hidden, ctx)
        return logits if logits.dtype == torch.float64 else logits.float()

    def logits_in_parts(self, hidden: Tensor, ctx: Context) -> Iterator[tuple[slice, Tensor]]:
        """The logits of HEAD_ROWS rows at a time, with which rows they are: those of all rows never exist together."""
        for start in range(0, len(hidden), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            yield rows, self.logits(hidden[rows], ctx)
