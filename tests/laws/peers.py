"""The same model and the same LoRA in transformers and PEFT, and one padded step of theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from tests.laws.small import VOCAB, build
from torch import Tensor
from torch.nn import functional
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from tunesmith.adapters import Adapter
from tunesmith.data.encode import Example
from tunesmith.model.config import ModelConfig
from tunesmith.model.llama import Llama

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
NORMS = (
    modeling_llama.LlamaRMSNorm,
    modeling_mistral.MistralRMSNorm,
    modeling_qwen2.Qwen2RMSNorm,
    modeling_qwen3.Qwen3RMSNorm,
)
PEFT_NAMES = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora"}
WHOLE = {  # settings that train base weights, and the modules that they mean
    "train_norms": ["input_layernorm", "post_attention_layernorm", "norm"],
    "train_embeddings": ["embed_tokens"],
    "train_head": ["lm_head"],
}
# Where PEFT keeps a parameter, by the end of our name for it, which is cut off.
PEFT_PLACES = {
    "embed.A": "embed_tokens.lora_embedding_A.default",
    "embed.B": "embed_tokens.lora_embedding_B.default",
    "edit.A": "lora_A.default.weight",
    "edit.B": "lora_B.default.weight",
    "edit.magnitude": "lora_magnitude_vector.default.weight",
    "weight": "modules_to_save.default.weight",
}


@contextmanager
def wide_norms() -> Iterator[None]:
    """transformers casts to float32 within its norms, whatever the model's dtype: in float64 tests, it shall not."""

    def forward(self: Any, h: Tensor) -> Tensor:
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    with pytest.MonkeyPatch.context() as patch:
        for norm in NORMS:
            patch.setattr(norm, "forward", forward)
        yield


def twin_models(config: tf.PreTrainedConfig, dtype: torch.dtype) -> tuple[Llama, Any]:
    """Our model and theirs with the same weights. Dense attention there is SDPA: the eager one's softmax is float32."""
    ours = build(ModelConfig.from_hf(config.to_dict()), dtype)
    config._attn_implementation = "sdpa"
    theirs = tf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def peft_twin(theirs: Any, spec: Mapping[str, Any], adapter: Adapter) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's LoRA (or DoRA) on `theirs` with our adapter's values; its parameters by our names."""
    options = {PEFT_NAMES.get(k, k): v for k, v in spec.items() if k != "kind" and k not in WHOLE}
    options.setdefault("lora_alpha", 2 * options["r"])
    options["use_dora"] = spec.get("kind") == "dora"
    options["modules_to_save"] = [name for key, names in WHOLE.items() if spec.get(key) for name in names] or None
    options["ensure_weight_tying"] = adapter.tied and "model.embed_tokens.weight" in adapter.base
    model = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    if theirs.dtype == torch.float64:
        model.double()  # PEFT makes its weights in float32
    known = dict(model.named_parameters())
    found = {}
    for name, value in adapter.trainable.items():
        end = next(end for end in PEFT_PLACES if name.endswith(f".{end}"))
        found[name] = known.pop(f"base_model.model.{name.removesuffix(end)}{PEFT_PLACES[end]}")
        with torch.no_grad():
            found[name].copy_(value)
    left = [name for name, p in known.items() if p.requires_grad]
    assert not left, f"PEFT trains what we do not: {left}"
    return model, found


def padded_step(
    model: Any, examples: Sequence[Example], trained: Mapping[str, Tensor]
) -> tuple[list[Tensor], float, Tensor]:
    """Logits of every example, the mean loss over supervised tokens, and the gradient, of a batch padded at its end."""
    longest = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, e in enumerate(examples):
        n, told = len(e.ids), torch.from_numpy(e.supervised)
        ids[i, :n], attention[i, :n] = torch.from_numpy(e.ids).long(), 1
        labels[i, :n][told] = ids[i, :n][told]
    logits = model(input_ids=ids, attention_mask=attention).logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # The library's own loss casts to float32; this is its formula: labels shifted by one, a mean over those not -100.
    loss = functional.cross_entropy(wide[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    grads = torch.autograd.grad(loss, list(trained.values()))
    rows = [row[: len(e.ids)].detach() for row, e in zip(logits, examples, strict=True)]
    return rows, loss.item(), torch.cat([g.flatten() for g in grads])
