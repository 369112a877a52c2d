"""Between CPU and GPU without waiting: neither for what was issued before, nor for what is issued after."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. From ordinary memory a copy of more than 64 KB waits until the GPU has done all it was
    given before, so it goes through page-locked memory."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()  # an expanded tensor cannot be pinned as it is
    return tensor.to(device, non_blocking=True)


class Readback:
    """A copy of `values` for the CPU, begun now, in the order of the device's current stream. `tensor()` waits until it
    is there and for nothing that was issued since, so reading a loss need not mean waiting for the optimizer. On a CPU
    it is a plain copy."""

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
