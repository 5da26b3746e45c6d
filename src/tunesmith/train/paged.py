"""The paged optimizer on CUDA (QLoRA, arXiv:2305.14314, section 3): bitsandbytes' AdamW, its states in unified memory.

The GPU's driver moves pages of states to main memory when the GPU's own runs out, and back when a step needs them.
bitsandbytes pages the states of tensors of at least 100,000 values. Import this file only where it is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW
from torch import Tensor
from torch.nn import Parameter

from tunesmith.train.adamw import HoldsStates, Layout, in_eight_bits, state_layout

# bitsandbytes' names of states, and ours, which are torch's
_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq", "absmax1": "exp_avg_absmax", "absmax2": "exp_avg_sq_absmax"}


class PagedAdamW(AdamW, HoldsStates):
    """AdamW over groups with `params` and their `names`, paged; `eight`: in 8 bits, with the codes of adamw.py."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        eight: bool = False,
    ) -> None:
        super().__init__(
            groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0, optim_bits=8 if eight else 32, is_paged=True
        )
        self._place = {
            parameter: (index, at)
            for index, group in enumerate(self.param_groups)
            for at, parameter in enumerate(group["params"])
        }
        self._eight = {
            parameter: eight and in_eight_bits(self.param_groups[index]["names"][at], parameter)
            for parameter, (index, at) in self._place.items()
        }

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """bitsandbytes' settings of one parameter: also float32 states where ours are (see adamw.py)."""
        parameter = self.param_groups[gindex]["params"][pindex]
        return {**super().get_config(gindex, pindex, group), "optim_bits": 8 if self._eight[parameter] else 32}

    def states(self) -> Mapping[Tensor, Mapping[str, Tensor]]:
        """See `HoldsStates`."""
        self._settle()
        found = {}
        for parameter, entries in self.state.items():
            named = {_NAMES[key]: value for key, value in entries.items() if key in _NAMES}
            found[parameter] = {**named, "step": torch.tensor(float(entries["step"]))}
        return found

    def layout(self, parameter: Parameter) -> Layout:
        """See `HoldsStates`."""
        wide = parameter if self._eight[parameter] else parameter.float()
        return {**state_layout(wide, self._eight[parameter]), "step": ((), torch.float32)}

    def put(self, states: Mapping[Parameter, Mapping[str, Tensor]]) -> None:
        """See `HoldsStates`."""
        for parameter, entries in states.items():
            own = self.state[parameter]
            if not own:
                index, at = self._place[parameter]
                self.init_state(self.param_groups[index], parameter, index, at)
            self._settle()
            for theirs, name in _NAMES.items():
                if name in entries:
                    own[theirs].copy_(entries[name])
            own["step"] = int(entries["step"])

    def _settle(self) -> None:
        """Wait for the GPU: the host reads and writes the same memory."""
        for device in {p.device for p in self._place if p.is_cuda}:
            torch.cuda.synchronize(device)
