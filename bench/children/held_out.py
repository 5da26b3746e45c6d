"""Held-out loss of saved adapters: every side's adapter in one float32 model, on the same rows, by one function."""

from __future__ import annotations

from pathlib import Path

from bench.children.common import IGNORE, read_examples, spec, tell


def main() -> None:
    """Measure each adapter folder of the specification (None: the bare base) and tell."""
    wanted = spec()
    import numpy as np
    import torch

    from tunesmith.adapters import detach
    from tunesmith.adapters.peft_format import load_adapter
    from tunesmith.data.encode import Example
    from tunesmith.errors import TunesmithError
    from tunesmith.evaluate.language_model import language_model_metrics
    from tunesmith.model.load import load_model

    rows = [
        Example(np.array(row["ids"], np.int32), np.array([i != IGNORE for i in row["labels"]]), "held out")
        for row in read_examples(wanted["held"])
    ]
    model = load_model(Path(wanted["model_path"]), dtype=torch.float32)
    for folder in wanted["adapters"]:
        adapter = None
        try:
            if folder is not None:
                adapter = load_adapter(Path(folder), model)
            measured = language_model_metrics(model, rows, budget=2048)
            tell("held_out", folder=folder, loss=measured["eval_loss"])
        except TunesmithError as error:
            tell("held_out", folder=folder, loss=None, error=str(error))
        finally:
            if adapter is not None:
                detach(model, adapter)


if __name__ == "__main__":
    main()
