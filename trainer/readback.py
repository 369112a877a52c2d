"""Figures on their way from a GPU, so that reading a loss does not mean waiting for the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """A copy of `values` for the CPU, begun now, in the order of the device's current stream. `tensor()` waits until it
    is there and for nothing that was issued since. On a CPU it is a plain copy."""

    def __init__(self, values: Tensor):
        values = values.detach()
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived: torch.cuda.Event | None = torch.cuda.Event()
            self._arrived.record()
        else:
            self._values, self._arrived = values.clone(), None

    def tensor(self) -> Tensor:
        """The values, on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values

    def tolist(self):
        return self.tensor().tolist()
