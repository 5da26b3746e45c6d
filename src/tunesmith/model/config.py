"""What a LLaMA-family model is: one frozen description, read from config.json or from GGUF metadata.

Only keys that are understood are read. A key that would change the arithmetic and is not understood is refused by name:
a model that computes something slightly different is worse than no model. Nothing named by the file (`auto_map`, custom
code) is ever imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import ModelError, did_you_mean
from tunesmith.model.fields import Fields, shortest
from tunesmith.model.rope_scaling import RopeScaling, rope_from_gguf, rope_from_hf

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Keys that change the arithmetic, with the values that leave it as we compute it. Any other value is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "position_embedding_type": (None, "rope", "rotary"),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "clip_qkv": (None,),
    "alibi": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "moe_intermediate_size": (None, 0),
    "use_qk_norm": (None, False),
    "no_rope_layers": (None, []),
    "use_mrope": (None, False),
    "attention_chunk_size": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "use_bias": (None, False),
    "qkv_bias": (None,),
    "vision_config": (None,),
    "audio_config": (None,),
    "text_config": (None,),
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model; the differences between families are fields, not subclasses.

    `sliding_window` (tokens a query sees, itself included) holds for the layers in `window_layers`; None means full
    attention everywhere. `o_bias` is the bias of o_proj, `qkv_bias` that of q_proj, k_proj and v_proj.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    window_layers: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read the keys of a Hugging Face config.json; ModelError names a key that is missing, absurd or unknown."""
        if not isinstance(config, Mapping):
            raise ModelError(
                f"{where}: holds {type(config).__name__}, not a mapping of keys; is it the model's config?"
            )
        read = Fields(config, where)
        kind = _model_type(config, where)
        _refuse_unknown_arithmetic(config, where)
        heads = read.count("num_attention_heads", most=65536)
        hidden = read.count("hidden_size", most=1 << 20)
        layers = read.count("num_hidden_layers", most=4096)
        bias = read.flag("attention_bias", False)
        window, window_layers = _window(read, kind, layers)
        theta, scaling = rope_from_hf(config, where)
        built = cls(
            model_type=kind,
            vocab_size=read.count("vocab_size", most=1 << 24),
            hidden_size=hidden,
            intermediate_size=read.count("intermediate_size", most=1 << 22),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=read.count("num_key_value_heads", heads, most=65536),
            head_dim=read.count("head_dim", 128 if kind == "qwen3" else _head_dim(hidden, heads), most=65536),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6, most=1.0),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=read.count("max_position_embeddings", 2048, most=1 << 31),
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            qkv_bias=kind == "qwen2" or bias,
            o_bias=bias and kind in ("llama", "qwen3"),
            mlp_bias=read.flag("mlp_bias", False),
            qk_norm=kind == "qwen3",
            sliding_window=window,
            window_layers=window_layers,
            bos_token_id=read.token("bos_token_id", 1 if kind in ("llama", "mistral") else None),
            eos_token_ids=read.tokens("eos_token_id", (2,) if kind in ("llama", "mistral") else ()),
            pad_token_id=read.token("pad_token_id", None),
        )
        if kind != "llama" and built.mlp_bias or kind == "mistral" and bias:
            raise ModelError(
                f"{where}: attention_bias/mlp_bias: {kind} models have none; Tunesmith cannot compute this"
            )
        return built._checked(where)

    @classmethod
    def from_gguf(
        cls,
        fields: Mapping[str, Any],
        where: str,
        *,
        tensors: Mapping[str, tuple[int, ...]],
        rope_freqs: Sequence[float] | None = None,
    ) -> ModelConfig:
        """Read GGUF metadata (plain values by key).

        `tensors` gives the shape (rows first) of each of the file's tensors: whether the head is tied and which biases
        exist is only said there. `rope_freqs` is `rope_freqs.weight`, from which Llama 3's scaling is recovered.
        """
        arch = fields.get("general.architecture")
        if arch not in ("llama", "qwen2", "qwen3"):
            raise ModelError(
                f"{where}: GGUF architecture {str(arch)[:60]!r} is not supported; known: llama, qwen2, qwen3"
            )
        read = Fields(fields, where)
        _refuse_gguf_arithmetic(read, arch)
        heads = read.count(f"{arch}.attention.head_count", most=65536)
        hidden = read.count(f"{arch}.embedding_length", most=1 << 20)
        layers = read.count(f"{arch}.block_count", most=4096)
        head_dim = read.count(f"{arch}.attention.key_length", _head_dim(hidden, heads), most=65536)
        theta, scaling = rope_from_gguf(read, arch, head_dim, rope_freqs)
        window = read.optional_count(f"{arch}.attention.sliding_window", None)
        rows = tensors.get("token_embd.weight", (0,))[0]
        built = cls(
            model_type="mistral" if arch == "llama" and window else arch,
            vocab_size=read.count(f"{arch}.vocab_size", rows or None, most=1 << 24),
            hidden_size=hidden,
            intermediate_size=read.count(f"{arch}.feed_forward_length", most=1 << 22),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=read.count(f"{arch}.attention.head_count_kv", heads, most=65536),
            head_dim=head_dim,
            rms_norm_eps=shortest(read.number(f"{arch}.attention.layer_norm_rms_epsilon", None, most=1.0)),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=read.count(f"{arch}.context_length", 2048),
            tie_word_embeddings="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            o_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_down.bias" in tensors,
            qk_norm=arch == "qwen3",
            sliding_window=window,
            window_layers=tuple(range(layers)) if window else (),
            bos_token_id=read.token("tokenizer.ggml.bos_token_id", None),
            eos_token_ids=read.tokens("tokenizer.ggml.eos_token_id", ()),
            pad_token_id=read.token("tokenizer.ggml.padding_token_id", None),
        )
        return built._checked(where)

    def to_hf(self) -> dict[str, Any]:
        """Return config.json's mapping, in the keys that every reader knows; ModelError where no family can say it."""
        if (
            self.model_type not in ("llama", "qwen3")
            and self.o_bias
            or self.model_type == "llama"
            and (self.qkv_bias != self.o_bias)
        ):
            raise ModelError(
                f"a {self.model_type} config.json cannot say qkv_bias={self.qkv_bias}, o_bias={self.o_bias}"
            )
        eos = list(self.eos_token_ids)
        out: dict[str, Any] = {
            "architectures": [_ARCHITECTURE[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling.to_hf() if self.rope_scaling else None,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "pad_token_id": self.pad_token_id,
        }
        if self.model_type in ("llama", "qwen3"):
            out["attention_bias"] = self.o_bias
        if self.model_type == "llama":
            out["mlp_bias"] = self.mlp_bias
        elif self.model_type == "mistral":
            out["sliding_window"] = self.sliding_window
        else:
            out |= self._qwen_window()
        return out

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every tensor of the model, in Hugging Face's names; a tied head is left out."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in self._layer_shapes().items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        q_size, kv_size = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        linears = {
            "self_attn.q_proj": (q_size, hidden, self.qkv_bias),
            "self_attn.k_proj": (kv_size, hidden, self.qkv_bias),
            "self_attn.v_proj": (kv_size, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, q_size, self.o_bias),
            "mlp.gate_proj": (inner, hidden, self.mlp_bias),
            "mlp.up_proj": (inner, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, inner, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        return shapes

    def _qwen_window(self) -> dict[str, Any]:
        kinds = [
            "sliding_attention" if i in self.window_layers else "full_attention" for i in range(self.num_hidden_layers)
        ]
        return {
            "use_sliding_window": self.sliding_window is not None,
            "sliding_window": self.sliding_window,
            "max_window_layers": min(self.window_layers, default=self.num_hidden_layers),
            "layer_types": kinds,
        }

    def _checked(self, where: str) -> ModelConfig:
        """Return self after the checks that take two fields at once."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"{where}: num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}; the config does not belong to these weights"
            )
        if self.head_dim % 2:
            raise ModelError(f"{where}: head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        for name in ("bos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                raise ModelError(
                    f"{where}: {name} {token} is outside of the vocabulary of {self.vocab_size}; correct it"
                )
        for token in self.eos_token_ids:
            if token >= self.vocab_size:
                raise ModelError(
                    f"{where}: eos_token_id {token} is outside of the vocabulary of {self.vocab_size}; correct it"
                )
        return self


_ARCHITECTURE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _model_type(config: Mapping[str, Any], where: str) -> str:
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        hint = did_you_mean(str(kind), MODEL_TYPES)
        raise ModelError(
            f"{where}: model_type {str(kind)[:60]!r} is not supported; known: {', '.join(MODEL_TYPES)}{hint}"
        )
    return str(kind)


def _refuse_unknown_arithmetic(config: Mapping[str, Any], where: str) -> None:
    for key, neutral in _NEUTRAL.items():
        if key in config and config[key] not in neutral:
            cure = "; use the unquantized original, Tunesmith quantizes by itself" if "quantization" in key else ""
            raise ModelError(
                f"{where}: {key}={str(config[key])[:60]!r} changes what the model computes; not supported{cure}"
            )


def _refuse_gguf_arithmetic(read: Fields, arch: str) -> None:
    for key in (
        "expert_count",
        "attention.logit_softcapping",
        "final_logit_softcapping",
        "logit_scale",
        "residual_scale",
    ):
        if read.values.get(f"{arch}.{key}"):
            raise ModelError(f"{read.where}: {arch}.{key}={str(read.values[f'{arch}.{key}'])[:60]}: not supported")
    if arch != "llama" and read.values.get(f"{arch}.attention.sliding_window"):
        raise ModelError(
            f"{read.where}: {arch}.attention.sliding_window: which layers have it is not said; not supported"
        )
    if read.values.get(f"{arch}.attention.value_length") != read.values.get(f"{arch}.attention.key_length"):
        raise ModelError(f"{read.where}: {arch}.attention.key_length and value_length differ; not supported")
    if not read.values.get(f"{arch}.attention.causal", True):
        raise ModelError(f"{read.where}: {arch}.attention.causal is off: an encoder, not a language model")


def _head_dim(hidden: int, heads: int) -> int | None:
    if hidden % heads:
        return None  # then head_dim must be said, and Fields.count asks for it
    return hidden // heads


def _window(read: Fields, kind: str, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Which layers see only a window, as transformers decides it for each family."""
    window = read.optional_count("sliding_window", 4096 if kind == "mistral" else None, most=1 << 31)
    types = read.names("layer_types", ("full_attention", "sliding_attention"), layers)
    if kind == "llama":
        if window is not None or types and "sliding_attention" in types:
            raise ModelError(
                f"{read.where}: sliding_window: a llama model has none; is model_type meant to be 'mistral'?"
            )
        return None, ()
    if kind == "mistral":
        if types is not None and len(set(types)) > 1:
            raise ModelError(f"{read.where}: layer_types: a mistral model has one kind of attention; not supported")
        return window, tuple(range(layers)) if window is not None else ()
    if window is None or not read.flag("use_sliding_window", False):
        if types and "sliding_attention" in types:
            raise ModelError(f"{read.where}: layer_types asks for sliding_attention, but use_sliding_window is off")
        return None, ()
    if types is None:
        first = read.count("max_window_layers", 28, least=0, most=1 << 31)
        chosen = tuple(range(min(first, layers), layers))
    else:
        chosen = tuple(i for i, name in enumerate(types) if name == "sliding_attention")
    return (window, chosen) if chosen else (None, ())
