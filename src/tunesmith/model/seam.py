"""Seams: named, empty edit points in the model, and the context that every edit receives.

An adaptation method is a small `nn.Module` (a *delta*) placed in a seam under its adapter's name:

    value -> [ seam: delta "a" -> delta "b" ] -> value'        in the order of attachment; empty: the identity

A delta is called as `delta(value, host, ctx, given)`: `host` is the module that owns the seam (its weights may be
read), `given` is what else the seam knows (see the table in docs/adding-a-method.md), `ctx` all that is known of the
batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from tunesmith.model.cache import Cache
    from tunesmith.model.layout import Layout


@dataclass(frozen=True)
class Context:
    """What is known of the batch while the model runs.

    `layout` says which token sees which; `adapters` names those that act (None: every attached one); `cos` and `sin`
    are the rotary tables of the batch's positions, (tokens, head_dim / 2); `cache` is the caller's key/value cache,
    if any; `routes` gives the tokens that an adapter acts on, for batches whose segments use different adapters
    (absent: all).
    """

    layout: Layout
    cos: Tensor
    sin: Tensor
    adapters: tuple[str, ...] | None = None
    cache: Cache | None = None
    routes: dict[str, Tensor] = field(default_factory=dict)


class Seam(nn.ModuleDict):
    """A named place where adapters edit a value. Empty, it is the identity."""

    def forward(self, value: Any, host: nn.Module, ctx: Context, given: Any = None) -> Any:
        """Pass `value` through every active delta, in the order of attachment."""
        for name, delta in self.items():
            if ctx.adapters is None or name in ctx.adapters:
                value = (
                    self._routed(delta, ctx.routes[name], value, host, ctx, given)
                    if name in ctx.routes
                    else (delta(value, host, ctx, given))
                )
        return value

    @staticmethod
    def _routed(
        delta: Callable[..., Tensor], rows: Tensor, value: Tensor, host: nn.Module, ctx: Context, given: Any
    ) -> Tensor:
        """Edit only the tokens in `rows`; the others pass untouched."""
        some = given[rows] if isinstance(given, Tensor) else given
        return value.index_copy(0, rows, delta(value[rows], host, ctx, some))
