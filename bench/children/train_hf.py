"""Hugging Face Trainer with PEFT's LoRA, at a micro-batch and with or without group_by_length; rows are padded."""

from __future__ import annotations

from typing import Any

from bench.children.common import IGNORE, TARGETS, device_peak, padded, read_examples, spec, synchronise, tell


def main() -> None:
    """Train as the specification says, save the adapter, and tell of every step."""
    wanted = spec()
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    set_seed(wanted["seed"])
    model = load(wanted)
    lora = LoraConfig(
        r=wanted["rank"], lora_alpha=wanted["alpha"], lora_dropout=0.0, target_modules=TARGETS[wanted["targets"]],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, lora)
    if wanted.get("recompute"):
        model.enable_input_require_grads()
    device = wanted.get("device", "cpu")
    counted = {"tokens": 0, "supervised": 0}

    class Counting(Trainer):
        """Counts the real tokens of each step; the work is the Trainer's own."""

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            counted["tokens"] += int(inputs["attention_mask"].sum())
            counted["supervised"] += int((inputs["labels"][:, 1:] != IGNORE).sum())
            return super().training_step(model, inputs, *args, **kwargs)

    class Tell(TrainerCallback):
        """Tells of the first step's beginning and of every step's end."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                tell("begin")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronise(device)
            tell("step", tokens=counted["tokens"], supervised=counted["supervised"])
            counted.update(tokens=0, supervised=0)

    micro = wanted["micro_batch"]
    arguments = TrainingArguments(
        output_dir=wanted["out"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, wanted["batch_size"] // micro),
        num_train_epochs=1,
        learning_rate=wanted["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=bool(wanted.get("autocast")),
        gradient_checkpointing=bool(wanted.get("recompute")),
        train_sampling_strategy="group_by_length" if wanted.get("group") else "random",
        optim="adamw_torch",
        seed=wanted["seed"],
        use_cpu=device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    rows = Rows(read_examples(wanted["train"]))
    Counting(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Tell()]).train()
    model.save_pretrained(wanted["out"])
    tell("saved", device_peak=device_peak(device))


class Rows(list):
    """Encoded rows under the names that the Trainer's length-grouped sampler looks for."""

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        super().__init__({"input_ids": row["ids"], "labels": row["labels"]} for row in rows)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """A padded batch."""
    return padded([{"ids": row["input_ids"], "labels": row["labels"]} for row in rows])


def load(wanted: dict[str, Any]) -> Any:
    """The base model as a user would load it (SDPA unless another attention is named), or random weights of a shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    attention, dtype = wanted.get("attention", "sdpa"), getattr(torch, wanted["dtype"])
    if "config" in wanted:
        config = AutoConfig.from_pretrained(wanted["model"])
        with torch.device(wanted["device"]):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_pretrained(wanted["model"], dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    return model


if __name__ == "__main__":
    main()
