"""Every method that the folder of adapters holds obeys every law. A new file there is picked up by itself."""

from __future__ import annotations

import shutil

import pytest
from tests.laws import laws
from tests.laws.laws import Case
from tests.laws.variants import VARIANTS

from tunesmith.adapters import find_method, kinds

NEEDS_LAYERS = {"llama_adapter_v2_image": 2}  # one that sees, one with prompts
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
    laws.compiled_is_eager(Case(find_method(kind)), layers=NEEDS_LAYERS.get(kind, 1))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="NOT TESTED: no C++ compiler here")
def test_compiled_to_machine_code_is_eager() -> None:
    laws.compiled_is_eager(Case(find_method("lora")), backend="inductor")
