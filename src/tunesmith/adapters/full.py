"""Full fine-tuning: every parameter of the base is trained. The baseline that every other method is held against."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic.dataclasses import dataclass

from tunesmith.adapters.base import Placement
from tunesmith.config import STRICT
from tunesmith.model.llama import Llama
from tunesmith.model.seam import Seam


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FullSettings:
    """`kind: full` has no settings of its own."""


class Full:
    """The method of `kind: full`."""

    kind = "full"
    settings = FullSettings
    learning_rate = 3e-5
    trains_base = True  # so the base is held in float32: half precision would round small updates away

    def identity_at_init(self, settings: FullSettings) -> bool:
        """See `Method`."""
        return True

    def mergeable(self, settings: FullSettings) -> bool:
        """See `Method`."""
        return False

    def place(self, model: Llama, settings: FullSettings) -> Iterator[Placement]:
        """No deltas."""
        return iter(())

    def unfreeze(self, model: Llama, settings: FullSettings) -> Iterator[str]:
        """Every parameter of the base; a tied head is named once, as the embedding."""
        seams = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Seam))
        return (name for name, _ in model.named_parameters() if not name.startswith(seams))  # not another adapter's

    def lr_scale(self, name: str, settings: FullSettings) -> float:
        """One rate for all."""
        return 1.0


METHOD = Full()
