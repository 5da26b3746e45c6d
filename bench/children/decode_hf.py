"""transformers' generate, greedy, on the exported folder; a ragged batch is padded on the left."""

from __future__ import annotations

from bench.children.common import spec, tell, timed_decoding


def main() -> None:
    """Load, decode at every batch size, and tell."""
    wanted = spec()
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(wanted["model"], dtype=getattr(torch, wanted["dtype"])).eval()
    tell("loaded")

    @torch.inference_mode()
    def decode(prompts: list[list[int]], new: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        return out[:, width:].tolist()

    timed_decoding(wanted, decode)


if __name__ == "__main__":
    main()
