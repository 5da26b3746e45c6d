"""Every method that the folder of adapters holds obeys every law. A new file there is picked up by itself."""

from __future__ import annotations

import shutil

import pytest
from tests.laws import laws
from tests.laws.laws import Case

from tunesmith.adapters import find_method, kinds

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
CASES = [Case(find_method(kind), settings) for kind in kinds() for settings in ({}, *VARIANTS.get(kind, []))]


def test_variants_name_real_methods() -> None:
    assert set(VARIANTS) <= set(kinds()) and len(kinds()) >= 2


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("law", laws.ALWAYS, ids=lambda law: law.__name__)
def test_law(law, case: Case) -> None:
    law(case)


@pytest.mark.parametrize("case", [c for c in CASES if not c.random], ids=str)
@pytest.mark.parametrize("law", laws.DETERMINISTIC, ids=lambda law: law.__name__)
def test_law_without_dropout(law, case: Case) -> None:
    law(case)


@pytest.mark.parametrize("kind", kinds())
def test_compiled_is_eager(kind: str) -> None:
    laws.compiled_is_eager(Case(find_method(kind)))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="NOT TESTED: no C++ compiler here")
def test_compiled_to_machine_code_is_eager() -> None:
    laws.compiled_is_eager(Case(find_method("lora")), backend="inductor")
