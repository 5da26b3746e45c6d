"""What every side of the serving bench is given: the model as a folder, LoRA adapters in PEFT's format, and prompts.

The adapters are drawn, not trained: what they cost is the same, and each answers otherwise.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

from bench.children.common import TARGETS, spec, tell
from bench.children.prepare import export
from tunesmith.adapters import attach, detach
from tunesmith.adapters.peft_format import save_adapter
from tunesmith.data.catalog import resolve_model
from tunesmith.files import atomic_folder
from tunesmith.hardware import describe
from tunesmith.inference.templates import base_template
from tunesmith.model.load import load_model, model_identity
from tunesmith.tokenizer import load_tokenizer

WORDS = "a long review of that quiet film which nobody saw but everyone talks about because it was made by hand".split()


def main() -> None:
    """Write them, and tell where they are."""
    wanted = spec()
    folder, path = Path(wanted["folder"]), resolve_model(wanted["model"])
    tokenizer = load_tokenizer(path)
    export(path, tokenizer, folder, [wanted["dtype"]])
    model = load_model(path)
    identity, template = model_identity(path), base_template(tokenizer).to_dict()
    for number in range(wanted["adapters"]):
        lora = {"kind": "lora", "rank": wanted["rank"], "target_modules": TARGETS["all"]}
        adapter = attach(model, lora, "made", seed=number)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in adapter.trainable.items():
                if name.endswith(".B"):
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.01)
        with atomic_folder(folder / f"adapter-{number}") as target:
            save_adapter(target, adapter, base=str(path), identity=identity, template=template,
                         tokenizer=tokenizer.fingerprint())  # fmt: skip
        detach(model, adapter)
    draws = random.Random(0)
    texts = [" ".join(draws.choices(WORDS, k=draws.randint(20, 120))) for _ in range(wanted["prompts"])]
    about = describe()
    packages = {name: about["packages"].get(name) for name in ("transformers", "peft")}
    versions = {"tunesmith": about["tunesmith"], "commit": about["revision"], "torch": torch.__version__, **packages}
    tell(
        "prepared", model_path=str(path), prompts=[tokenizer.encode(text) for text in texts],
        eos=list(tokenizer.eos_ids),
        about={"cpu": about["cpu"], "memory": about["memory"], "system": about["system"], "versions": versions},
    )  # fmt: skip


if __name__ == "__main__":
    main()
