"""ModelConfig reads what transformers writes, and refuses by name what it cannot compute."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import ModelError
from tunesmith.model.config import ModelConfig
from tunesmith.model.fields import shortest
from tunesmith.model.rope_scaling import RopeScaling

_spec = importlib.util.spec_from_file_location("checkpoints", Path(__file__).with_name("checkpoints.py"))
checkpoints: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checkpoints)

# config.json of published models, in the keys they were published with.
LLAMA1 = {
    "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_size": 4096,
    "hidden_act": "silu", "intermediate_size": 11008, "initializer_range": 0.02, "max_sequence_length": 2048,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1,
    "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28,
    "max_position_embeddings": 40960, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def test_published_models() -> None:
    first = ModelConfig.from_hf(LLAMA1)
    assert (first.num_key_value_heads, first.head_dim, first.eos_token_ids, first.pad_token_id) == (32, 128, (1,), None)
    small = ModelConfig.from_hf(LLAMA32_1B)
    assert small.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert small.eos_token_ids == (128001, 128008, 128009) and small.tie_word_embeddings
    mistral = ModelConfig.from_hf(MISTRAL)
    assert (mistral.sliding_window, mistral.window_layers) == (4096, tuple(range(32)))
    qwen = ModelConfig.from_hf(QWEN25)
    assert (qwen.qkv_bias, qwen.o_bias, qwen.sliding_window, qwen.window_layers) == (True, False, None, ())
    qwen3 = ModelConfig.from_hf(QWEN3)
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim) == (True, False, 128)
    windowed = ModelConfig.from_hf(QWEN25 | {"use_sliding_window": True})
    assert (windowed.sliding_window, windowed.window_layers) == (32768, (21, 22, 23))


def _parameters(config: ModelConfig) -> int:
    total = 0
    for shape in config.weight_shapes().values():
        size = 1
        for n in shape:
            size *= n
        total += size
    return total


def test_parameter_counts_are_the_published_ones() -> None:
    assert _parameters(ModelConfig.from_hf(LLAMA1)) == 6_738_415_616
    assert _parameters(ModelConfig.from_hf(LLAMA32_1B)) == 1_235_814_400
    assert _parameters(ModelConfig.from_hf(MISTRAL)) == 7_241_732_096
    assert _parameters(ModelConfig.from_hf(QWEN25)) == 494_032_768
    assert _parameters(ModelConfig.from_hf(QWEN3)) == 596_049_920


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_round_trip_through_transformers(family: str, tmp_path: Path) -> None:
    """Ours -> config.json -> transformers -> config.json -> ours; and the names and shapes are transformers'."""
    import transformers

    reference = checkpoints.reference(family)
    ours = ModelConfig.from_hf(json.loads(reference.config.to_json_string(use_diff=False)))
    assert ModelConfig.from_hf(ours.to_hf()) == ours
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is type(reference.config)
    assert ModelConfig.from_hf(json.loads(theirs.to_json_string(use_diff=False))) == ours
    wanted = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    if ours.tie_word_embeddings:
        del wanted["lm_head.weight"]
    assert ours.weight_shapes() == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*unquantized"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one mapping for all layers"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor='nan'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"sliding_window": 128}, "sliding_window: a llama model has none"),
        ({"layer_types": ["sliding_attention"] * 32}, "sliding_window: a llama model has none"),
        ({"num_attention_heads": 0}, "num_attention_heads='0'"),
        ({"num_attention_heads": 33}, "head_dim is missing"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
        ({"hidden_size": "4096"}, "hidden_size='4096'"),
        ({"hidden_size": 1 << 62}, "hidden_size"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": 32000}, "eos_token_id 32000 is outside"),
        ({"eos_token_id": [1, -5]}, "eos_token_id"),
        ({"bos_token_id": 99999}, "bos_token_id 99999 is outside"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        ModelConfig.from_hf(LLAMA1 | changes, "some/config.json")
    assert str(caught.value).startswith("some/config.json") and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_missing_sizes_are_named(key: str) -> None:
    with pytest.raises(ModelError, match=f"{key} is missing"):
        ModelConfig.from_hf({k: v for k, v in LLAMA1.items() if k != key})


def test_window_settings_of_other_families() -> None:
    with pytest.raises(ModelError, match="use_sliding_window is off"):
        ModelConfig.from_hf(QWEN25 | {"layer_types": ["sliding_attention"] * 24})
    with pytest.raises(ModelError, match="layer_types"):
        ModelConfig.from_hf(QWEN25 | {"layer_types": ["full_attention"] * 23})
    with pytest.raises(ModelError, match="mistral model has one kind"):
        ModelConfig.from_hf(MISTRAL | {"layer_types": ["sliding_attention"] * 31 + ["full_attention"]})
    with pytest.raises(ModelError, match="mistral models have none"):
        ModelConfig.from_hf(MISTRAL | {"attention_bias": True})


def test_code_of_the_file_is_never_followed() -> None:
    config = ModelConfig.from_hf(
        LLAMA1 | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True}
    )
    assert config == ModelConfig.from_hf(LLAMA1)


def test_what_no_family_can_say_is_not_written() -> None:
    odd = replace(ModelConfig.from_hf(LLAMA1), qkv_bias=True)
    with pytest.raises(ModelError, match="cannot say qkv_bias=True"):
        odd.to_hf()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(LLAMA32_1B | QWEN3)), json_values)
def test_any_value_of_any_key_is_read_or_refused(key: str, value: Any) -> None:
    for base in (LLAMA32_1B, QWEN3):
        try:
            ModelConfig.from_hf(base | {key: value})
        except ModelError as error:
            assert "\n" not in str(error)


def test_shortest_decimal_of_a_float32() -> None:
    assert shortest(9.999999747378752e-06) == 1e-5
    assert [shortest(x) for x in (1e5, 500000.0, 0.5, 8.0)] == [1e5, 500000.0, 0.5, 8.0]


def test_llama3_scaling_of_published_models_is_recovered_from_gguf() -> None:
    from tunesmith.model.fields import Fields
    from tunesmith.model.rope_scaling import llama3_factors, rope_from_gguf

    for factor, head_dim in ((8.0, 128), (32.0, 64)):
        scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
        read = Fields({"llama.rope.freq_base": 500000.0}, "x.gguf")
        factors = llama3_factors(scaling, 500000.0, head_dim)
        assert rope_from_gguf(read, "llama", head_dim, factors) == (500000.0, scaling)
        factors[head_dim // 4] *= 1.01
        with pytest.raises(ModelError, match="not Llama 3's scaling"):
            rope_from_gguf(read, "llama", head_dim, factors)
