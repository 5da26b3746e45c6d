"""How storages lie in a safetensors file: bitsandbytes' serialised layout, and the same with our name for other codes.

    few bits   PATH.weight (packed)  PATH.weight.absmax  PATH.weight.quant_map  [.nested_absmax  .nested_quant_map]
               PATH.weight.quant_state.OWNER__KIND: JSON of block size, shape, dtype and nested offset, as bytes
    GPTQ       PATH.weight (packed)  PATH.weight.scales  PATH.weight.zeros  [.group]  and such a state, of our name
    8 bits     PATH.weight (int8)  PATH.SCB  PATH.weight_format

OWNER is bitsandbytes for its own codes, nf4 and fp4, and tunesmith for the others. `quantization_config` in config.json
says which it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.quant.codes import KINDS, find_code
from tunesmith.quant.double import NESTED_BLOCK
from tunesmith.quant.dynamic import dynamic_map
from tunesmith.quant.grouped import BITS, Grouped
from tunesmith.quant.storage import Blockwise, Int8, LlmInt8, Spec, Storage

_BITSANDBYTES = ("nf4", "fp4")
_STATE = ".quant_state."
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "scales", "zeros", "group")
_MOST_STATE = 4096


def to_tensors(name: str, packed: Tensor, storage: Storage) -> dict[str, Tensor]:
    """The tensors of a file that hold the weight called `name` (PATH.weight)."""
    if isinstance(storage, Int8):
        path = name.removesuffix(".weight")
        rows = torch.zeros((), dtype=torch.uint8)  # bitsandbytes' number for numbers that lie row by row
        return {name: packed, f"{path}.SCB": storage.absmax, f"{path}.weight_format": rows}
    if isinstance(storage, Grouped):
        said = {"quant_type": "gptq", "bits": storage.width, "shape": list(storage.shape)}
        tensors = {name: packed, f"{name}.scales": storage.scales, f"{name}.zeros": storage.zeros}
        tensors |= {} if storage.group is None else {f"{name}.group": storage.group}
        return {**tensors, f"{name}{_STATE}tunesmith__gptq": _as_bytes(said)}
    if not isinstance(storage, Blockwise):
        raise ModelError(f"{name}: {storage.kind} has no form in a safetensors file; choose nf4 or another code")
    state: dict[str, Any] = {
        "quant_type": storage.kind, "blocksize": storage.block, "dtype": "float32", "shape": list(storage.shape)
    }  # fmt: skip
    tensors = {name: packed, f"{name}.absmax": storage.absmax, f"{name}.quant_map": storage.table.clone()}
    if storage.nested is not None and storage.offset is not None and storage.nested_table is not None:
        tensors |= {
            f"{name}.nested_absmax": storage.nested,
            f"{name}.nested_quant_map": storage.nested_table.clone(),
        }
        offset = storage.offset.item()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    owner = "bitsandbytes" if storage.kind in _BITSANDBYTES else "tunesmith"
    return {**tensors, f"{name}{_STATE}{owner}__{storage.kind}": _as_bytes(state)}


def _as_bytes(state: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def quantization_config(spec: Spec, dtype: str) -> dict[str, Any]:
    """What config.json says of it, for transformers where bitsandbytes has such a code."""
    if spec.kind == "gptq":
        return {"quant_method": "tunesmith", "kind": "gptq"}
    if spec.kind in _BITSANDBYTES or spec.kind == "llm-int8":
        four = spec.kind in _BITSANDBYTES
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": ["lm_head"],
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "bnb_4bit_quant_type": spec.kind if four else "fp4",
            "bnb_4bit_use_double_quant": four and spec.double_quant,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
        }
    return {"quant_method": "tunesmith", **{key: getattr(spec, key) for key in ("kind", "block_size", "double_quant")}}


class Layout:
    """Which tensors of a file belong together, and what weights they hold.

    `shapes` are the stored ones by name and `read` gives a tensor as it is stored; `config` is `quantization_config`.
    Raises ModelError, one line, for a scheme that is not known and for parts that are missing or do not fit.
    """

    def __init__(
        self, config: Any, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], where: str
    ) -> None:
        self._read, self._where, self._stored = read, where, shapes
        self._eight = _eight_bits(config, where)
        self._parts: dict[str, list[str]] = {}
        for name in shapes:
            owner = _owner(name)
            if owner is not None and owner in shapes:
                self._parts.setdefault(owner, []).append(name)
        self.shapes = {name: self._shape(name, shapes) for name in self._parts}

    @property
    def companions(self) -> set[str]:
        """The names that are parts of a weight, not weights."""
        return {part for parts in self._parts.values() for part in parts}

    def parts(self, name: str) -> Iterable[str]:
        """The names of what belongs to the weight `name`."""
        return self._parts[name]

    def held(self, name: str) -> tuple[Tensor, Storage]:
        """The weight `name`: its packed numbers, and their storage."""
        packed, shape = self._read(name), self.shapes[name]
        if packed.dtype == torch.int8:
            absmax = self._part(name, "SCB", (shape[0],), torch.float32)
            return packed, (LlmInt8 if self._eight == "llm-int8" else Int8)(shape, absmax)
        state = self._state(name)
        if state["quant_type"] == "gptq":
            return packed.view(-1, 1), self._grouped(name, packed, state)
        kind, block = state["quant_type"], state["blocksize"]
        size = math.prod(shape)
        self._check(name, packed, (size * find_code(kind).bits // 8,), torch.uint8, flat=True)
        table = self._part(name, "quant_map", (2 ** find_code(kind).bits,), torch.float32)
        if not torch.equal(table.cpu(), find_code(kind).table()):
            raise self._bad(f"{name}.quant_map is not the code {kind}")
        if "nested_offset" not in state:
            absmax = self._part(name, "absmax", (size // block,), torch.float32)
            return packed.view(-1, 1), Blockwise(kind, shape, block, absmax)
        indices = self._part(name, "absmax", (size // block,), torch.uint8)
        nested = self._part(name, "nested_absmax", (-(-size // block // NESTED_BLOCK),), torch.float32)
        map_ = self._part(name, "nested_quant_map", (256,), torch.float32)
        if not torch.equal(map_.cpu(), torch.tensor(dynamic_map())) or state["nested_blocksize"] != NESTED_BLOCK:
            raise self._bad(f"{name}.nested_quant_map is not the dynamic map in blocks of {NESTED_BLOCK}")
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        return packed.view(-1, 1), Blockwise(kind, shape, block, indices, (nested, offset))

    def _grouped(self, name: str, packed: Tensor, state: Mapping[str, Any]) -> Storage:
        rows, columns = shape = self.shapes[name]
        self._check(name, packed, (rows * columns * state["bits"] // 8,), torch.uint8, flat=True)
        groups = self._stored.get(f"{name}.scales", (0, 0))[-1]
        if groups < 1 or columns % groups:
            raise self._bad(f"{name}.scales: {groups} groups do not divide {columns} columns")
        scales = self._part(name, "scales", (rows, groups), torch.float16)
        zeros = self._part(name, "zeros", (rows, groups), torch.uint8)
        group = None
        if f"{name}.group" in self._parts[name]:
            group = self._part(name, "group", (columns,), torch.int32)
            if int(group.min()) < 0 or int(group.max()) >= groups:
                raise self._bad(f"{name}.group names a group that is not there")
        return Grouped(shape, state["bits"], scales, zeros, group)

    def _shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        if any(part.endswith(".SCB") for part in self._parts[name]):
            if self._eight is None:
                raise self._bad(f"{name} is stored in 8 bits, which quantization_config does not say")
            found = shapes[name]
        else:
            found = tuple(self._state(name)["shape"])
        if len(found) != 2:
            raise self._bad(f"{name} has shape {list(found)}, a quantized weight has two dimensions")
        return found[0], found[1]

    def _state(self, name: str) -> dict[str, Any]:
        """The JSON beside a weight, its values checked."""
        found = [part for part in self._parts[name] if _STATE in part]
        if len(found) != 1:
            raise self._bad(f"{name} has {len(found)} quant_state tensors, not one")
        raw = self._read(found[0])
        try:
            if raw.dtype != torch.uint8 or raw.numel() > _MOST_STATE:
                raise ValueError("no JSON")
            state = json.loads(bytes(raw.flatten().tolist()))
            kind, shape = state["quant_type"], state["shape"]
            block = state["bits" if kind == "gptq" else "blocksize"]
            whole = [n for n in (block, *shape) if type(n) is int and n > 0]
            if len(whole) != 1 + len(shape) or "nested_offset" in state and not math.isfinite(state["nested_offset"]):
                raise ValueError("sizes that are none")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._bad(f"{found[0]} cannot be read ({type(error).__name__})") from None
        if kind == "gptq" and block not in BITS:
            raise self._bad(f"{name} has numbers of {block} bits; known: {', '.join(map(str, BITS))}")
        if kind not in (*KINDS, "gptq") or not found[0].endswith(f"__{kind}"):
            raise self._bad(f"{name} is of the code {str(kind)[:40]!r}; known: {', '.join(KINDS)}")
        if math.prod(shape) % (8 if kind == "gptq" else block):
            raise self._bad(f"{name}: blocks of {block} do not divide its {' x '.join(map(str, shape))} weights")
        return dict(state)

    def _part(self, name: str, part: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        full = f"{name.removesuffix('.weight')}.SCB" if part == "SCB" else f"{name}.{part}"
        if full not in self._parts[name]:
            raise self._bad(f"{full} is missing")
        tensor = self._read(full)
        self._check(full, tensor, shape, dtype)
        if dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
            raise self._bad(f"{full} holds NaN or infinity")
        return tensor

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, flat: bool = False) -> None:
        found = (tensor.numel(),) if flat else tuple(tensor.shape)
        if found != shape or tensor.dtype != dtype:
            was, due = f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} {list(shape)}"
            raise self._bad(f"{name} is {was}, not {due}".replace("torch.", ""))

    def _bad(self, what: str) -> ModelError:
        return ModelError(f"{self._where}: {what}; the file is damaged, or quantized by a tool that is not known")


def _owner(name: str) -> str | None:
    """The weight that a tensor of this name would belong to, or None."""
    weight, state, _ = name.partition(_STATE)
    if state and weight.endswith(".weight"):
        return weight
    path, _, part = name.rpartition(".")
    if part in ("SCB", "weight_format"):
        return f"{path}.weight"
    return path if part in _PARTS and path.endswith(".weight") else None


def _eight_bits(config: Any, where: str) -> str | None:
    """How 8-bit weights of the file multiply: llm-int8, int8, or None where it has none. Raises ModelError."""
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method == "bitsandbytes" or (isinstance(config, dict) and method is None and "load_in_4bit" in config):
        return "llm-int8" if config.get("load_in_8bit") else None
    if method == "tunesmith":
        return "int8" if config.get("kind") == "int8" else None
    raise ModelError(
        f"{where}: quantization_config.quant_method {str(method)[:40]!r} is not supported; known: bitsandbytes, "
        "tunesmith; use the unquantized original, Tunesmith quantizes by itself"
    )
