"""The settings of sparse attention: which earlier tokens a token sees. What they mean is in model/sparse.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from tunesmith.config.validate import shown, validate_section
from tunesmith.errors import ConfigError

Count = Annotated[int, Field(ge=1)]

# What each pattern needs, and what it takes beside that.
USES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "full": ((), ()),
    "local": (("window",), ()),
    "strided": (("stride",), ("window",)),
    "fixed": (("block",), ("columns",)),
    "factorized": (("stride",), ("window",)),
    "s2": (("group",), ()),
}


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class AttentionSettings:
    """Sparse attention; lengths are in tokens, and a setting that the pattern does not use is refused."""

    pattern: Literal["full", "local", "strided", "fixed", "factorized", "s2"] = Field(
        default="full",
        description="Which earlier tokens a token sees; s2 acts in training only, the others always.",
    )
    window: Count | None = Field(
        default=None,
        description="Last tokens seen, itself included: needed by local; strided sees them beside its own (none: not); "
        "those of factorized's local heads (none: `stride`).",
    )
    stride: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Distance of the tokens that strided, and factorized's other heads, see."
    )
    block: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Length of fixed's blocks: a token sees its own block."
    )
    columns: Count | None = Field(
        default=None, description="Last tokens of every earlier block that fixed sees too (none: 1)."
    )
    group: Annotated[int, Field(ge=2, multiple_of=2)] | None = Field(
        default=None, description="Length of s2's groups; LongLoRA takes a quarter of the context."
    )

    @model_validator(mode="after")
    def _fits_the_pattern(self) -> Self:
        needed, more = USES[self.pattern]
        given = {name for name in self.__dataclass_fields__ if name != "pattern" and getattr(self, name) is not None}
        if missing := [name for name in needed if name not in given]:
            raise ValueError(
                f"{self.pattern} needs {missing[0]}, such as {{pattern: {self.pattern}, {missing[0]}: 64}}"
            )
        if left := sorted(given - {*needed, *more}):
            uses = ", ".join((*needed, *more)) or "no setting"
            raise ValueError(f"{left[0]} does nothing with {self.pattern}, which uses {uses}; leave it out")
        if self.pattern == "fixed" and self.block is not None and (self.columns or 1) >= self.block:
            raise ValueError(f"columns {self.columns} of blocks of {self.block} are all of them; give fewer")
        return self

    def to_dict(self) -> dict[str, Any]:
        """What is set, as plain values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None}


def read_attention(value: Any) -> Any:
    """A mapping as settings; what is wrong with it as a ValueError, for the key that holds it."""
    if value is None or isinstance(value, AttentionSettings):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"should be a mapping, such as {{pattern: local, window: 256}}, not {shown(value)}")
    try:
        return validate_section(AttentionSettings, value, "")
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("configuration: ")) from None
