"""Data that tests and benchmarks share."""

import torch
from torch import Tensor


def deepfindr(seed: int = 0, rows: int = 300) -> tuple[Tensor, Tensor]:
    """DeepFindr's demo: x (row, 1) on [-7, 7], y (row,) ~ N(sin(x / 2), ((7 - |x|) / 16)^2)."""
    x = torch.linspace(-7, 7, rows)
    noise = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    return x[:, None], torch.sin(x / 2) + (7 - x.abs()) / 16 * noise
