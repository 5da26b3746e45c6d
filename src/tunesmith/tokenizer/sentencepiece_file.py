"""Just enough of sentencepiece's model format (sentencepiece_model.proto, in protobuf's wire format) to write one.

    ModelProto { repeated Piece pieces = 1; TrainerSpec trainer = 2; NormalizerSpec normalizer = 3 }

A GGUF file keeps a sentencepiece vocabulary as three arrays. Written back as a model, the sentencepiece library itself
tokenizes with it. Protobuf merges repeated submessages, so appending a field to a model changes it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

# Piece types; GGUF uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# NormalizerSpec { add_dummy_prefix = 3: false }
WITHOUT_PREFIX = b"\x1a\x02\x18\x00"


def write_model(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], *, prefix: bool) -> bytes:
    """Return a BPE model with these pieces, in order of their ids; `prefix`: a space is put before every text."""
    out = bytearray()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        text = token.encode()
        piece = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
        out += b"\x0a" + _varint(len(piece)) + piece
    trainer = _number(3, 2) + _number(35, BYTE in types) + _number(40, _first(types, UNKNOWN))
    trainer += _number(41, -1) + _number(42, -1) + _number(43, -1)  # BOS, EOS, PAD are our own business
    normalizer = b"\x0a\x08identity" + _number(3, prefix) + _number(4, 0) + _number(5, 1)
    return bytes(out) + b"\x12" + _varint(len(trainer)) + trainer + b"\x1a" + _varint(len(normalizer)) + normalizer


def _first(types: Sequence[int], kind: int) -> int:
    return types.index(kind) if kind in types else 0


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
