"""Write the weighted sum of several adapters as one adapter folder, held against them before it is kept:

sum -> write -> load in a fresh process -> logits equal those of the parts attached together with their weights
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tunesmith.adapters import Adapter
from tunesmith.adapters.combine import combine, weighted
from tunesmith.adapters.outside import opened_files
from tunesmith.adapters.peft_format import AdapterInfo, read_info, save_adapter
from tunesmith.errors import ConfigError, VerificationError
from tunesmith.export.checks import TOLERANCE
from tunesmith.export.probe import built_in_rows, logits_at, make_probe
from tunesmith.export.replay import Request, replay, replay_in_child
from tunesmith.files import atomic_folder
from tunesmith.model.llama import Llama
from tunesmith.tokenizer import Tokenizer

NAME = "combined"


def write_combined(
    model: Llama,
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    infos: Mapping[str, AdapterInfo],
    out: Path,
    *,
    base: Path,
    tokenizer: Tokenizer,
    identity: Mapping[str, Any],
    named: str,
    fresh: bool = True,
) -> dict[str, Any]:
    """Write the sum of `adapters` (attached to `model`, in float32) with `weights` to `out`; says what was checked.

    `infos` are the parts' own, `base` the base's files, `named` what a user calls it. Template and notes are the first
    part's. `fresh=False` checks in this process. Raises AdapterError; ConfigError for an `out` that is there;
    VerificationError where what was written computes something else: it is not kept.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} is there already; choose another folder")
    probe = make_probe(built_in_rows(tokenizer, model.config))
    with weighted(adapters, weights):
        expected = logits_at(model, probe, tuple(weights))
    combined = combine(model, adapters, weights, NAME)
    first = next(iter(infos.values()))
    with atomic_folder(out) as folder:
        save_adapter(
            folder,
            combined,
            base=named,
            identity=identity,
            template=first.template,
            tokenizer=tokenizer.fingerprint(),
            attention=model.pattern.settings if model.pattern else None,
            notes={"combined": {str(infos[key].folder): weight for key, weight in weights.items()}},
        )
        tokenizer.save(folder)
        info = read_info(folder)
        methods = tuple(map(str, opened_files()))
        dtype = str(model.dtype).removeprefix("torch.")
        request = Request(str(base), str(folder), dtype, str(model.device), torch.get_num_threads(), methods)
        answer = (replay_in_child if fresh else replay)(request, probe)
        off = float((answer.adapted - expected).abs().max() / expected.abs().max())
        if not off <= TOLERANCE[dtype]:
            raise VerificationError(
                f"{out}: its logits are {off:.1e} of the largest from those of its parts, and it was not kept; combine "
                "them again, and if that does not help, attach the parts instead"
            )
    others = [key for key, other in infos.items() if other.template != first.template]
    return {
        "method": combined.kind,
        "format": "PEFT" if info.peft else "tunesmith",
        "parameters": info.parameters,
        "parts": {str(infos[key].folder): weight for key, weight in weights.items()},
        "off_by": off,
        "places": int(expected.shape[0]),
        "template": f"of {first.folder}; others have another" if others else "as in every part",
    }
