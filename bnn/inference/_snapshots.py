"""Snapshots: copies of a tensor while it is fitted, for a picture that moves."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_FINER = 4  # times as many are kept on the way as are asked for, so that those picked lie evenly


class Snapshots:
    """Keeps copies of a tensor that changes in place, evenly spaced over the steps.

    Where a fit will end is not known while it runs: whenever there are too many copies, every
    other one goes and the next are twice as far apart.

    Args:
        tensor: what changes.
        count: copies at the end; 0 keeps none.
    """

    def __init__(self, tensor: Tensor, count: int):
        self.tensor, self.count = tensor, count
        self.stride, self.now = 1, 0
        self.kept: list[tuple[int, Tensor]] = []

    def __call__(self, step: int) -> None:
        """Notes the tensor after so many steps, once: a fit may go on from its very start."""
        self.now = step
        noted = bool(self.kept) and self.kept[-1][0] == step
        if self.count and step % self.stride == 0 and not noted:
            self.kept.append((step, self.tensor.detach().clone()))
        if len(self.kept) > _FINER * self.count:
            self.kept, self.stride = self.kept[::2], 2 * self.stride

    def state(self) -> dict[str, Any]:
        """As a tree of tensors and numbers."""
        steps = torch.tensor([step for step, _ in self.kept], dtype=torch.int64)
        copies = [copy for _, copy in self.kept]
        whole = torch.stack(copies) if copies else self.tensor.new_empty((0, *self.tensor.shape))
        return {"steps": steps, "copies": whole, "numbers": [self.stride, self.now]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets it back to that."""
        self.kept = list(zip(state["steps"].tolist(), state["copies"], strict=True))
        self.stride, self.now = state["numbers"]

    def picked(self) -> tuple[Tensor, Tensor]:
        """Steps taken before each copy, (copy,), and the copies, (copy, *); the last is now."""
        copies = [each for each in self.kept if each[0] < self.now]
        copies.append((self.now, self.tensor.detach().clone()))
        places = torch.linspace(len(copies) - 1, 0, self.count).round().long().unique().tolist()
        chosen = [copies[i] for i in places]
        return torch.tensor([step for step, _ in chosen]), torch.stack([copy for _, copy in chosen])
