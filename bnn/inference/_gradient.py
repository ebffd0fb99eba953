"""Gradient: the potential -log p(z, data) and its gradient, for many chains at a time, fast.

Routes, the fastest first:

    compiled   one program of machine code for all lanes; needs a C++ compiler and seconds to build
    traced     the model's tensor operations without its Python, run by TorchScript
    vmapped    the model itself, lifted over lanes by torch.func.vmap
    looped     the model itself, lane after lane, differentiated by autograd

A faster route can be wrong without a word (a random operation, a branch on a value), so each is
used only after it has agreed with the model itself at fresh points of both signs: standard normals,
whatever they are to the model, and draws of its prior, where the density is finite.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from bnn.chunks import Work
from bnn.errors import ModelError, PerformanceWarning, outside
from bnn.handlers import branch, generator, singular
from bnn.inference._compile import compiled, first_line, graph_of, traced, work
from bnn.inference._energy import Energy
from bnn.run import standing

ROUTES = ("compiled", "traced", "vmapped", "looped")
_COMPILING = 3.0  # seconds that a compilation takes, between its first time and the cached one
_CALL, _NUMBER = 0.4e-6, 0.35e-9  # seconds saved by it in a call, for each operation and number
_CACHE = 250_000  # float32 numbers that an array may have and stay in a core's own cache (1 MiB)
_ROUGH = 0.01  # error of a site's own slopes that only a wrong graph has, rounding apart
_FEW = 4  # lanes: fewer at a time, and the calls cost more than the cache saves


class Gradient:
    """U(z) = -log p(z, data) and dU/dz at a fixed number of lanes.

    Every lane is computed by the same operations at the same place of the same shapes, whatever
    the other lanes hold: a chain does not depend on how many others there are.

    Attributes:
        route: the one in use, see above.
        device: of the data, where it computes.
        block: lanes that one run of a graph computes; fewer than all where arrays of all of them
            would not stay in a core's cache.

    Args:
        energy: the log joint.
        lanes: flat vectors in a call.
        seed: of the points at which routes are compared.
        route: None takes "traced" where it is right, until `hasten` compiles; else this one.

    Raises:
        ModelError: the log density is random beyond the sample statements.
    """

    def __init__(
        self, energy: Energy, lanes: int, seed: np.random.SeedSequence, route: str | None = None
    ):
        self.energy, self.lanes = energy, lanes
        self._sizes = [slot.size for slot in energy.slots]
        args = energy.data.tensors
        self.device = args[-1].device

        def potential(z: Tensor) -> Tensor:
            return -energy.log_joint(z, args)

        self._potential = potential
        self._vmapped = vmap(grad_and_value(potential))
        points = [energy.starts(lanes, branch(seed, 3))]
        points += [
            torch.randn(lanes, energy.size, generator=generator(branch(seed, k))) * scale
            for k, scale in enumerate((0.5, 0.5, 1.0))
        ]
        self._points = points + [-p for p in points]
        with Work() as seen:
            self._exact = [self._looped(self._points[0])]
        self._exact += [self._looped(p) for p in self._points[1:]]
        self.block = lanes
        while self.block * seen.largest > _CACHE and self.block % 2 == 0 and self.block > _FEW:
            self.block //= 2
        self._check_deterministic()
        self._graph: Any = None
        self._hastened, self._reason = False, ""
        self.route, self._call = "looped", self._looped
        wanted = ROUTES.index(route or "traced")
        for name in ("vmapped", "traced", "compiled"):
            if ROUTES.index(name) >= wanted:
                self._try(name)
        if ROUTES.index(self.route) > wanted and self.route != "traced":
            warnings.warn(
                f"The model could not be traced ({self._reason}): Pyro runs at every gradient, by "
                f"route {self.route!r}, ten times slower or more, to draws of the same law. "
                "Write it with tensor operations, without branches on values, to make it fast.",
                PerformanceWarning,
                stacklevel=outside(),
            )

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(lane, size) -> potential (lane,) and gradient (lane, size), on the CPU.

        Where a matrix has no factors the potential is inf or NaN.
        """
        gradient, value = self._whole(self._call, z.to(self.device))
        return value.cpu(), gradient.cpu()

    def _whole(self, call: Callable[[Tensor], Any], z: Tensor) -> tuple[Tensor, Tensor]:
        """A call that a lane without an answer does not end; others are as they would be."""
        try:
            return call(z)
        except RuntimeError as error:
            if not singular(error):
                raise
        gradients, values = self._looped(z)
        lost = values == torch.inf
        try:
            gradients, values = call(torch.where(lost[:, None], self._points[0], z))
        except RuntimeError as error:
            if not singular(error):
                raise  # else: factors that one order of sums has, and another has not
        gradients = gradients.masked_fill(lost[:, None], torch.nan)
        return gradients, values.masked_fill(lost, torch.inf)

    def hasten(self, calls: float, announce: Callable[[], None] = lambda: None) -> bool:
        """Compiles, if so many calls would repay it; True if it did.

        The decision depends on the model and the count alone, never on a clock: the same fit takes
        the same route.

        Args:
            calls: that are still to come.
            announce: called before the seconds that it takes.
        """
        if (
            self._hastened
            or self.route != "traced"
            or standing()
            or self._saving() * calls < _COMPILING
        ):
            return False
        announce()
        self._hastened = True  # what failed once would fail again, seconds later
        return self._try("compiled")

    def _saving(self) -> float:
        operations, numbers = (each * self.lanes // self.block for each in work(self._graph))
        return operations * _CALL + numbers * _NUMBER

    def _try(self, name: str) -> bool:
        """Takes a route if it can be had and agrees with the model itself."""
        try:
            call = self._built(name)
            found = (self._whole(call, p) for p in self._points)
            agrees = all(self._agrees(each, k) for k, each in enumerate(found))
        except Exception as error:  # a branch on a value, an operation without a trace or code
            self._reason, agrees = first_line(error), False
            cure = " Is there a C++ compiler (g++ or clang) on the path?"
        else:
            self._reason, cure = "" if agrees else "its graph gives other numbers", ""
            if agrees:
                self.route, self._call = name, call
        if not agrees and name == "compiled":
            warnings.warn(
                f"The gradient could not be compiled ({self._reason}): it runs by the slower route "
                f"{self.route!r}, to draws of the same law.{cure}",
                PerformanceWarning,
                stacklevel=outside(),
            )
        return agrees

    def _agrees(self, found: tuple[Tensor, ...], number: int) -> bool:
        """True if a route's result at a point is the model's own but for rounding.

        Each site's slopes are looked at by themselves too: those of others can be so much larger
        that the site could be missing. Where they differ, shaking z by a few roundings tells how
        far a right graph could be off, since sums that cancel are all rounding.
        """
        found, exact = _finite(found), _finite(self._exact[number])
        if not _close(found, exact):
            return False
        off, own = self._by_site(found[0] - exact[0]), self._by_site(exact[0])
        if (off <= _ROUGH * own).all():
            return True
        z = self._points[number]
        shaken = [z * (1 + k * torch.finfo(z.dtype).eps) for k in (-16, -8, 8, 16)]
        noise = [self._by_site(self._looped(near)[0] - exact[0]) for near in shaken]
        return bool((off <= _ROUGH * own + 10 * torch.stack(noise).amax(0)).all())

    def _by_site(self, slopes: Tensor) -> Tensor:
        """The largest entry of each site over all lanes, (site,)."""
        size = slopes.nan_to_num(posinf=0.0, neginf=0.0).abs().amax(0)
        return torch.stack([each.amax() for each in size.split(self._sizes) if len(each)])

    def _built(self, name: str) -> Callable[[Tensor], Any]:
        if name == "vmapped":
            return self._vmapped
        few = self._points[0][: self.block].contiguous()
        if self._graph is None:
            self._graph = graph_of(self._vmapped, few)
        run = (traced if name == "traced" else compiled)(self._graph, few)
        if self.block == self.lanes:
            return run

        def by_blocks(z: Tensor) -> list[Tensor]:
            parts = zip(*(run(block) for block in z.split(self.block)), strict=True)
            return [torch.cat(each) for each in parts]

        return by_blocks

    def _looped(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gradients, values = [], []
        for lane in z:
            lane = lane.detach().requires_grad_()
            try:
                with torch.enable_grad():
                    value = self._potential(lane)
                    (gradient,) = torch.autograd.grad(value, lane)
            except RuntimeError as error:
                if not singular(error):
                    raise
                value, gradient = lane.new_full((), torch.inf), torch.full_like(lane, torch.nan)
            gradients.append(gradient)
            values.append(value.detach())
        return torch.stack(gradients), torch.stack(values)

    def _check_deterministic(self) -> None:
        """Two runs at a draw must agree; where a run draws random numbers, at every point.

        Drawing alone is no fault: a net built in the model draws weights, and replaces them.
        """
        before = torch.get_rng_state()
        for z, (_, exact) in zip(self._points, self._exact, strict=True):
            _, again = self._looped(z)
            if not torch.equal(again.nan_to_num(), exact.nan_to_num()):
                raise ModelError(
                    "The log density differs between two runs at the same draw: the model is "
                    "random beyond its sample statements. Is a dropout or batch norm layer in "
                    "training mode? Call net.eval()."
                )
            if torch.equal(before, torch.get_rng_state()):
                return


def _finite(result: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Without the slopes of lanes whose density is not finite, of which nobody asks for any."""
    gradient, value = result
    return gradient.masked_fill(~value.isfinite()[:, None], 0.0), value


def _close(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    """True if two results agree to rounding, measured against each lane's largest entry."""
    tolerance = 1e-4 if first[0].dtype == torch.float32 else 1e-9
    for a, b in zip(first, second, strict=True):
        finite = torch.isfinite(b)
        if not torch.equal(finite, torch.isfinite(a)):
            return False
        a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        size = 1 + b.abs().amax(1)
        if float(((a - b).abs().amax(1) / size).max()) > tolerance:
            return False
    return True
