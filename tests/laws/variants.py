"""Settings of each method that are worth a law beside its defaults, by kind."""

from __future__ import annotations

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
        {
            "parts": [
                {"kind": "adalora", "init_rank": 3, "target_rank": 2, "total_steps": 4, "deltaT": 1},
                {"kind": "lora", "rank": 2, "target_modules": ["q_proj"]},
            ]
        },
    ],
}
