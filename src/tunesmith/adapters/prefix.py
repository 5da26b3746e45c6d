"""Prefix tuning: trained keys and values that every layer sees before every example   (arXiv:2101.00190).

    attention of layer l:   softmax(q [K_l; K]^T / sqrt(head_dim)) [V_l; V],    K_l, V_l: (virtual_tokens, kv_dim)

They stand at positions 0 to V - 1 as keys in a cache do: no norm and no rotary embedding is applied to them, and an
example's first token is at position V. 2 L V kv_dim values in all. Each layer starts at what its own projections make
of tokens drawn from the vocabulary (or of `init_text`): real tokens are the paper's advice. With `init: normal`, it
starts at N(0, 0.02^2). With `reparam` they are the output of a network that is dropped when the adapter is saved:

    [K_l, V_l] = U_l tanh(D E + c) + u_l,     E: (V, kv_dim), D: (reparam, kv_dim), U_l: (2 kv_dim, reparam)

Never the identity: even zeros take their share of the softmax. Never mergeable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional

from tunesmith.adapters import peft_config as peft
from tunesmith.adapters.base import Adapter, Delta, Placement
from tunesmith.adapters.starts import StartSettings, start_ids, with_ids
from tunesmith.config import STRICT
from tunesmith.errors import AdapterError, CannotMerge
from tunesmith.model.cache import Cache
from tunesmith.model.config import ModelConfig
from tunesmith.model.layout import Layout
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Context

Pair = tuple[Tensor, Tensor]  # keys and values
STD = 0.02  # of `init: normal`


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrefixSettings(StartSettings):
    """Settings under `adapter:` for `kind: prefix`."""

    reparam: int | None = Field(
        default=None, ge=1, description="Hidden width of a network that makes keys and values in training; none: no."
    )

    @model_validator(mode="after")
    def _random(self) -> PrefixSettings:
        if self.reparam is not None and any(x is not None for x in (self.init, self.init_text, self.init_ids)):
            raise ValueError("with reparam they start at random; leave out init, init_text and init_ids")
        return self


class PrefixTokens(Delta):
    """Asks for the virtual tokens. What they are at the embedding is seen by nobody."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.virtual_tokens = count

    def forward(self, value: Tensor, host: nn.Module, ctx: Context, given: Tensor) -> Tensor:
        """(tokens, hidden), unchanged."""
        return value


class PrefixDelta(Delta):
    """Replaces keys and values of the virtual tokens in one Attention."""

    def pair(self) -> Pair:
        """Keys and values, each (V, kv_heads, head_dim)."""
        raise NotImplementedError

    def forward(self, value: Pair, host: nn.Module, ctx: Context, given: None) -> Pair:
        """Keys, rotated, and values, each (tokens, kv_heads, head_dim)."""
        rows = ctx.virtual.get(self.adapter)
        if rows is None:  # a step of generation: they are in the cache
            return value
        at, (k, v) = rows.flatten(), (part.to(value[0].dtype).repeat(len(rows), 1, 1) for part in self.pair())
        return value[0].index_copy(0, at, k), value[1].index_copy(0, at, v)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Raises CannotMerge."""
        raise CannotMerge(
            "prefix tuning adds keys and values, which no weight of the base can hold: keep it beside its base"
        )


class PlainPrefix(PrefixDelta):
    """`key` and `value`, (V, kv_heads, head_dim), themselves are trained."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)

    def pair(self) -> Pair:
        """See PrefixDelta."""
        return self.key, self.value


class MadePrefix(PrefixDelta):
    """U tanh(D E + c) + u, where the layers have `trunk`, tanh(D E + c), in common."""

    def __init__(self, trunk: Trunk, heads: int, head_dim: int) -> None:
        super().__init__()
        self.trunk, self.shape = trunk, (2, heads, head_dim)
        self.up, self.bias = _linear(2 * heads * head_dim, len(trunk.down))

    def pair(self) -> Pair:
        """See PrefixDelta."""
        both = functional.linear(self.trunk(), self.up, self.bias).unflatten(1, self.shape)
        return both[:, 0], both[:, 1]


class Trunk(nn.Module):
    """tanh(D E + c), (V, width)."""

    def __init__(self, count: int, size: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(count, size))
        self.down, self.bias = _linear(width, size)

    def forward(self) -> Tensor:
        """(V, width)."""
        return torch.tanh(functional.linear(self.rows, self.down, self.bias))


def _linear(out: int, inside: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias as torch's own Linear starts them: uniform, up to 1 / sqrt(inside)."""
    bound = 1 / math.sqrt(inside)
    weight, bias = torch.empty(out, inside), torch.empty(out)
    return nn.Parameter(weight.uniform_(-bound, bound)), nn.Parameter(bias.uniform_(-bound, bound))


class Prefix:
    """The method of `kind: prefix`."""

    kind = "prefix"
    settings = PrefixSettings
    learning_rate = 3e-2
    peft_type = "PREFIX_TUNING"

    def identity_at_init(self, settings: PrefixSettings) -> bool:
        """No: even zeros are seen."""
        return False

    def mergeable(self, settings: PrefixSettings) -> bool:
        """No: they are keys and values, not weights."""
        return False

    def with_ids(self, settings: PrefixSettings, encode: Callable[[str], Sequence[int]]) -> PrefixSettings:
        """See `Worded`."""
        return with_ids(settings, encode)

    def place(self, model: Llama, settings: PrefixSettings) -> Iterator[Placement]:
        """One delta at the embedding and one in each layer. Raises AdapterError for a start out of the vocabulary."""
        yield Placement("model", "embed", PrefixTokens(settings.virtual_tokens))
        for layer, delta in enumerate(_deltas(model, settings)):
            yield Placement(f"model.layers.{layer}.self_attn", "past", delta)

    def unfreeze(self, model: Llama, settings: PrefixSettings) -> Iterator[str]:
        """Nothing of the base."""
        return iter(())

    def lr_scale(self, name: str, settings: PrefixSettings) -> float:
        """One rate for all."""
        return 1.0

    def to_peft(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`. A network that made keys and values is dropped: what it makes is saved."""
        pairs = [delta.pair() for delta in adapter.deltas.values() if isinstance(delta, PrefixDelta)]
        heads, width = pairs[0][0].shape[1:]
        return {
            "num_virtual_tokens": adapter.settings.virtual_tokens,
            "token_dim": heads * width,
            "num_attention_heads": heads,
            "num_layers": len(pairs),
            "num_transformer_submodules": 1,
            "encoder_hidden_size": heads * width,
            "prefix_projection": False,
            "modules_to_save": None,
        }, {peft.PROMPT: torch.cat([part.flatten(1) for pair in pairs for part in pair], dim=1)}

    def from_peft(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Llama, where: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`. With prefix_projection too, the file holds what the network made and not the network."""
        layers, heads, width = _sizes(model.config)
        due = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * width}
        peft.check_keys(config, ("num_virtual_tokens", *due), _STARTS, where, num_transformer_submodules=(1,))
        for key, size in due.items():
            if config.get(key) not in (None, size):
                raise AdapterError(
                    f"{where}: {key}={str(config[key])[:60]!r}, and this model has {size}; give its base"
                )
        count = peft.whole(config, "num_virtual_tokens", where)
        found = peft.plain_keys(tensors, where)
        peft.check_tensors({peft.PROMPT: (count, 2 * layers * heads * width)}, found, where, "")
        pairs = found[peft.PROMPT][1].view(count, layers, 2, heads, width)
        return {"virtual_tokens": count}, {
            f"model.layers.{layer}.self_attn.past.{name}": pairs[:, layer, i]
            for layer in range(layers)
            for i, name in enumerate(("key", "value"))
        }


def _deltas(model: Llama, settings: PrefixSettings) -> Iterator[PrefixDelta]:
    """One for each layer."""
    layers, heads, width = _sizes(model.config)
    if settings.reparam is not None:
        trunk = Trunk(settings.virtual_tokens, heads * width, settings.reparam)
        yield from (MadePrefix(trunk, heads, width) for _ in range(layers))
    elif settings.init == "normal":
        drawn = (torch.randn(2, settings.virtual_tokens, heads, width) * STD for _ in range(layers))
        yield from (PlainPrefix(both[0], both[1]) for both in drawn)
    else:
        yield from (PlainPrefix(*pair) for pair in keys_and_values(model, start_ids(model, settings)))


# Keys of adapter_config.json that say only where keys and values started, or what made them in training.
_STARTS = frozenset("prefix_projection encoder_hidden_size init_weights".split())


@torch.no_grad()
def keys_and_values(model: Llama, ids: Tensor) -> list[Pair]:
    """What the bare base leaves of these tokens in its cache: of each layer, both (tokens, kv_heads, head_dim)."""
    layers, *shape = _sizes(model.config)
    if model.device.type == "meta":
        empty = torch.empty(len(ids), *shape, device="meta")
        return [(empty, empty)] * layers
    cache = Cache(model.config, 1, len(ids), model.dtype, model.device)
    model(ids.to(model.device), Layout.single(len(ids), model.device), cache=cache, adapters=())
    held = zip(cache.keys, cache.values, strict=True)
    return [(key[0].transpose(0, 1).float(), value[0].transpose(0, 1).float()) for key, value in held]


def _sizes(config: ModelConfig) -> tuple[int, int, int]:
    """Layers, key/value heads of a layer, values of a head."""
    return config.num_hidden_layers, config.num_key_value_heads, config.head_dim


METHOD = Prefix()
