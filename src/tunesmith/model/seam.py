"""Seams: named, empty edit points in the model, and the context that every edit receives.

An adaptation method is a small `nn.Module` (a *delta*) placed in a seam under its adapter's name:

    value -> [ seam: delta "a" -> delta "b" ] -> value'        in the order of attachment; empty: the identity

A delta is called as `delta(value, host, ctx, given)`: `host` is the module that owns the seam (its weights may be
read), `given` is what else the seam knows (see the table in docs/adding-a-method.md), `ctx` all that is known of the
batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tunesmith.model.cache import Cache
    from tunesmith.model.layout import Layout
    from tunesmith.model.recompute import Kept
    from tunesmith.model.sight import Sight
    from tunesmith.model.sparse import Pattern


@dataclass(frozen=True)
class Choice:
    """Which members of a bank act: member `index[i]` on row `rows[i]`, both (n,), sorted by member.

    `groups`: each member that acts with the number of its rows, in that order; plain numbers, so that nothing waits for
    the device.
    """

    rows: Tensor
    index: Tensor
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, members: np.ndarray, device: torch.device) -> Choice:
        """From the member of every row, (rows,); -1: none."""
        order = np.argsort(members, kind="stable")
        rows = order[members[order] >= 0]
        found, counts = np.unique(members[rows], return_counts=True)
        groups = tuple(zip(found.tolist(), counts.tolist(), strict=True))
        return cls(torch.from_numpy(rows).to(device), torch.from_numpy(members[rows]).to(device), groups)

    def moved(self, place: Tensor) -> Choice:
        """For rows numbered anew: row r is now place[r]; -1: it is left out."""
        members = np.full(int(place.max()) + 1 if len(place) else 0, -1)
        rows = place[self.rows]
        members[rows[rows >= 0].cpu().numpy()] = self.index[rows >= 0].cpu().numpy()
        return Choice.of(members, place.device)


@dataclass(frozen=True)
class Context:
    """What is known of the batch while the model runs.

    `layout` says which token sees which; `adapters` names those that act (None: every attached one); `cos` and `sin`
    are the rotary tables of the row's positions, (tokens, head_dim / 2); `cache` is the caller's key/value cache, if
    any. `routes` gives the rows that an adapter acts on, for batches whose segments use different adapters (absent:
    all). `virtual` gives the rows, (copies, virtual_tokens), that adapters put before the examples: the first `extra`
    rows of the row. `rows` says which of the layout's tokens the rows of an edited value are (None: all, in order).
    `pattern` is the sparse attention that acts (None: full), `dropout` that on attention's probabilities. `choice` says
    which member of a bank acts on which rows; on the others none does. `sight` is what the segments' images hold (None:
    no delta looks, or there is no image), `notes` what deltas at the embedding leave for theirs in the blocks. `kept`
    holds the block's products where the backward will run the rest of it again.
    """

    layout: Layout
    cos: Tensor
    sin: Tensor
    adapters: tuple[str, ...] | None = None
    cache: Cache | None = None
    routes: dict[str, Tensor] = field(default_factory=dict)
    virtual: dict[str, Tensor] = field(default_factory=dict)
    extra: int = 0
    rows: Tensor | None = None
    positions: Tensor | None = None  # of every token, from its example's own token 0; negative: a virtual token
    pattern: Pattern | None = None
    dropout: float = 0.0
    choice: dict[str, Choice] = field(default_factory=dict)
    sight: Sight | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)
    kept: Kept | None = None

    def alone(self, name: str) -> Context:
        """For rows that are no tokens of the batch, as a prompt's: only the adapter `name` acts, on all of them."""
        return replace(self, adapters=(name,), routes={}, virtual={}, choice={}, rows=None, sight=None)

    def narrowed(self, rows: Tensor) -> Context:
        """For a value that holds only these rows of the one that this context is for."""
        return replace(self, routes={}, choice={}, rows=rows if self.rows is None else self.rows[rows])

    def at(self, rows: Tensor) -> Context:
        """For rows (of the callers' tokens) taken out of the final hidden states: routes are numbered anew."""
        return self.only(rows) if self.by_row else self

    def only(self, rows: Tensor) -> Context:
        """For values that hold only some of the callers' tokens, each once; else, with routes, a ValueError."""
        if not self.by_row:
            return replace(self, rows=rows + self.extra)
        place = torch.full((self.layout.tokens,), -1, device=rows.device)
        place[rows + self.extra] = torch.arange(len(rows), device=rows.device)
        if len(rows) != int((place >= 0).sum()):
            raise ValueError("context: rows must be distinct")
        routes = {name: (found := place[index])[found >= 0] for name, index in self.routes.items()}
        moved = {name: chosen.moved(place) for name, chosen in self.choice.items()}
        choice = {name: chosen for name, chosen in moved.items() if chosen.groups}
        return replace(self, routes=routes, choice=choice, rows=rows + self.extra)

    @property
    def by_row(self) -> bool:
        """Do different adapters act on different rows?"""
        return bool(self.routes or self.choice)

    def own_positions(self) -> Tensor:
        """Of every row of an edited value, its position from its example's own token 0; negative: a virtual token."""
        positions = self.layout.positions if self.positions is None else self.positions
        return positions if self.rows is None else positions[self.rows]

    def to_answer(self) -> Tensor:
        """Of every row, how far before an answer's first token it stands: 1 is the prompt's last; -1: in an answer.

        Counted up to the most that an attached delta asks for (`answer_ends`); 0 beyond.
        """
        ends = self.layout.to_answer
        found = torch.full_like(self.layout.positions, -1) if ends is None else ends  # nobody counted: an answer's step
        return found if self.rows is None else found[self.rows]


class Seam(nn.ModuleDict):
    """A named place where adapters edit a value. Empty, it is the identity.

    A seam is `whole` where its deltas act on rows of their own (virtual tokens): routing does not cut the value there.
    """

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, value: Any, host: nn.Module, ctx: Context, given: Any = None) -> Any:
        """Pass `value` through every active delta, in the order of attachment."""
        for name, delta in self.items():
            if ctx.adapters is None or name in ctx.adapters:
                value = (
                    self._routed(delta, ctx.routes[name], value, host, ctx, given)
                    if name in ctx.routes and not self.whole
                    else delta(value, host, ctx, given)
                )
        return value

    def acting(self, ctx: Context) -> list[Any]:
        """The deltas that are active, in the order of attachment."""
        return [delta for name, delta in self.items() if ctx.adapters is None or name in ctx.adapters]

    def low_rank(self, ctx: Context) -> tuple[Tensor, Tensor, float] | None:
        """A, B and s where one delta acts, on every row, and adds s B A x to W x and nothing else; else None."""
        acting = self.acting(ctx)
        told = None if len(acting) != 1 or ctx.by_row else getattr(acting[0], "low_rank", None)
        return None if told is None else told()

    @staticmethod
    def _routed(
        delta: Callable[..., Tensor], rows: Tensor, value: Tensor, host: nn.Module, ctx: Context, given: Any
    ) -> Tensor:
        """Edit only the tokens in `rows`; the others pass untouched."""
        some = given[rows] if isinstance(given, Tensor) else given
        return value.index_copy(0, rows, delta(value[rows], host, ctx.narrowed(rows), some))
