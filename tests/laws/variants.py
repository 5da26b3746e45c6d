"""Settings of each method that are worth a law beside its defaults, by kind."""

from __future__ import annotations

# Encoders that nobody has to open: features are drawn from an image's name (tests/laws/small.py).
GLOBAL = {"encoder": "tiny", "scales": [2], "widths": [4]}
PATCHES = {"encoder": "tiny", "layer": 2, "tokens": 3, "token_width": 4}
QUERIES = {**PATCHES, "vision_width": 4, "vision_depth": 1, "vision_heads": 2}

# Settings worth a law beside the defaults. A method without an entry is held to the laws with its defaults.
VARIANTS: dict[str, list[dict[str, object]]] = {
    "lora": [
        {
            "rank": 3,
            "rslora": True,
            "init": "gaussian",
            "rank_pattern": {"q_proj": 5},
            "alpha_pattern": {"down_proj": 1},
        },
        {"rank": 4, "init": "pissa", "target_modules": ["q_proj", "down_proj"]},
        {"rank": 4, "target_modules": "(lm_head|.*v_proj)"},
        {"rank": 4, "dropout": 0.3, "layers_to_transform": [1]},
        {"rank": 4, "target_modules": ["embed_tokens"]},
        {"rank": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"rank": 4, "target_modules": ["q_proj", "v_proj"], "train_norms": True, "train_embeddings": True},
    ],
    "dora": [
        {"rank": 3, "rslora": True, "init": "gaussian", "target_modules": "(lm_head|.*(q_proj|down_proj))"},
        {"rank": 4, "dropout": 0.3, "layers_to_transform": [1]},
    ],
    "adalora": [
        {"init_rank": 4, "target_rank": 3, "total_steps": 4, "tinit": 0, "tfinal": 1, "deltaT": 1},
        {"init_rank": 3, "target_rank": 2, "dropout": 0.3, "target_modules": ["lm_head", "v_proj"]},
    ],
    "ia3": [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "up_proj", "lm_head"], "feedforward_modules": ["up_proj"]},
    ],
    "bottleneck": [
        {"variant": "pfeiffer", "width": 3, "activation": "tanh"},
        {"variant": "parallel", "width": 5, "activation": "silu", "scale": 4.0},
        {"init": "bert", "activation": "relu", "reduction_factor": 4.0},
    ],
    "bitfit": [{"norms": True}, {"target_modules": ["q_proj", "lm_head"]}],
    "norms": [{"target_modules": ["norm", "input_layernorm"]}],
    "last_layers": [{"layers": 1, "norm": False}, {"layers": 1, "head": True}],
    "llama_adapter": [
        {"layers": 2, "gate": "tanh"},
        {"layers": 2, "gate": "scalar", "prompt_length": 3},
        {"layers": 2, "init": "random"},
    ],
    "llama_adapter_v2": [{"layers": 2, "gate": "scalar"}],
    "llama_adapter_image": [
        {"layers": 2, "gate": "tanh", "encoder": "tiny", "scales": [1, 3], "widths": [3, 5]},
        {"layers": 2, "init": "random", "prompt_length": 2, **GLOBAL},
    ],
    "llama_adapter_v2_image": [
        {"layers": 1, "linears": False, **QUERIES},
        {"layers": 1, "gate": "scalar", "queries": 2, **QUERIES},
    ],
    "image_projection": [{**PATCHES}, {"projector": "mlp", **PATCHES}],
    "prompt": [
        {"virtual_tokens": 3, "infix_tokens": 2, "init": "normal"},
        {"virtual_tokens": 5, "init_ids": [7, 3]},
    ],
    "prefix": [{"virtual_tokens": 3, "init": "normal"}, {"virtual_tokens": 4, "reparam": 5}],
    "reft": [
        {"first_positions": 2, "last_positions": 1, "tied": True},
        {"variant": "noreft", "rank": 2, "last_positions": 0},
        {"variant": "direft", "first_positions": 0, "last_positions": 3, "layers_to_transform": [1]},
    ],
    "mixed": [
        {"parts": [{"kind": "prefix", "virtual_tokens": 3}, {"kind": "lora", "rank": 2}]},
        {"parts": [{"kind": "ia3"}, {"kind": "lora", "rank": 2}, {"kind": "bottleneck"}, {"kind": "reft"}]},
        {"parts": [{"kind": "norms"}, {"kind": "lora", "rank": 2}]},
        {"parts": [{"kind": "llama_adapter_image", "layers": 2, **GLOBAL}, {"kind": "lora", "rank": 2}]},
        {"parts": [{"kind": "lora", "rank": 2}, {"kind": "llama_adapter_v2_image", "layers": 1, **QUERIES}]},
        {"parts": [{"kind": "prompt", "virtual_tokens": 2}, {"kind": "image_projection", **PATCHES}, {"kind": "lora"}]},
        {
            "parts": [
                {"kind": "adalora", "init_rank": 3, "target_rank": 2, "total_steps": 4, "deltaT": 1},
                {"kind": "lora", "rank": 2, "target_modules": ["q_proj"]},
            ]
        },
    ],
}
