"""Tunesmith's decoder, greedy, on the catalog's own file."""

from __future__ import annotations

from pathlib import Path

from bench.children.common import spec, tell, timed_decoding


def main() -> None:
    """Load, decode at every batch size, and tell."""
    wanted = spec()
    import torch

    from tunesmith.inference.generate import generate
    from tunesmith.inference.sample import GenerationSettings
    from tunesmith.model.load import load_model

    model = load_model(Path(wanted["model_path"]), dtype=getattr(torch, wanted["dtype"]))
    tell("loaded")

    def decode(prompts: list[list[int]], new: int) -> list[list[int]]:
        answers = generate(model, prompts, GenerationSettings(max_new_tokens=new), eos_ids=())
        return [list(answer.ids) for answer in answers]

    timed_decoding(wanted, decode)


if __name__ == "__main__":
    main()
