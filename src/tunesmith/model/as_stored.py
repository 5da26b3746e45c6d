"""A loaded model's weights, put back into the blocks of the GGUF file that they came from: less to read for each token.

    dense, float32: 4 bytes a weight        Q4_1: 0.625        Q8_0: 1.06

An answer is made a token at a time, and each token reads every weight, so a CPU answers at the speed of its memory. The
blocks stand for the very numbers that the dense weights are, and few_rows.cpp multiplies with them as they are.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from tunesmith.model.gguf_weights import GgufWeights
from tunesmith.model.linear import Linear
from tunesmith.model.llama import Llama
from tunesmith.model.load import open_weights
from tunesmith.model.native import kernels_for

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def hold_as_stored(model: Llama, path: Path, changed: Collection[str] = ()) -> int:
    """Hold every linear that is stored in such blocks in them, those `changed` since excepted; returns how many.

    A tied head reads blocks of its own, and the embedding stays dense. Nothing is done (0) where no kernel reads
    blocks: off the CPU, without a compiler, in other precisions than float32 and bfloat16.
    """
    if kernels_for(model.model.norm.weight) is None:
        return 0
    weights = open_weights(path)
    try:
        if not isinstance(weights, GgufWeights):
            return 0
        wide = torch.promote_types(model.dtype, torch.float32)
        count = 0
        for name, module in model.named_modules():
            if not isinstance(module, Linear) or module.quant is not None or module.in_features % 32:
                continue
            stored = _stored_as(f"{name}.weight", weights)
            if stored is None or {f"{name}.weight", stored} & set(changed):
                continue
            module.hold(*weights.held(stored), wide)
            count += 1
        return count
    finally:
        weights.close()


def _stored_as(name: str, weights: GgufWeights) -> str | None:
    """The name under which a weight's blocks lie in the file; a tied head's are the embedding's."""
    if name == HEAD and weights.config.tie_word_embeddings and HEAD not in weights.shapes:
        name = EMBEDDING
    return name if name in weights.quantized else None
