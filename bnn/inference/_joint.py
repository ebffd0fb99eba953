"""Joint: the log joint over all rows as a function of some entries of z, the others held."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bnn.data import Data
from bnn.handlers import At, is_statement
from bnn.inference._energy import Energy, Slot


class Joint:
    """Log p(data, z) at z = base with s in some of its entries; sums over one pass of the rows.

    The Jacobian of the free sites is included, so that a Gaussian in s is one on the real line;
    that of the held ones is a constant and left out.

    Attributes:
        base: z, (size of z,).
        slots: the free sites.
        index: their entries of z, (size of s,).

    Args:
        energy: the log joint of a batch.
        data: the rows.
        batch_size: rows in a batch of the pass; None takes all at once.
        base: z, whose entries are kept where they are not free.
        free: names of the free sites, in any order.
    """

    def __init__(
        self, energy: Energy, data: Data, batch_size: int | None, base: Tensor, free: Sequence[str]
    ):
        self.energy, self.data, self.batch_size, self.base = energy, data, batch_size, base.detach()
        self.slots = [slot for slot in energy.slots if slot.name in free]
        spans = [torch.arange(slot.start, slot.start + slot.size) for slot in self.slots]
        self.index = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.long)

    @property
    def start(self) -> Tensor:
        """The free entries at the base."""
        return self.base[self.index]

    @property
    def first(self) -> tuple[Any, ...]:
        """The first batch of a pass: what a prior that reads its inputs is given."""
        return self.data.tensors if self.data.loader is not None else next(iter(self.batches()))

    def held(self, s: Tensor, free: Sequence[str]) -> "Joint":
        """The same around s, of fewer sites."""
        return Joint(self.energy, self.data, self.batch_size, self.lift(s), free)

    def lift(self, s: Tensor) -> Tensor:
        """The whole z at s, (*, size of s) -> (*, size of z)."""
        base = self.base.expand(*s.shape[:-1], -1)
        return base.index_copy(-1, self.index, s.to(self.base.dtype))

    def batches(self) -> Iterator[tuple[Any, ...]]:
        """One pass."""
        return self.data.once(self.batch_size)

    def likelihood(self, s: Tensor, batch: tuple[Any, ...]) -> Tensor:
        """Log p(batch | s), scaled to all rows."""
        return self.terms(s, batch)[0]

    def prior(self, s: Tensor, batch: tuple[Any, ...]) -> Tensor:
        """Log p(s), the Jacobian of the free sites included."""
        return self.terms(s, batch)[1]

    def terms(
        self, s: Tensor, batch: tuple[Any, ...], elsewhere: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Both; see `Energy.terms`."""
        z = self.lift(s)
        likelihood, prior = self.energy.terms(z, batch, jacobian=False, elsewhere=elsewhere)
        for slot in self.slots:
            if not slot.real:
                part = z[slot.span].reshape(slot.free)
                jacobian = slot.transform.log_abs_det_jacobian(part, slot.transform(part))
                prior = prior + jacobian.sum()
        return likelihood, prior

    def gradient(self, s: Tensor, elsewhere: Any = None) -> tuple[float, Tensor]:
        """The log joint at s and its gradient, (size,) in float64, over one pass."""
        s = s.detach().to(self.base.dtype).requires_grad_()
        values, slopes = [0.0, 0.0], [torch.zeros(len(s), dtype=torch.float64) for _ in range(2)]
        rows = 0
        with torch.enable_grad():
            for number, batch in enumerate(self.batches()):
                count = len(batch[-1])  # scaled to all rows: weighed by its own
                rows += count
                terms = self.terms(s, batch, elsewhere)
                for which, weight in ((0, count), (1, 1.0))[: 2 if number == 0 else 1]:
                    values[which] += weight * float(terms[which].detach())
                    slopes[which] += weight * slope_of(terms[which], s).double()
        return values[0] / rows + values[1], slopes[0] / rows + slopes[1]

    def name(self, entry: int) -> tuple[str, int]:
        """The site that an entry of s belongs to, and its place there."""
        place = int(self.index[entry])
        slot = next(s for s in self.slots if s.start <= place < s.start + s.size)
        return slot.name, place - slot.start

    def slot(self, name: str) -> Slot | None:
        """A free site's place, or None."""
        return next((slot for slot in self.slots if slot.name == name), None)

    def run(self, s: Tensor, batch: tuple[Any, ...]) -> list[Any]:
        """Runs the model at s; the messages of its observed statements."""
        with _Observed() as seen, At(self.energy.values(self.lift(s))):
            self.energy.model(*batch)
        return seen.met


def slope_of(value: Tensor, s: Tensor) -> Tensor:
    """The gradient of a number in s; 0 where it does not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(s)
    (slope,) = torch.autograd.grad(value, s, retain_graph=True, allow_unused=True)
    return torch.zeros_like(s) if slope is None else slope


class _Observed(Messenger):
    """Keeps the messages of observed statements and factors."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[Any] = []

    def _pyro_post_sample(self, message: Any) -> None:
        if message["is_observed"] and (
            is_statement(message) or message["infer"].get("is_auxiliary")
        ):
            if not message["infer"].get("_deterministic"):
                self.met.append(dict(message))
