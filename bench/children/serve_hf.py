"""transformers and PEFT with several adapters on one base, in the ways that they offer.

hf-one-at-a-time   set_adapter before each request
hf-by-adapter      set_adapter before each adapter's requests, those of one adapter as a padded batch
hf-mixed           all requests as one padded batch with `adapter_names`
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.children.common import spec, tell

Requests = Sequence[int]  # numbers of requests; a request's adapter and prompt follow from its number


def main() -> None:
    """Load, answer in each way, and tell of each repetition."""
    wanted = spec()
    side = Side(wanted)
    ways: dict[str, Callable[[Requests], None]] = {
        "hf-one-at-a-time": side.one_at_a_time,
        "hf-by-adapter": side.by_adapter,
        "hf-mixed": side.mixed,
    }
    for mode, way in ways.items():
        try:
            side.begin(4)
            way(range(wanted["requests"]))
            for number in range(wanted["repeats"]):
                side.begin(wanted["new_tokens"])
                way([number * wanted["requests"] + i for i in range(wanted["requests"])])
                tell("served", mode=mode, **side.end())
        except (ValueError, RuntimeError, NotImplementedError) as error:
            tell("absent", mode=mode, error=" ".join(str(error).split())[:300])


class Side:
    """The model with its adapters, and a clock that notes each request's first token."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.wanted, self.torch = wanted, torch
        base = AutoModelForCausalLM.from_pretrained(wanted["model"], dtype=getattr(torch, wanted["dtype"]))
        folders = [f"{wanted['folder']}/adapter-{number}" for number in range(wanted["adapters"])]
        # its adapters in the base's own precision: the faster way
        self.model = PeftModel.from_pretrained(base, folders[0], "adapter-0", autocast_adapter_dtype=False)
        for number, folder in enumerate(folders[1:], 1):
            self.model.load_adapter(folder, f"adapter-{number}", autocast_adapter_dtype=False)
        self.model.to(getattr(torch, wanted["dtype"])).eval()
        self.begin(0)

    def begin(self, new: int) -> None:
        """Start the clock of a round of answers of up to `new` tokens."""
        self.new, self.first, self.tokens, self.began = new, [], 0, time.perf_counter()

    def end(self) -> dict[str, Any]:
        """What the round came to."""
        return {"seconds": time.perf_counter() - self.began, "tokens": self.tokens, "first_token_s": self.first}

    def one_at_a_time(self, requests: Requests) -> None:
        """Switch, answer, switch."""
        for number in requests:
            self.model.set_adapter(self.adapter(number))
            self.generate([number])

    def by_adapter(self, requests: Requests) -> None:
        """Those of one adapter together."""
        for name in sorted({self.adapter(number) for number in requests}):
            self.model.set_adapter(name)
            self.generate([number for number in requests if self.adapter(number) == name])

    def mixed(self, requests: Requests) -> None:
        """All together."""
        self.generate(requests, adapter_names=[self.adapter(number) for number in requests])

    def adapter(self, number: int) -> str:
        """The adapter of a request."""
        return f"adapter-{number % self.wanted['adapters']}"

    def generate(self, requests: Requests, **more: Any) -> None:
        """Answer these as one batch, padded on the left."""
        torch, eos = self.torch, self.wanted["eos"]
        prompts = [self.wanted["prompts"][number % len(self.wanted["prompts"])] for number in requests]
        width = max(map(len, prompts))
        ids = torch.tensor([[eos[0]] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        clock = self._clock(len(prompts))
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=self.new, do_sample=False, eos_token_id=eos,
                pad_token_id=eos[0], stopping_criteria=clock, **more,
            )  # fmt: skip
        for row in out[:, width:].tolist():
            self.tokens += next((place for place, token in enumerate(row) if token in eos), len(row))

    def _clock(self, count: int) -> Any:
        """Called after each token; notes when the first one came, for each request of the batch."""
        from transformers import StoppingCriteria, StoppingCriteriaList

        side, noted = self, []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                if not noted:
                    noted.append(True)
                    side.first += [time.perf_counter() - side.began] * count
                return side.torch.zeros(len(input_ids), dtype=side.torch.bool)

        return StoppingCriteriaList([Clock()])


if __name__ == "__main__":
    main()
