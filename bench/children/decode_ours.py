"""Tunesmith's decoder, greedy, on the catalog's own file, loaded as `tunesmith generate` loads it."""

from __future__ import annotations

from bench.children.common import spec, tell, timed_decoding


def main() -> None:
    """Load, decode at every batch size, and tell."""
    wanted = spec()
    from tunesmith import api
    from tunesmith.inference.generate import generate
    from tunesmith.inference.sample import GenerationSettings

    model = api.load(wanted["model_path"], dtype=wanted["dtype"], device="cpu", as_stored=True).model
    tell("loaded")

    def decode(prompts: list[list[int]], new: int) -> list[list[int]]:
        answers = generate(model, prompts, GenerationSettings(max_new_tokens=new), eos_ids=())
        return [list(answer.ids) for answer in answers]

    timed_decoding(wanted, decode)


if __name__ == "__main__":
    main()
