"""Which modules a target means: PEFT's meaning, taken from PEFT itself; and errors that say what to write instead."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.laws.small import TINY, build

from tunesmith.adapters.targets import by_pattern, check_patterns, layer_of, select_linears
from tunesmith.errors import AdapterError

MODEL = build(replace(TINY, num_hidden_layers=3))


def chosen(target, layers=None) -> list[str]:
    return [path for path, _ in select_linears(MODEL, target, layers)]


TARGETS = [
    "all-linear",
    ["q_proj", "v_proj"],
    ["self_attn.q_proj"],
    ["model.layers.1.mlp.down_proj"],
    r".*\.(gate|up)_proj",
    r"model\.layers\.[02]\.self_attn\.o_proj",
    ["lm_head"],
]
LISTS = TARGETS[1:3]  # the ones that PEFT lets layers_to_transform act on


@pytest.mark.parametrize(
    ("target", "layers"), [*((t, None) for t in TARGETS), *((t, n) for t in LISTS for n in ([1], [0, 2]))], ids=str
)
def test_targets_are_pefts(target, layers) -> None:
    peft = pytest.importorskip("peft")
    tf = pytest.importorskip("transformers")
    config = tf.LlamaConfig(**MODEL.config.to_hf())
    options = {"layers_to_transform": layers} if layers else {}
    model = peft.get_peft_model(
        tf.LlamaForCausalLM(config), peft.LoraConfig(target_modules=target, r=2, task_type="CAUSAL_LM", **options)
    )
    names = [name.removeprefix("base_model.model.") for name, _ in model.named_parameters()]
    theirs = {name.rpartition(".lora_A")[0] for name in names if ".lora_A" in name}
    assert set(chosen(target, layers)) == theirs and theirs


def test_all_linear_leaves_the_head_alone() -> None:
    assert len(chosen("all-linear")) == 21 and "lm_head" not in chosen("all-linear")


def test_order_is_the_models_and_nothing_twice() -> None:
    assert chosen(["v_proj", "q_proj", "self_attn.q_proj"], [0]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    ]


@pytest.mark.parametrize(
    ("target", "layers", "said"),
    [
        (["q_porj"], None, "'q_porj' names no module; did you mean 'q_proj'.*this model has"),
        (["proj"], None, "'proj' names no module"),
        ("q_proj", None, "'q_proj' matches no module.*down_proj"),
        ("q_proj(", None, "no regular expression"),
        (["q_proj"], [3], "no layer 3; this model has layers 0 to 2"),
        (["q_proj"], [-1], "no layer -1"),
        (["lm_head"], [0], "together select no module"),
        ([], None, "select no module"),
    ],
)
def test_what_selects_nothing_is_an_error(target, layers, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        chosen(target, layers)


def test_patterns_match_the_end_of_a_path() -> None:
    path = "model.layers.1.self_attn.q_proj"
    assert by_pattern({"k_proj": 1, "q_proj": 2}, path, 9) == 2
    assert by_pattern({r"layers\.1\..*": 3}, path, 9) == 3
    assert by_pattern({"proj": 1}, path, 9) == 9, "half a name is none"
    with pytest.raises(AdapterError, match="adapter.rank_pattern: 'q_prj' matches none"):
        check_patterns({"q_prj": 1}, [path], "adapter.rank_pattern")
    with pytest.raises(AdapterError, match="no regular expression"):
        check_patterns({"q_proj[": 1}, [path], "adapter.rank_pattern")


def test_layer_of() -> None:
    assert layer_of("model.layers.12.mlp.up_proj") == 12 and layer_of("lm_head") is None
