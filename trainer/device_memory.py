"""What this process, and everybody together, hold of a GPU: the measured side of a memory plan."""

from __future__ import annotations

import torch


def device_memory(device: torch.device | str = "cuda") -> dict[str, int]:
    """Bytes: `allocated` and `reserved`, the most since the last call that torch's allocator gave out and held in this
    process, and `device`, what all processes hold of the GPU now, CUDA contexts included. {} on a CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    found = {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "device": total - free,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return found
