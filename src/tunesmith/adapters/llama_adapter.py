"""LLaMA-Adapter: prompts of its own in each of the top layers, let in by a gate that starts at zero (arXiv:2303.16199).

    y = SDPA(q, k, v) + g * softmax(q (W_k P)^T / sqrt(head_dim)) W_v P,    then o_proj

P holds `prompt_length` rows of the hidden size in each layer, drawn from N(0, 1). Two softmaxes, so with g = 0 the
model is exactly what it was: at the start P has no gradient, and g has. P's keys get no rotary embedding, since a
prompt stands nowhere; where the model has a norm on its keys (Qwen3), P's keys pass it too, because q is on that scale.
P goes through the base's k_proj and v_proj, biases included, and this adapter's own edits of them (LLaMA-Adapter v2's),
never another adapter's. Query heads that share a key/value head share P's as well.

    gate: head     g, one for each head        30 layers of LLaMA-7B: 30 (10 4096 + 32) = 1,229,760 parameters
    gate: tanh     tanh(g), one for each head: the authors' training code
    gate: scalar   g, one for each layer: Hugging Face PEFT, 1,228,830 parameters

`init: random` starts with g = 1 (the paper's ablation). It cannot be merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tunesmith.adapters import peft_config as peft
from tunesmith.adapters.base import Adapter, Delta, Placement
from tunesmith.config import STRICT
from tunesmith.errors import AdapterError, CannotExchange, CannotMerge
from tunesmith.model.config import ModelConfig
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context

# gate -> what is done to it before it multiplies
GATES: dict[str, Callable[[Tensor], Tensor]] = {"head": lambda g: g, "tanh": torch.tanh, "scalar": lambda g: g}
UNTOUCHED = 2  # of the lowest layers, where the settings do not say: 30 of LLaMA-7B's 32 are adapted


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LlamaAdapterSettings:
    """Settings under `adapter:` for `kind: llama_adapter`."""

    layers: int | None = Field(
        default=None, ge=1, description="How many of the top layers; none is all but the lowest two."
    )
    prompt_length: int = Field(default=10, ge=1, description="Rows of the prompt in each layer.")
    gate: Literal["head", "tanh", "scalar"] = Field(
        default="head", description="One gate a head, its tanh, or one a layer (as in PEFT)."
    )
    init: Literal["zero", "random"] = Field(default="zero", description="Gates start at 0, or at 1 (an ablation).")

    @model_validator(mode="after")
    def _reachable(self) -> LlamaAdapterSettings:
        if self.init == "random" and self.gate == "tanh":
            raise ValueError("init: random starts the gates at 1, which tanh never reaches; use gate head or scalar")
        return self


class PromptAttention(Delta):
    """value + gate * softmax(q k_P^T / sqrt(head_dim)) v_P on the heads of one Attention.

    `peft_fault` says why PEFT would compute something else with it, or is empty.
    """

    def __init__(self, prompt: Tensor, gate: Tensor, kind: str, peft_fault: str) -> None:
        super().__init__()
        self.prompt, self.gate = nn.Parameter(prompt), nn.Parameter(gate)
        self.kind, self.peft_fault = kind, peft_fault

    def forward(self, value: Tensor, host: Any, ctx: Context, given: Tensor) -> Tensor:
        """The heads' output and the rotated queries `given`, both (tokens, heads, head_dim)."""
        k, v = keys_and_values(self.prompt.to(value.dtype), host, ctx.alone(self.adapter))
        return self.let_in(value, attend_to_prompt(given, k, v))

    def let_in(self, value: Tensor, seen: Tensor) -> Tensor:
        """value + gate * seen."""
        return torch.addcmul(value, GATES[self.kind](self.gate).to(value.dtype)[:, None], seen)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raises CannotMerge."""
        raise CannotMerge(
            "LLaMA-Adapter adds an attention of its own beside that of the base, which no weight of the base can hold: "
            "keep the adapter beside its base"
        )


def keys_and_values(prompt: Tensor, host: Any, own: Context) -> tuple[Tensor, Tensor]:
    """What an Attention's projections make of prompts (rows, hidden): (rows, kv_heads, head_dim) each, not rotated."""
    k = host.k_proj(prompt, own).view(-1, host.kv_heads, host.head_dim)
    v = host.v_proj(prompt, own).view(-1, host.kv_heads, host.head_dim)
    return k if host.k_norm is None else host.k_norm(k, own), v


def attend_to_prompt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v: every query sees the whole prompt.

    q: (tokens, heads, head_dim); k, v: (prompt, kv_heads, head_dim). Returns (tokens, heads, head_dim).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1)).to(wide)  # (tokens, kv_heads, heads of each, head_dim)
    scores = torch.einsum("tngd,pnd->tngp", grouped / math.sqrt(q.shape[-1]), k.to(wide))
    return torch.einsum("tngp,pnd->tngd", scores.softmax(-1).to(v.dtype), v).flatten(1, 2)


class LlamaAdapter:
    """The method of `kind: llama_adapter`."""

    kind = "llama_adapter"
    settings = LlamaAdapterSettings
    learning_rate = 1e-2
    peft_type = "ADAPTION_PROMPT"

    def identity_at_init(self, settings: LlamaAdapterSettings) -> bool:
        """With gates at zero."""
        return settings.init == "zero"

    def mergeable(self, settings: LlamaAdapterSettings) -> bool:
        """No: it is an attention of its own."""
        return False

    def place(self, model: Llama, settings: LlamaAdapterSettings) -> Iterator[Placement]:
        """One delta in each of the top layers. Raises AdapterError for more layers than there are."""
        config = model.config
        gates = 1 if settings.gate == "scalar" else config.num_attention_heads
        fault = peft_fault(config, settings.gate)
        for layer in adapted_layers(config, settings.layers):
            prompt = torch.randn(settings.prompt_length, config.hidden_size)
            gate = torch.full((gates,), float(settings.init == "random"))
            delta = PromptAttention(prompt, gate, settings.gate, fault)
            yield Placement(f"model.layers.{layer}.self_attn", "mix", delta)

    def unfreeze(self, model: Llama, settings: LlamaAdapterSettings) -> Iterator[str]:
        """Nothing of the base."""
        return iter(())

    def lr_scale(self, name: str, settings: LlamaAdapterSettings) -> float:
        """One rate for all."""
        return 1.0

    def to_peft(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`. Raises CannotExchange where PEFT would compute something else."""
        tensors, fault = {}, ""
        for place, delta in adapter.deltas.items():
            if isinstance(delta, PromptAttention):
                path, fault = place.removesuffix(".mix"), delta.peft_fault
                tensors[f"{path}.adaption_prompt"], tensors[f"{path}.adaption_gate"] = delta.prompt[None], delta.gate
        if fault:
            raise CannotExchange(fault)
        return {
            "target_modules": "self_attn",
            "adapter_len": adapter.settings.prompt_length,
            "adapter_layers": len(adapter.deltas),
        }, tensors

    def from_peft(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Llama, where: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`."""
        peft.check_keys(config, ("adapter_len", "adapter_layers"), (), where, target_modules=("self_attn",))
        if fault := peft_fault(model.config, "scalar"):
            raise CannotExchange(f"{where}: {fault}")
        length, count = (peft.whole(config, key, where) for key in ("adapter_len", "adapter_layers"))
        paths = [f"model.layers.{layer}.self_attn" for layer in adapted_layers(model.config, count, where)]
        found = peft.plain_keys(tensors, where)
        expected: dict[str, tuple[int, ...]] = {}
        for path in paths:
            expected[f"{path}.adaption_prompt"] = (1, length, model.config.hidden_size)
            expected[f"{path}.adaption_gate"] = (1,)
        peft.check_tensors(expected, found, where)
        state = {}
        for path in paths:
            state[f"{path}.mix.prompt"] = found[f"{path}.adaption_prompt"][1][0]
            state[f"{path}.mix.gate"] = found[f"{path}.adaption_gate"][1]
        return {"layers": count, "prompt_length": length, "gate": "scalar"}, state


def adapted_layers(config: ModelConfig, wanted: int | None, where: str = "adapter.layers") -> range:
    """The top `wanted` layers; None is all but the lowest two, and one at least. Raises AdapterError for too many."""
    count = config.num_hidden_layers
    top = max(1, count - UNTOUCHED) if wanted is None else wanted
    if top > count:
        raise AdapterError(f"{where}: {top} of the top layers, and this model has {count}")
    return range(count - top, count)


def peft_fault(config: ModelConfig, gate: str) -> str:
    """Why PEFT's ADAPTION_PROMPT computes something else, or nothing at all, with this model and gate; else empty."""
    if gate != "scalar":
        return f"PEFT's ADAPTION_PROMPT has one gate a layer and no gate: {gate}; train with gate: scalar for PEFT"
    if config.model_type not in ("llama", "mistral"):
        return f"PEFT's ADAPTION_PROMPT knows llama and mistral models, and this is a {config.model_type} model"
    if config.o_bias:
        return "PEFT's ADAPTION_PROMPT adds the bias of o_proj, which this model has, a second time"
    if config.hidden_size != config.num_attention_heads * config.head_dim:
        return (
            "PEFT's ADAPTION_PROMPT takes hidden_size / num_attention_heads for the width of a head, which is "
            f"{config.head_dim} in this model"
        )
    return ""


METHOD = LlamaAdapter()
