"""Norm tuning: the weights of the norms are trained, and nothing else   (arXiv:2312.11420).

    x / rms(x) * w        65 norms of 4,096 values are 266,240 parameters of LLaMA-7B

PEFT calls it LN_TUNING and stores the trained weights themselves, so files go both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tunesmith.adapters import peft_config as peft
from tunesmith.adapters.base import Adapter, Placement
from tunesmith.adapters.peft_targets import known_names
from tunesmith.adapters.targets import matching
from tunesmith.config import STRICT
from tunesmith.config.sections import Words
from tunesmith.model.llama import Llama, RMSNorm


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NormsSettings:
    """Settings under `adapter:` for `kind: norms`."""

    target_modules: str | Words | None = Field(
        default=None, description="Names of norms, or a regular expression; none is every norm."
    )


class Norms:
    """The method of `kind: norms`."""

    kind = "norms"
    settings = NormsSettings
    learning_rate = 1e-3
    peft_type = "LN_TUNING"
    trains_base = True

    def identity_at_init(self, settings: NormsSettings) -> bool:
        """See `Method`."""
        return True

    def mergeable(self, settings: NormsSettings) -> bool:
        """There are no deltas: what is trained is the base's own."""
        return True

    def place(self, model: Llama, settings: NormsSettings) -> Iterator[Placement]:
        """No deltas."""
        return iter(())

    def unfreeze(self, model: Llama, settings: NormsSettings) -> Iterator[str]:
        """The weights of the chosen norms. Raises AdapterError where an entry matches none."""
        return (f"{path}.weight" for path in select_norms(model, settings.target_modules))

    def lr_scale(self, name: str, settings: NormsSettings) -> float:
        """One rate for all."""
        return 1.0

    def to_peft(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`."""
        paths = [name.removesuffix(".weight") for name in adapter.base]
        chosen = adapter.settings.target_modules
        names = paths if isinstance(chosen, str) else chosen or {path.rpartition(".")[2] for path in paths}
        return (
            {"target_modules": sorted(names), "exclude_modules": None, "modules_to_save": None},
            {f"{path}.ln_tuning_layers.weight": adapter.base[f"{path}.weight"] for path in paths},
        )

    def from_peft(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Llama, where: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Exchangeable`. PEFT may tune other modules so as well (an embedding): those are refused by name."""
        peft.check_keys(config, ("target_modules",), (), where)
        names = peft.names(config, "target_modules", where)
        if isinstance(names, list):
            names = known_names(names, list(_sizes(model)), where, "norm")
        found = peft.plain_keys(tensors, where)
        keys = {path: f"{path}.ln_tuning_layers.weight" for path in select_norms(model, names, where)}
        sizes = _sizes(model)
        peft.check_tensors({key: (sizes[path],) for path, key in keys.items()}, found, where)
        return {"target_modules": names}, {f"{path}.weight": found[key][1] for path, key in keys.items()}


def select_norms(model: Llama, target: str | Sequence[str] | None = None, where: str = "adapter") -> list[str]:
    """Paths of the norms that `target` means: ends of paths, or one regular expression; None is all of them.

    Raises AdapterError where an entry matches nothing.
    """
    paths = list(_sizes(model))
    chosen = set(paths) if target is None else matching(target, paths, where)
    return [path for path in paths if path in chosen]


def _sizes(model: Llama) -> dict[str, int]:
    """Size of each norm by path."""
    return {path: len(norm.weight) for path, norm in model.named_modules() if isinstance(norm, RMSNorm)}


METHOD = Norms()
