"""Lit-LLaMA's and LitGPT's adapter, adapter_v2 and lora checkpoints.

Both keep q, k and v of a layer in one linear. Its rows are, by the linear's name:

    attn.c_attn   Lit-LLaMA: all of q, all of k, all of v; the rows of each head of q and k in another order, in pairs
    attn.attn     LitGPT before 0.5.5: for each group of query heads its q, then its k, then its v
    attn.qkv      LitGPT from 0.5.5: all of q, all of k, all of v

A LoRA there holds A (parts x rank, in) and B (rows of its parts, rank), the parts being those of q, k, v that have one.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convert_result import Refused, Result
from torch import Tensor

NAMES = {  # of the linears and norms of a layer; Lit-LLaMA's and LitGPT's differ, so one table serves both
    "attn.c_proj": "self_attn.o_proj",
    "attn.proj": "self_attn.o_proj",
    "mlp.c_fc1": "mlp.gate_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.c_fc2": "mlp.up_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
    "mlp.proj": "mlp.down_proj",
    "rms_1": "input_layernorm",
    "norm_1": "input_layernorm",
    "rms_2": "post_attention_layernorm",
    "norm_2": "post_attention_layernorm",
}
TOP = {"lm_head": "lm_head", "transformer.ln_f": "model.norm"}
PACKED = ("attn.c_attn", "attn.attn", "attn.qkv")
PARTS = ("q", "k", "v")
LIT_LLAMA_HEADS = {4096: 32, 5120: 40, 6656: 52, 8192: 64}
WRONG_ROWS = (
    "LitGPT from 0.5.5 takes the adapter's keys and values from other rows of its q, k, v linear than those of k and v "
    "(their order changed in that version, and the adapter still counts in the old one): no other tool computes that"
)


@dataclass(frozen=True)
class Sizes:
    """Heads of the base: of queries, of keys and values, and their width."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def rows(self) -> dict[str, int]:
        """Rows of q, k and v."""
        keys = self.kv_heads * self.head_dim
        return {"q": self.heads * self.head_dim, "k": keys, "v": keys}


def convert_lit(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], given: Namespace) -> Result:
    """Convert a checkpoint by what its tensors are called. Raises Refused."""
    named = {re.sub(r"^(_forward_module\.|_orig_mod\.|module\.)+", "", name): t for name, t in tensors.items()}
    if any(name.endswith((".lora_A", ".lora_B")) for name in named):
        return _lora(named, facts, given)
    if any(name.endswith((".adapter_wte.weight", ".gating_factor")) for name in named):
        return _adapter(named, facts, given)
    raise Refused(f"no adapter of Lit-LLaMA or LitGPT in it; its first tensor is {next(iter(named))[:80]!r}")


def _lora(tensors: dict[str, Tensor], facts: Mapping[str, Any], given: Namespace) -> Result:
    """y + (alpha / r) B A x, in PEFT's format."""
    alpha = facts.get("lora_alpha") if given.alpha is None else given.alpha
    if alpha is None:
        raise Refused("LoRA's alpha is not in the file: give --alpha (Lit-LLaMA's and LitGPT's scripts used 16)")
    found: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    file_rank, moved = 0, False
    for name in dict.fromkeys(name.rpartition(".lora_")[0] or name for name in tensors):
        A, B = (tensors.get(f"{name}.lora_{letter}") for letter in "AB")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or len(A) % B.shape[1]:
            raise Refused(f"{name[:80]}: there should be LoRA's A and B of a linear, and they are not")
        file_rank = file_rank or B.shape[1]
        layer, inner = _place(name)
        if inner in PACKED:
            split, moved = _split_lora(inner, A, B, facts, given)
            pairs = {f"{layer}.self_attn.{part}_proj": pair for part, pair in split.items()}
        else:
            pairs = {_module(layer, inner, name): (A, B)}
        for path, (a, b) in pairs.items():
            if len(a) != b.shape[1] or B.shape[1] != file_rank:
                raise Refused(f"{name}: ranks differ within the file; is the checkpoint whole?")
            found |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
            ranks[path.rpartition(".")[2]] = len(a)
    rank = min(ranks.values())
    other = {name: own for name, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha * rank / file_rank,  # the scale is alpha / r in the file and here
        "lora_dropout": facts.get("lora_dropout") or 0.0,
        "target_modules": sorted(ranks),
        "rank_pattern": other,
        "alpha_pattern": {name: alpha * own / file_rank for name, own in other.items()},
        "bias": "none",
        "inference_mode": True,
    }
    note = "this version of LitGPT put its update on rows of q, k and v alike; rewritten exactly, with a higher rank"
    return Result(peft=config, tensors=found, notes=(note,) if moved else ())


def _split_lora(
    inner: str, A: Tensor, B: Tensor, facts: Mapping[str, Any], given: Namespace
) -> tuple[dict[str, tuple[Tensor, Tensor]], bool]:
    """A and B of each of q, k, v, and whether they are of a higher rank than in the file."""
    rank, sizes = B.shape[1], _sizes(A.shape[1], inner, facts, given)
    parts = _parts(inner, len(A) // rank, len(B), sizes, facts, given)
    a = dict(zip(parts, A.split(rank), strict=True))
    b = dict(zip(parts, B.split([sizes.rows[part] for part in parts]), strict=True))
    if inner == "attn.c_attn":
        b = {part: rows if part == "v" else _in_halves(rows, sizes) for part, rows in b.items()}
    if inner != "attn.attn" or sizes.kv_heads == 1 or not (len(parts) == 3 or given.lit_gpt_2023):
        return {part: (a[part], b[part]) for part in parts}, False
    # Row x of all of q, all of k, all of v was added to row x of the linear, whose rows are in another order.
    starts = {"q": 0, "k": sizes.rows["q"], "v": sizes.rows["q"] + sizes.rows["k"]}
    wide = B.new_zeros(sum(sizes.rows.values()), len(A))
    for i, part in enumerate(parts):
        wide[starts[part] : starts[part] + len(b[part]), i * rank : (i + 1) * rank] = b[part]
    return {part: (A.clone(), rows) for part, rows in _unpack("attn.attn", wide, sizes).items()}, True


def _adapter(tensors: dict[str, Tensor], facts: Mapping[str, Any], given: Namespace) -> Result:
    """LLaMA-Adapter v1 and v2, in Tunesmith's own format."""
    gates = {name: t for name, t in tensors.items() if name.endswith(".gating_factor")}
    prompts = {name: t for name, t in tensors.items() if name.endswith(".adapter_wte.weight")}
    second = any(name.endswith(".adapter_scale") for name in tensors)
    litgpt = any(gate.ndim == 4 and gate.shape[2] > 1 for gate in gates.values())
    known = given.before_055 or "n_head" in facts or second
    if any(".attn.qkv." in name for name in tensors) or ("norm_qk" in facts and not given.before_055):
        raise Refused(f"{WRONG_ROWS}; train it again (LitGPT before 0.5.5 writes what can be converted)")
    if litgpt and not known:
        raise Refused(f"{WRONG_ROWS}; if this file is of an earlier version, say so with --before-0.5.5")
    if not prompts or not gates or any(t.ndim != 2 for t in prompts.values()):
        raise Refused("no prompts (adapter_wte.weight) or no gates (gating_factor) in it; is the checkpoint whole?")
    found = {}
    for name, prompt in prompts.items():
        found[f"{_place(name)[0]}.self_attn.mix.prompt"] = prompt
    for name, gate in gates.items():
        found[f"{_place(name)[0]}.self_attn.mix.gate"] = gate.flatten()
    widths = {tuple(t.shape) for t in prompts.values()}
    heads = {gate.numel() for gate in gates.values()}
    if len(widths) != 1 or len(heads) != 1 or len(prompts) != len(gates):
        raise Refused("its layers' prompts or gates differ in shape or number; is the checkpoint whole?")
    (length, hidden), count = widths.pop(), heads.pop()
    settings = {"layers": len(prompts), "prompt_length": length, "gate": "scalar" if count == 1 else "head"}
    rest = {name: t for name, t in tensors.items() if name not in prompts and name not in gates}
    if not second:
        if rest:
            raise Refused(f"{next(iter(rest))[:80]!r} belongs to no adapter that is known")
        return Result(kind="llama_adapter", settings=settings, tensors=found)
    facts = {**({"n_head": count} if count > 1 else {}), **facts}
    for name, tensor in rest.items():
        found |= _second(name, tensor, hidden, facts, given)
    return Result(kind="llama_adapter_v2", settings=settings, tensors=found)


def _second(name: str, tensor: Tensor, hidden: int, facts: Mapping[str, Any], given: Namespace) -> dict[str, Tensor]:
    """What version 2 adds: y = s (W x + b) on every linear, and the norms' weights."""
    path, _, what = name.rpartition(".")
    layer, inner = _place(path)
    if what in ("adapter_scale", "adapter_bias"):
        key = f"edit.{what.removeprefix('adapter_')}"
        if inner not in PACKED:
            return {f"{_module(layer, inner, name)}.{key}": tensor}
        split = _unpack(inner, tensor, _sizes(hidden, inner, facts, given))
        return {f"{layer}.self_attn.{part}_proj.{key}": rows for part, rows in split.items()}
    module = _module(layer, inner, name)
    if what not in ("scale", "weight") or not module.endswith("norm"):
        raise Refused(f"{name[:80]!r} belongs to no adapter that is known")
    return {f"{module}.weight": tensor}


def _place(name: str) -> tuple[str, str]:
    """The layer's path in Hugging Face's names (empty outside of layers), and the linear's or norm's name in it."""
    match = re.match(r"transformer\.h\.(\d+)\.((?:attn|mlp)\.\w+|\w+)", name)
    return (f"model.layers.{int(match[1])}", match[2]) if match else ("", name)


def _module(layer: str, inner: str, name: str) -> str:
    table = NAMES if layer else TOP
    if inner not in table:
        raise Refused(f"{name[:80]!r} belongs to no LLaMA that is known")
    return f"{layer}.{table[inner]}" if layer else table[inner]


def _sizes(hidden: int, inner: str, facts: Mapping[str, Any], given: Namespace) -> Sizes:
    """Heads of the base, from the options, from what lies beside the file, or (Lit-LLaMA) from its width."""
    mine = inner == "attn.c_attn"  # Lit-LLaMA knows four sizes, without grouped queries
    heads = given.heads or facts.get("n_head") or (LIT_LLAMA_HEADS.get(hidden) if mine else None)
    if not heads:
        raise Refused("how q, k and v lie in one linear depends on the heads of the base: give --heads and --kv-heads")
    kv_heads = given.kv_heads or (None if given.heads else facts.get("n_query_groups")) or heads
    head_dim = given.head_dim or facts.get("head_size") or hidden / heads
    if heads % kv_heads or head_dim % 2 or hidden % heads and not (given.head_dim or facts.get("head_size")):
        raise Refused(f"{heads:g} heads, {kv_heads:g} of keys, {head_dim:g} wide, cannot be those of the base")
    return Sizes(int(heads), int(kv_heads), int(head_dim))


def _parts(
    inner: str, count: int, rows: int, sizes: Sizes, facts: Mapping[str, Any], given: Namespace
) -> tuple[str, ...]:
    """Which of q, k, v have a LoRA."""
    choices = [PARTS, ("q", "k"), ("q", "v"), ("k", "v"), ("q",), ("k",), ("v",)]
    fitting = [p for p in choices if len(p) == count and sum(sizes.rows[part] for part in p) == rows]
    said = {"q": facts.get("lora_query"), "k": facts.get("lora_key"), "v": facts.get("lora_value")}
    if given.qkv:
        wanted = tuple(part for part in PARTS if part in given.qkv.split(","))
    elif None not in said.values():
        wanted = tuple(part for part in PARTS if said[part])
    else:
        wanted = ("q", "v") if inner == "attn.c_attn" and count == 2 else None
    if wanted is None and len(fitting) == 1:
        return fitting[0]
    if wanted is None and fitting:
        raise Refused("which of q, k, v its LoRA acts on is not in the file: give --qkv, such as --qkv q,v")
    if wanted not in fitting:
        on = f" on {', '.join(wanted)}" if wanted else ""
        raise Refused(
            f"{inner}: a LoRA{on} of {count} parts and {rows} rows does not fit {sizes.heads} heads, {sizes.kv_heads} "
            f"of keys and values, {sizes.head_dim} wide: give --heads, --kv-heads, --qkv"
        )
    return wanted


def _unpack(inner: str, packed: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    """The rows of q, k and v in Hugging Face's order, from those of the one linear."""
    if len(packed) != sum(sizes.rows.values()):
        raise Refused(
            f"{inner} has {len(packed)} rows, and {sizes.heads} heads, {sizes.kv_heads} of keys and values, "
            f"{sizes.head_dim} wide need {sum(sizes.rows.values())}: give --heads, --kv-heads, --head-dim"
        )
    if inner == "attn.attn":
        queries = sizes.heads // sizes.kv_heads
        groups = packed.unflatten(0, (sizes.kv_heads, queries + 2, sizes.head_dim))
        split = groups[:, :queries], groups[:, queries], groups[:, queries + 1]
        return {
            part: rows.reshape(sizes.rows[part], *packed.shape[1:]) for part, rows in zip(PARTS, split, strict=True)
        }
    split = dict(zip(PARTS, packed.split(list(sizes.rows.values())), strict=True))
    paired = PARTS[:2] if inner == "attn.c_attn" else ()
    return {part: _in_halves(rows, sizes) if part in paired else rows for part, rows in split.items()}


def _in_halves(rows: Tensor, sizes: Sizes) -> Tensor:
    """Lit-LLaMA rotates neighbours, (0, 1), (2, 3), ...; Hugging Face the two halves of a head."""
    return rows.unflatten(0, (-1, sizes.head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)
