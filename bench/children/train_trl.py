"""TRL's SFTTrainer with packing (best-fit decreasing), PEFT's LoRA; rows go in as ids with labels.

A step holds as many packs as bring the job's global batch on average: the number of rows in a pack is not ours to set.
"""

from __future__ import annotations

from typing import Any

from bench.children.common import IGNORE, TARGETS, count, read_examples, spec, tell


def main() -> None:
    """Train as the specification says, save the adapter, and tell of every step."""
    wanted = spec()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = read_examples(wanted["train"])
    data = Dataset.from_list([{"input_ids": row["ids"], "labels": row["labels"]} for row in rows])
    packs = max(1, round(wanted["batch_size"] * count(rows)[0] / len(rows) / wanted["cutoff"]))
    counted = {"tokens": 0, "supervised": 0}

    class Counting(SFTTrainer):
        """Counts the real tokens of each step; the work is TRL's own."""

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            counted["tokens"] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            counted["supervised"] += int((inputs["labels"] != IGNORE).sum())
            return super().training_step(model, inputs, *args, **kwargs)

    class Tell(TrainerCallback):
        """Tells of the first step's beginning and of every step's end."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                tell("begin")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tell("step", tokens=counted["tokens"], supervised=counted["supervised"])
            counted.update(tokens=0, supervised=0)

    arguments = SFTConfig(
        output_dir=wanted["out"],
        packing=True,
        max_length=wanted["cutoff"],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=packs,
        num_train_epochs=1,
        learning_rate=wanted["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        seed=wanted["seed"],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(wanted["model"], dtype=getattr(torch, wanted["dtype"])),
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(wanted["model"]),
        peft_config=LoraConfig(
            r=wanted["rank"], lora_alpha=wanted["alpha"], lora_dropout=0.0, target_modules=TARGETS[wanted["targets"]],
            task_type="CAUSAL_LM",
        ),
        callbacks=[Tell()],
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(wanted["out"])
    tell("saved")


if __name__ == "__main__":
    main()
