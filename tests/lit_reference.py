"""What Lit-LLaMA and LitGPT compute with an adapter, written out in plain torch from their layouts and formulas.

One linear holds q, k and v. Its rows, by layout:

    lit-llama    all of q, all of k, all of v; in each head of q and k the two halves are interleaved into pairs
    litgpt-0.4   for each group: its q heads, its k, its v
    litgpt-2023  the same; LoRA's update was laid over the rows as if they were all of q, all of k, all of v
    litgpt-0.5.5 all of q, all of k, all of v
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tunesmith.model.config import ModelConfig

LLAMA_NAMES = {"qkv": "attn.c_attn", "o": "attn.c_proj", "gate": "mlp.c_fc1", "up": "mlp.c_fc2", "down": "mlp.c_proj"}
GPT_NAMES = {"qkv": "attn.attn", "o": "attn.proj", "gate": "mlp.fc_1", "up": "mlp.fc_2", "down": "mlp.proj"}
NAMES = {
    "lit-llama": LLAMA_NAMES,
    "litgpt-0.4": GPT_NAMES,
    "litgpt-2023": GPT_NAMES,
    "litgpt-0.5.5": {**GPT_NAMES, "qkv": "attn.qkv"},
}
NORMS = {
    "lit-llama": ("rms_1.scale", "rms_2.scale", "transformer.ln_f.scale"),
    "litgpt-0.4": ("norm_1.weight", "norm_2.weight", "transformer.ln_f.weight"),
}


@dataclass
class Lit:
    """A model in one of the layouts; `w` are its weights in Hugging Face's names, `state` the adapter's checkpoint."""

    layout: str
    config: ModelConfig
    w: dict[str, Tensor]
    state: dict[str, Tensor]
    alpha: float = 16.0
    enabled: str = "qv"
    edit: Callable[[int, Tensor], Tensor] = lambda layer, x: x  # of what leaves a block

    def logits(self, tokens: Tensor) -> Tensor:
        """(tokens,) -> (tokens, vocabulary), causal."""
        names, c = NAMES[self.layout], self.config
        norms = NORMS.get(self.layout, NORMS["litgpt-0.4"])
        x = self.w["model.embed_tokens.weight"][tokens]
        for i in range(c.num_hidden_layers):
            lit, hf = f"transformer.h.{i}.", f"model.layers.{i}."
            x = x + self.attention(
                i, self.norm(x, lit + norms[0], hf + "input_layernorm.weight"), lit + names["qkv"], lit + names["o"]
            )
            h = self.norm(x, lit + norms[1], hf + "post_attention_layernorm.weight")
            gate = self.linear(h, lit + names["gate"], self.w[hf + "mlp.gate_proj.weight"])
            up = self.linear(h, lit + names["up"], self.w[hf + "mlp.up_proj.weight"])
            x = x + self.linear(functional.silu(gate) * up, lit + names["down"], self.w[hf + "mlp.down_proj.weight"])
            x = self.edit(i, x)
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return self.linear(self.norm(x, norms[2], "model.norm.weight"), "lm_head", head)

    def norm(self, x: Tensor, lit: str, hf: str) -> Tensor:
        weight = self.state.get(lit, self.w[hf])
        return weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.config.rms_norm_eps)

    def linear(self, x: Tensor, name: str, weight: Tensor) -> Tensor:
        """W x with what the checkpoint adds to it."""
        y = x @ weight.T
        if f"{name}.lora_A" in self.state:
            A, B = self.state[f"{name}.lora_A"], self.state[f"{name}.lora_B"]
            add = self.qkv_lora(x, A, B) if name.endswith((".c_attn", ".attn", ".qkv")) else x @ A.T @ B.T
            y = y + add * (self.alpha / B.shape[1])
        if f"{name}.adapter_scale" in self.state:
            y = self.state[f"{name}.adapter_scale"] * (y + self.state[f"{name}.adapter_bias"])
        return y

    def qkv_lora(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """A convolution with a group for each of the parts that have a LoRA, laid over the rows."""
        sizes = self.sizes()
        rows = [sizes["qkv".index(part)] for part in self.enabled]
        after = (x @ A.T).split(B.shape[1], dim=-1)
        update = torch.cat([a @ b.T for a, b in zip(after, B.split(rows), strict=True)], dim=-1)
        out = x.new_zeros(len(x), sum(sizes))
        out[:, self.rows_of_update()] = update
        return out

    def rows_of_update(self) -> Tensor:
        """Which rows of the one linear the rows of the update are added to."""
        sizes, hs = self.sizes(), self.config.head_dim
        per_group = self.config.num_attention_heads // self.config.num_key_value_heads + 2
        whole = torch.arange(sum(sizes))
        if self.layout == "litgpt-0.4" and len(self.enabled) < 3:
            place = whole // hs % per_group
            kinds = {"q": place < per_group - 2, "k": place == per_group - 2, "v": place == per_group - 1}
            return torch.cat([whole[kinds[part]] for part in self.enabled])
        starts = {"q": 0, "k": sizes[0], "v": sizes[0] + sizes[1]}
        return torch.cat([whole[starts[p] : starts[p] + sizes["qkv".index(p)]] for p in self.enabled])

    def attention(self, i: int, x: Tensor, qkv: str, o: str) -> Tensor:
        """Causal attention, and the adapter's over its own prompt."""
        c, hf, n = self.config, f"model.layers.{i}.self_attn.", len(x)
        packed = self.packed(*(self.w[f"{hf}{p}_proj.weight"] for p in "qkv"))
        q, k, v = self.heads(self.linear(x, qkv, packed))
        q, k = self.rotate(q), self.rotate(k)
        mask = torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)
        y = (q @ k.mT / c.head_dim**0.5 + mask).softmax(-1) @ v
        gate = self.state.get(f"transformer.h.{i}.attn.gating_factor")
        if gate is not None:
            prompt = self.state[f"transformer.h.{i}.attn.adapter_wte.weight"]
            _, ak, av = self.heads(self.linear(prompt, qkv, packed))
            y = y + gate.reshape(-1, 1, 1) * ((q @ ak.mT / c.head_dim**0.5).softmax(-1) @ av)
        return self.linear(y.transpose(0, 1).reshape(n, -1), o, self.w[f"{hf}o_proj.weight"])

    def sizes(self) -> tuple[int, int, int]:
        """Rows of q, k, v."""
        keys = self.config.num_key_value_heads * self.config.head_dim
        return self.config.num_attention_heads * self.config.head_dim, keys, keys

    def packed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The one linear's weight, as each tool's converter builds it from Hugging Face's."""
        c = self.config
        if self.layout == "lit-llama":
            pair: Callable[[Tensor], Tensor] = lambda w: (  # noqa: E731
                w.view(c.num_attention_heads, 2, c.head_dim // 2, -1).transpose(1, 2).reshape(w.shape)
            )
            return torch.cat([pair(q), pair(k), v])
        if self.layout == "litgpt-0.5.5":
            return torch.cat([q, k, v])
        groups = c.num_key_value_heads
        parts = [part.view(groups, -1, c.head_dim, part.shape[1]) for part in (q, k, v)]
        return torch.cat(parts, dim=1).reshape(-1, q.shape[1])

    def heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as (heads, tokens, head_dim), keys and values repeated for each query head."""
        c, n = self.config, len(y)
        queries = c.num_attention_heads // c.num_key_value_heads
        if self.layout in ("litgpt-0.4", "litgpt-2023"):
            groups = y.view(n, c.num_key_value_heads, queries + 2, c.head_dim)
            q, k, v = groups[:, :, :queries].flatten(1, 2), groups[:, :, queries], groups[:, :, queries + 1]
        else:
            q, k, v = (part.view(n, -1, c.head_dim) for part in y.split(self.sizes(), dim=-1))
        k, v = k.repeat_interleave(queries, 1), v.repeat_interleave(queries, 1)
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding: neighbours in Lit-LLaMA, the two halves of a head in LitGPT."""
        half = x.shape[-1] // 2
        theta = 1.0 / self.config.rope_theta ** (torch.arange(0, 2 * half, 2).float() / (2 * half))
        angle = torch.outer(torch.arange(x.shape[1]).float(), theta)  # in float32, as all of them have it
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        pairs = self.layout == "lit-llama"
        a, b = (x[..., 0::2], x[..., 1::2]) if pairs else (x[..., :half], x[..., half:])
        turned = a * cos - b * sin, b * cos + a * sin
        return torch.stack(turned, dim=-1).flatten(-2) if pairs else torch.cat(turned, dim=-1)
