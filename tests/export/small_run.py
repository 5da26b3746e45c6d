"""A small base model with a real tokenizer, written by transformers, and a run folder as training leaves it behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.data.conftest import write_folder

from tunesmith.adapters import Adapter, attach
from tunesmith.adapters.peft_format import save_adapter
from tunesmith.data.templates import get_template
from tunesmith.export.probe import write_probe
from tunesmith.files import atomic_folder
from tunesmith.model.layout import Layout
from tunesmith.model.load import load_model, model_identity
from tunesmith.tokenizer import load_tokenizer

VOCAB = 768
TEXTS = ("Classify the sentiment of the text as negative or positive.", "What is 2 + 2? The answer is four.", "x")


def make_model(dtype: torch.dtype = torch.float32, **settings: Any):
    """transformers' own LLaMA of random weights, its vocabulary wide enough for the tokenizer."""
    import transformers

    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(("norm" in name) + 0.2 * torch.randn(parameter.shape))
    return model.to(dtype).eval()


def make_base(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Model and tokenizer as a Hugging Face folder."""
    make_model(dtype, **settings).save_pretrained(folder)
    return write_folder(folder, eos="<|im_end|>")


def train_like(model, spec: dict[str, Any], by: float = 0.05) -> Adapter:
    """Attach a method and move it as training would."""
    adapter = attach(model, spec)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.trainable.values():
            p.add_(torch.randn(p.shape, generator=draw) * by)
    return adapter


def make_run(
    run: Path, base: Path, dtype: torch.dtype = torch.float32, kind: str = "lora", by: float = 0.05, **spec: Any
) -> Path:
    """Attach, move, save and record the probe: what a run leaves behind."""
    tokenizer = load_tokenizer(base)
    model = load_model(base, dtype=dtype)
    adapter = train_like(model, {"kind": kind, **({"rank": 4} if kind == "lora" else {}), **spec}, by)
    with atomic_folder(run / "adapter") as folder:
        save_adapter(
            folder,
            adapter,
            base=str(base),
            identity=model_identity(base),
            template=get_template("alpaca", tokenizer).to_dict(),
            tokenizer=tokenizer.fingerprint(),
        )
        tokenizer.save(folder)
    name = str(dtype).removeprefix("torch.")
    (run / "config.yaml").write_text(f"model: {{path: {base}, dtype: {name}}}\n", encoding="utf-8")
    write_probe(run, model, [tokenizer.encode(text) for text in TEXTS])
    return run


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """Our model's logits of one sequence."""
    with torch.no_grad():
        ctx = model.context(Layout.single(len(tokens)))
        return model.logits(model.run(tokens, ctx), ctx)
