"""The real SmolLM2 against transformers with the same weights: the tolerances that a real model's scale allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tests.laws.small import disturb, relative, run_packs
from torch import Tensor

from tunesmith.adapters import attach
from tunesmith.data.encode import Example
from tunesmith.data.pack import plan_packs
from tunesmith.model.load import load_model

tf = pytest.importorskip("transformers")
pytest.importorskip("peft")
from tests.laws.peers import padded_step, peft_twin, wide_norms  # noqa: E402

pytestmark = pytest.mark.smollm2
LORA = {"rank": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@dataclass(frozen=True)
class Step:
    """Logits of every token, the loss and the LoRA gradient, of one batch."""

    logits: Tensor
    loss: float
    gradient: Tensor


def batch() -> list[Example]:
    """Three unequal examples behind a common beginning: made-up ids, so every token is a hard one."""
    rng = np.random.default_rng(0)
    shared = rng.integers(20, 49_000, 24)
    made = []
    for n in (9, 30, 17):
        ids = np.concatenate([shared, rng.integers(20, 49_000, n)]).astype(np.int32)
        made.append(Example(ids, np.arange(len(ids)) >= 20, "made"))
    return made


def our_step(path: Any, dtype: torch.dtype) -> tuple[Step, Any, Any]:
    model = load_model(path, dtype=dtype)
    adapter = attach(model, {"kind": "lora", **LORA})
    disturb(adapter, std=0.02)
    some = batch()
    (pack,) = plan_packs(some, budget=1000)
    loss, gradient = run_packs(model, [pack], adapter)
    with torch.no_grad():
        ctx = model.context(pack.layout)
        logits = model.logits(model.run(pack.tokens, ctx), ctx)
    order = np.argsort(pack.examples)
    rows = torch.from_numpy(np.concatenate([pack.rows[i] for i in order]))
    return Step(logits[rows], loss, gradient), model, adapter


def their_step(model: Any, adapter: Any, dtype: torch.dtype) -> Step:
    """transformers and PEFT with our model's and adapter's values."""
    config = tf.LlamaConfig(**model.config.to_hf())
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        theirs = tf.LlamaForCausalLM(config)
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if ".edit." not in k}, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # its tables were made on the meta device
    theirs.eval()
    peer, trained = peft_twin(theirs, LORA, adapter)
    logits, loss, gradient = padded_step(peer, batch(), trained)
    return Step(torch.cat(logits), loss, gradient)


@pytest.fixture(scope="module")
def exact(smollm2_gguf: Any) -> Step:
    """Ours in float64, which transformers' float64 confirms."""
    step, model, adapter = our_step(smollm2_gguf, torch.float64)
    with wide_norms():
        theirs = their_step(model, adapter, torch.float64)
    assert relative(step.logits, theirs.logits) < 1e-10 and relative(step.gradient, theirs.gradient) < 1e-8
    return step


def test_float32(smollm2_gguf: Any, exact: Step) -> None:
    ours, model, adapter = our_step(smollm2_gguf, torch.float32)
    theirs = their_step(model, adapter, torch.float32)
    assert abs(ours.loss - theirs.loss) <= 1e-5 * theirs.loss
    assert (ours.logits - theirs.logits).abs().max() <= 1e-5 * theirs.logits.abs().max()
    for what in ("logits", "gradient"):
        a, b = (relative(getattr(s, what).double(), getattr(exact, what)) for s in (ours, theirs))
        print(f"float32 {what}: from float64 ours {a:.2e}, transformers {b:.2e}")
        assert 0 < a <= 3 * b, f"{what}: {a:.2e} from float64, transformers {b:.2e}"


def test_bfloat16(smollm2_gguf: Any, exact: Step) -> None:
    """One batch's distances vary by a few percent with the order of additions alone: 20% is given for that."""
    ours, model, adapter = our_step(smollm2_gguf, torch.bfloat16)
    theirs = their_step(model, adapter, torch.bfloat16)
    for what in ("logits", "gradient"):
        a, b = (relative(getattr(s, what).double(), getattr(exact, what)) for s in (ours, theirs))
        print(f"bfloat16 {what}: from float64 ours {a:.2e}, transformers {b:.2e}")
        assert 0 < a <= 1.2 * b, f"{what}: {a:.2e} from float64, transformers {b:.2e}"
