"""LitGPT's LoRA model and chunked loss in the loop of its finetune/lora.py, on padded micro-batches.

Its command reads texts, not ids, so the loop stands here; precision is its `bf16-true` (everything in bfloat16). Its
adapter is written under PEFT's names, which is how every run's held-out loss is computed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.children.common import TARGETS, batches, count, padded, read_examples, spec, tell


def main() -> None:
    """Train as the specification says, save the adapter, and tell of every step."""
    wanted = spec()
    import torch
    from litgpt.lora import GPT, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    torch.manual_seed(wanted["seed"])
    config = lit_config(wanted)
    torch.set_default_dtype(getattr(torch, wanted["dtype"]))
    model = GPT(config)
    torch.set_default_dtype(torch.float32)
    model.load_state_dict(converted(config, Path(wanted["model"])), strict=False)
    mark_only_lora_as_trainable(model)
    rows = read_examples(wanted["train"])
    model.max_seq_length = max(len(row["ids"]) for row in rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=wanted["learning_rate"], weight_decay=0.0)
    micro = wanted["micro_batch"]
    tell("begin")
    for group in batches(rows, wanted["batch_size"], wanted["seed"]):
        parts = [group[i : i + micro] for i in range(0, len(group), micro)]
        for part in parts:
            batch = padded(part)
            logits = model(batch["input_ids"], lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            loss = chunked_cross_entropy(logits, batch["labels"][..., 1:])
            (loss * (count(part)[1] / count(group)[1])).backward()  # its own loop gives every micro-batch equal weight
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens, supervised = count(group)
        tell("step", tokens=tokens, supervised=supervised)
    save(model, wanted)
    tell("saved")


def lit_config(wanted: dict[str, Any]) -> Any:
    """LitGPT's configuration of the model, with LoRA where the job wants it; sizes are checked by loading."""
    from litgpt.lora import Config

    targets = TARGETS[wanted["targets"]]
    return Config.from_name(
        "SmolLM2-135M-Instruct",
        lora_r=wanted["rank"],
        lora_alpha=wanted["alpha"],
        lora_dropout=0.0,
        lora_query="q_proj" in targets,
        lora_key="k_proj" in targets,
        lora_value="v_proj" in targets,
        lora_projection="o_proj" in targets,
        lora_mlp="up_proj" in targets,
        lora_head=False,
    )


def converted(config: Any, folder: Path) -> dict[str, Any]:
    """The folder's weights under LitGPT's names, by its own converter."""
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    copy_weights_hf_llama(config, defaultdict(dict), state, load_file(folder / "model.safetensors"))
    renamed = {}
    for name, tensor in state.items():  # a linear that may carry LoRA holds its weight one level further down
        owner, _, leaf = name.rpartition(".")
        inner = owner.endswith(("attn.qkv", "attn.proj", "mlp.fc_1", "mlp.fc_2", "mlp.proj", "lm_head"))
        renamed[f"{owner}.linear.{leaf}" if inner else name] = tensor
    return renamed


def save(model: Any, wanted: dict[str, Any]) -> None:
    """Write LoRA's factors as PEFT names them."""
    import torch
    from safetensors.torch import save_file

    rank, targets = wanted["rank"], TARGETS[wanted["targets"]]
    tensors = {}
    plain = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj"}
    plain["mlp.proj"] = "mlp.down_proj"
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer, place = name.removeprefix("transformer.h.").split(".", 1)
        pairs = {plain.get(place, ""): (module.lora_A, module.lora_B)}
        if place == "attn.qkv":
            present = [t for t in ("q_proj", "k_proj", "v_proj") if t in targets]
            parts = zip(module.lora_A.split(rank), module.lora_B.split(module.qkv_shapes), strict=True)
            pairs = {f"self_attn.{t}": pair for t, pair in zip(present, parts, strict=True)}
        for target, (a, b) in pairs.items():
            key = f"base_model.model.model.layers.{layer}.{target}"
            tensors[f"{key}.lora_A.weight"] = a.detach().to(torch.float32).contiguous()
            tensors[f"{key}.lora_B.weight"] = b.detach().to(torch.float32).contiguous()
    out = Path(wanted["out"])
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": wanted["model"], "r": rank,
        "lora_alpha": wanted["alpha"], "lora_dropout": 0.0, "target_modules": targets, "bias": "none",
        "inference_mode": True,
    }  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    main()
