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
    ],
}
