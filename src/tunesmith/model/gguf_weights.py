"""The weights of a GGUF file under Hugging Face's names, dequantized a piece at a time.

Types that a storage of ours knows are read by it (several times as fast), the others by the gguf library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tunesmith.errors import ModelError
from tunesmith.model.config import ModelConfig
from tunesmith.model.gguf_file import QUANT_TYPES, GgufFile, GgufTensor
from tunesmith.model.product import dense
from tunesmith.quant.ggml import KINDS as GGML_KINDS
from tunesmith.quant.ggml import Ggml
from tunesmith.quant.storage import Storage

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"
# The gguf library works on 16 rows at once: rows of this many weights keep numpy busy (9,000-weight groups take 3 times
# as long) and the float32 scratch at a few MiB.
_ROW = 32768


def hf_name(name: str) -> str | None:
    """Return Hugging Face's name of a GGUF tensor, or None where it has none."""
    if name in _WHOLE:
        return _WHOLE[name]
    match = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER:
        return None
    return f"model.layers.{int(match[1])}.{_LAYER[match[2]]}.{match[3]}"


def gguf_name(name: str) -> str:
    """Return the GGUF name of one of `ModelConfig.weight_shapes`' tensors."""
    for ours, theirs in _WHOLE.items():
        if theirs == name:
            return ours
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{next(ours for ours, theirs in _LAYER.items() if theirs == module)}.{kind}"


class GgufWeights:
    """Config, shapes and tensors of a GGUF file; see `load.Weights`."""

    kind = "gguf"
    keeps = "Q4_0, Q4_1 and Q8_0"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        try:
            self._read_config()
        except ModelError:
            self.close()
            raise

    def _read_config(self) -> None:
        metadata = self.file.metadata
        parts = metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise ModelError(f"{self.path}: one of {parts} parts; join them with `llama-gguf-split --merge` first")
        if metadata.get("general.type", "model") != "model":
            raise ModelError(f"{self.path}: holds {str(metadata['general.type'])[:60]!r}, not a model")
        freqs = self.file.tensors.get(_ROPE_FREQS)
        factors = None if freqs is None else _dequantize(self.file, freqs, torch.float32).reshape(-1).tolist()
        shapes = {name: tensor.shape for name, tensor in self.file.tensors.items()}
        self.config = ModelConfig.from_gguf(metadata, str(self.path), tensors=shapes, rope_freqs=factors)
        self._names = {hf_name(name) or name: name for name in shapes if name != _ROPE_FREQS}
        self.shapes = {name: shapes[theirs] for name, theirs in self._names.items()}
        # llama.cpp rotates neighbouring pairs where Hugging Face rotates halves; its converter reorders the rows of
        # q and k of the llama architecture (only) so that both mean the same.
        self._interleaved = metadata["general.architecture"] == "llama"

    def close(self) -> None:
        """Unmap the file."""
        self.file.close()

    @cached_property
    def quantized(self) -> frozenset[str]:
        """The weights that a storage can keep as they are, for `held`."""
        return frozenset(
            name
            for name, theirs in self._names.items()
            if len(self.shapes[name]) == 2 and self.file.tensors[theirs].quant_name in GGML_KINDS
        )

    def held(self, name: str) -> tuple[torch.Tensor, Storage]:
        """Return a weight's own blocks, (rows, bytes of a row), and their storage. Raises ModelError for NaN scales."""
        packed, storage = self._packed(name)
        if not bool(torch.isfinite(storage.scales(packed)).all()):
            raise ModelError(f"{self.path}: {name} holds NaN or infinity; the file is damaged")
        return packed, storage

    def _packed(self, name: str) -> tuple[torch.Tensor, Ggml]:
        tensor = self.file.tensors[self._names[name]]
        rows, columns = tensor.shape
        packed = torch.from_numpy(self.file.raw(tensor).copy()).view(rows, -1)
        return self._in_halves(name, packed).contiguous(), Ggml(tensor.quant_name, (rows, columns))

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return one tensor in `dtype`, under its Hugging Face name."""
        if name in self.quantized:
            return dense(*self._packed(name), dtype)  # what is not finite is looked for in the result
        return self._in_halves(name, _dequantize(self.file, self.file.tensors[self._names[name]], dtype))

    def _in_halves(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """q's and k's rows (of weights, or of their packed bytes) in Hugging Face's order."""
        if self._interleaved and (".q_proj." in name or ".k_proj." in name):
            heads = self.config.num_attention_heads if ".q_proj." in name else self.config.num_key_value_heads
            return halves_from_pairs(tensor, heads)
        return tensor

    def sample(self, name: str) -> tuple[str, bytes]:
        """Return (stored type, a few of its bytes)."""
        tensor = self.file.tensors[self._names[name]]
        raw = self.file.raw(tensor)
        middle = tensor.size // 2
        return tensor.quant_name, b"".join(raw[at : at + 64].tobytes() for at in (0, middle, max(0, tensor.size - 64)))


def halves_from_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder q's or k's rows (weight or bias) from llama.cpp's rotary pairs to Hugging Face's rotary halves."""
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _dequantize(file: GgufFile, tensor: GgufTensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(tensor.shape, dtype=dtype)
    flat = out.view(-1)
    at = 0
    for piece in _pieces(file, tensor):
        flat[at : at + piece.size].copy_(torch.from_numpy(piece))
        at += piece.size
    return out


def _pieces(file: GgufFile, tensor: GgufTensor) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
    """Yield the tensor's weights in order, in float32."""
    name, block, width = QUANT_TYPES[tensor.quant]
    quant = gguf.GGMLQuantizationType[name]
    raw = file.raw(tensor).reshape(-1, width)
    row = max(1, _ROW // block)
    for start in range(0, len(raw), 16 * row):
        piece = raw[start : start + 16 * row]
        rows = len(piece) // row if len(piece) % row == 0 else 1
        with np.errstate(all="ignore"):  # NaN and infinity are looked for in the result
            values = gguf.dequantize(piece.reshape(rows, -1), quant).reshape(-1)
        yield values if values.flags.writeable else values.copy()  # torch warns of read-only memory
