"""Load base and adapter afresh and compute the probe's logits, in a child (child.py).

FOLDER/request.json says what to load, FOLDER/probe.safetensors holds the probe; the child writes answer.safetensors or
error.json there. A fresh process cannot lean on anything that the live model left in memory.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.adapters import open_method
from tunesmith.adapters.peft_format import load_adapter, read_info, use_attention
from tunesmith.errors import TunesmithError, VerificationError
from tunesmith.export.child import Child
from tunesmith.export.probe import Probe, image_tensors, logits_at, read_probe
from tunesmith.files import atomic_save_safetensors, atomic_write_json
from tunesmith.model.load import load_model
from tunesmith.model.quantize import quant_of


@dataclass(frozen=True)
class Request:
    """What to load: the base model's files, the adapter folder, in which dtype, where, with how many threads.

    `methods` are Python files that the user named to this process, and that the fresh one may therefore open.
    """

    base: str
    adapter: str
    dtype: str
    device: str
    threads: int
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """Logits (places, vocabulary) of the bare base and with the adapter."""

    base: Tensor
    adapted: Tensor


def replay(request: Request, probe: Probe) -> Answer:
    """Load the base, compute; load the adapter, compute again. Raises TunesmithError for what does not load."""
    for file in request.methods:
        open_method(file)
    dtype = getattr(torch, request.dtype)
    info = read_info(Path(request.adapter))
    quant = quant_of(info.identity, str(info.folder))
    model = load_model(Path(request.base), dtype=dtype, device=request.device, quant=quant)
    use_attention(info, model)  # the base's logits were made with it too
    bare = logits_at(model, probe, ())
    load_adapter(Path(request.adapter), model)
    return Answer(bare, logits_at(model, probe, None))


def fresh_process() -> Child:
    """A new Python process that can carry out `replay`, and is ready for it sooner the sooner it is started."""
    return Child("tunesmith.export.replay")


def replay_in_child(request: Request, probe: Probe, child: Child | None = None) -> Answer:
    """`replay` in a new Python process: `child`, if one is there already, which then ends.

    Raises VerificationError with the child's own one-line error.
    """
    with child or fresh_process() as child, tempfile.TemporaryDirectory(prefix="tunesmith-verify-") as name:
        folder = Path(name)
        atomic_write_json(folder / "request.json", asdict(request))
        live = torch.zeros(0) if probe.live is None else probe.live
        tensors = {"tokens": probe.tokens, "positions": probe.positions, "lengths": torch.tensor(probe.lengths)}
        tensors |= image_tensors(probe)
        atomic_save_safetensors(folder / "probe.safetensors", {**tensors, "live": live})
        code, last = child.ask(name)
        if (folder / "error.json").is_file():
            raise VerificationError(json.loads((folder / "error.json").read_text(encoding="utf-8"))["message"])
        if code or not (folder / "answer.safetensors").is_file():
            raise VerificationError(
                f"the fresh process ended with status {code} ({last[:200]}); if memory ran out, free some "
                "and run tunesmith verify again"
            )
        from safetensors.torch import load

        answer = load((folder / "answer.safetensors").read_bytes())
        return Answer(answer["base"], answer["adapted"])


def main(folder: Path) -> None:
    """The child: answer the request that lies in `folder`."""
    request = Request(**json.loads((folder / "request.json").read_text(encoding="utf-8")))
    torch.set_num_threads(max(1, min(request.threads, os.cpu_count() or 1)))
    try:
        answer = replay(request, read_probe(folder / "probe.safetensors"))
    except TunesmithError as error:
        atomic_write_json(folder / "error.json", {"message": str(error)})
        return
    atomic_save_safetensors(folder / "answer.safetensors", {"base": answer.base, "adapted": answer.adapted})
