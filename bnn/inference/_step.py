"""Step: the objective, its gradient and the move they lead to as one function of tensors.

Everything that changes from step to step is an argument of that function: the leaves, the state of
the rule that moves them (Adam's moments), the rate, the weight of the KL, the noise, the minibatch.
So it can be traced once and compiled, and eager and compiled steps are the same mathematics on the
same noise. Several parameter sets (members) step together: then the objective has a value for each,
and so has every leaf on its first axis. One whose objective or gradient is not finite stays where
it is, alone, or goes back to where it was at most `BACK` steps before and both were finite.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from bnn import processes
from bnn.chunks import Work
from bnn.errors import CheckpointError, PerformanceWarning, outside
from bnn.handlers import branch, seeded, singular
from bnn.inference._compile import compiled, first_line, graph_of

Objective = Callable[[Mapping[str, Tensor], tuple[Any, ...], Tensor, tuple[Tensor, ...]], Tensor]
"""Of leaves, a batch, the weight of the KL and noise: () or (member,); larger is better."""

_MEMORY = (0.9, 0.99)  # Adam's. A scale starts many times too wide, with gradients thousands of
# times those at the end: .999 would divide by them for 7,000 steps more
_TINY = 1e-8
_COMPILING = 3.0  # seconds that a compilation takes, between its first time and the cached one
_CALL, _NUMBER = 5e-6, 0.1e-9  # seconds that it saves for each operation and number of a step
BACK = 20  # steps between the points that a member may go back to
_FEW = 1_000  # steps: below, the operations are only counted where leaves are as many numbers
_TOUCHED = 40  # as would repay it, each being read or written so often in a step


def everyone(new: Tensor, old: Tensor) -> Tensor:
    """The `kept` of a step that no member leaves out."""
    return new


class Rule(ABC):
    """How a step moves the leaves, up the gradient. All that it remembers lies in the state."""

    @abstractmethod
    def begin(self, leaves: Mapping[str, Tensor], count: Tensor) -> dict[str, Any]:
        """The state before the first step: a tree of tensors; `count` is 0, () or (member,)."""

    @abstractmethod
    def move(
        self,
        leaves: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        state: Mapping[str, Any],
        rate: Tensor,
        noise: tuple[Tensor, ...],
        kept: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Changes leaves and state in place: `old.copy_(kept(new, old))`.

        `kept` gives the old where the step of a member is left out, else the new; where it is
        `everyone`, a rule may spare itself the copies.
        """

    @abstractmethod
    def midway(self, state: Mapping[str, Any], gradients: Mapping[str, Tensor]) -> None:
        """Fills a state as a fit on its way may hold it: where routes are compared."""


class Adam(Rule):
    """Kingma and Ba (2015), Adam: a method for stochastic optimization."""

    def begin(self, leaves: Mapping[str, Tensor], count: Tensor) -> dict[str, Any]:
        """See `Rule`."""
        zeros = lambda: {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        return {"mean": zeros(), "square": zeros(), "count": count}

    def move(
        self,
        leaves: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        state: Mapping[str, Any],
        rate: Tensor,
        noise: tuple[Tensor, ...],
        kept: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """See `Rule`."""
        count = state["count"]
        count.copy_(kept(count + 1, count))
        biased = [1 - memory**count for memory in _MEMORY]  # 0 before the first step, and kept
        for name, leaf in leaves.items():
            mean, square, gradient = state["mean"][name], state["square"][name], gradients[name]
            if kept is everyone:  # large leaves are bound by memory: one temporary in place of five
                mean.lerp_(gradient, 1 - _MEMORY[0])
                square.mul_(_MEMORY[1]).addcmul_(gradient, gradient, value=1 - _MEMORY[1])
                scale = (square * over(1 / biased[1], leaf)).sqrt_().add_(_TINY)
                scale.reciprocal_().mul_(mean).mul_(over(rate / biased[0], leaf))
                leaf.add_(scale)
                continue
            mean.copy_(kept(torch.lerp(gradient, mean, _MEMORY[0]), mean))
            square.copy_(kept(torch.lerp(gradient * gradient, square, _MEMORY[1]), square))
            scale = (square * over(1 / biased[1], leaf)).sqrt_().add_(_TINY)
            leaf.copy_(kept(torch.addcdiv(leaf, over(rate / biased[0], leaf) * mean, scale), leaf))

    def midway(self, state: Mapping[str, Any], gradients: Mapping[str, Tensor]) -> None:
        """Moments as large as the gradient.

        From zero Adam takes its sign alone, and rounding would turn that of a small one.
        """
        state["count"].add_(3.0)
        for name, gradient in gradients.items():
            size = torch.nan_to_num(gradient).norm() / max(gradient.numel(), 1) ** 0.5
            state["mean"][name].copy_(size * torch.randn_like(gradient))
            state["square"][name].copy_(size.square() * (0.5 + torch.rand_like(gradient)))


def over(each: Tensor, leaf: Tensor) -> Tensor:
    """One number of each member, shaped to multiply a leaf, (member, *)."""
    return each.reshape((*each.shape, *[1] * (leaf.ndim - each.ndim)))


class Step:
    """One step, whole; changes the leaves and the state in place.

    Attributes:
        names: "objective", then the leaves: what may turn out not finite.
        state: that of the rule, and the running average of the leaves and its count.
        route: "eager" or "compiled".
        good: leaves and state that members go back to; None where they stay.
        lost: the leaves from which a member last went back.

    Args:
        objective: what to maximise.
        leaves: tensors to optimise, by name; (member, *) each where there are members.
        noise: draws what the objective takes as noise, of a batch. Batches of the same shapes have
            noise of the same shapes.
        members: parameter sets that step together; None where the objective is one number.
        averaging: keeps the running average of the leaves.
        rule: how the leaves are moved; it is given the same noise as the objective.
        back: members go back, see above. A chain does not: it would not be one.
    """

    def __init__(
        self,
        objective: Objective,
        leaves: Mapping[str, Tensor],
        noise: Callable[[tuple[Any, ...]], tuple[Tensor, ...]] = lambda batch: (),
        members: int | None = None,
        averaging: bool = False,
        rule: Rule | None = None,
        back: bool = False,
    ):
        self.objective, self.noise, self.leaves = objective, noise, dict(leaves)
        self.rule = rule or Adam()
        self.names = ["objective", *self.leaves]
        lead = () if members is None else (members,)
        first = next(iter(self.leaves.values()))
        numbers = {"device": first.device, "dtype": first.dtype}
        self.state = self.rule.begin(self.leaves, torch.zeros(lead, **numbers))
        if averaging:
            average = {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}
            self.state |= {"average": average, "averaged": torch.zeros(lead, **numbers)}
        self.route = "eager"
        self.good, self.steps = self._present() if back else None, 0
        self.lost: dict[str, Tensor] = self.leaves
        self.cause: Exception | None = None  # of a step without an objective: what was raised
        self._rate, self._weight = torch.zeros(lead, **numbers), torch.zeros((), **numbers)
        self._given: Any = None
        self._program: Any = None
        self._fits: Callable[[tuple[Any, ...]], bool] = lambda batch: False

    def __call__(
        self, batch: tuple[Any, ...], rates: list[float], weight: float
    ) -> list[tuple[float, str]]:
        """Steps every member; of each its objective before the step, and what was not finite."""
        if self._given != (rates, weight):
            self._rate.copy_(torch.tensor(rates).reshape(self._rate.shape))
            self._weight.fill_(weight)
            self._given = (list(rates), weight)
        noise = self.noise(batch)
        fresh = self.good is not None and self.steps % BACK == 0
        before = self._present() if fresh else None
        self.cause = None
        try:
            if self._program is not None and self._fits(batch):
                outcome = self._program(batch, noise)
            else:
                state = self.state, self._rate, self._weight
                outcome = self._eager(self.leaves, *state, noise, batch)
        except RuntimeError as error:  # which member it was is not told, and all count as lost
            if not singular(error) or processes.current() is not None:
                raise
            self.cause = error
            outcome = torch.stack([torch.full_like(self._rate, torch.nan), 0 * self._rate])
        values, bad = outcome.reshape(2, -1).tolist()
        self.steps += 1
        if self.good is not None and min(bad) < len(self.names):
            self._go_back([which < len(self.names) for which in bad], before or self.good)
        elif before is not None:
            self.good = before
        names = [*self.names, ""]
        return [(value, names[int(which)]) for value, which in zip(values, bad, strict=True)]

    def mark(self) -> None:
        """Makes the next step's start a point to go back to, if it turns out finite."""
        self.steps = 0

    def _present(self) -> dict[str, Any]:
        return tree_map(lambda t: t.detach().clone(), {"leaves": self.leaves, "state": self.state})

    def _go_back(self, bad: list[bool], before: dict[str, Any]) -> None:
        """Sets the bad members back; `before` is where the others may go back to from now on."""
        lost = torch.tensor(bad, device=self._rate.device).reshape(self._rate.shape)
        chosen = lambda old, new: torch.where(over(lost, old), old, new)
        present = self._present()
        self.lost = present["leaves"]
        self.good = tree_map(chosen, self.good, before)
        self._set(tree_map(chosen, self.good, present))

    def _set(self, place: Mapping[str, Any]) -> None:
        """Leaves and state, in place: a compiled step knows them by their memory."""
        now = tree_flatten({"leaves": self.leaves, "state": self.state})[0]
        with torch.no_grad():
            for each, kept in zip(now, tree_flatten(dict(place))[0], strict=True):
                each.copy_(kept)

    def whole(self) -> dict[str, Any]:
        """All that the steps to come depend on, besides noise and batches: a tree of tensors."""
        now = {"leaves": self.leaves, "state": self.state}
        return {"now": now, "good": self.good, "steps": self.steps}

    def restore(self, whole: Mapping[str, Any]) -> None:
        """Sets leaves and state to what they were.

        Raises:
            CheckpointError: the leaves are not finite.
        """
        for name, leaf in whole["now"]["leaves"].items():
            if not torch.isfinite(leaf).all():
                raise CheckpointError(f'The state of a fit is not finite: its "{name}".')
        self._set(whole["now"])
        here = self._rate.device
        self.good = tree_map(lambda t: t.to(here) if isinstance(t, Tensor) else t, whole["good"])
        self.steps, self._given = whole["steps"], None

    def settle(self, index: tuple[int, ...]) -> None:
        """Sets the leaves of one member to their running average, which starts anew."""
        self.mark()
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf[index] = self.state["average"][name][index]
        self.forget(index)

    def forget(self, index: tuple[int, ...]) -> None:
        """Starts the running average of one member anew."""
        self.state["averaged"][index] = 0.0

    def _eager(
        self,
        leaves: Mapping[str, Tensor],
        state: Mapping[str, Any],
        rate: Tensor,
        weight: Tensor,
        noise: tuple[Tensor, ...],
        batch: tuple[Any, ...],
    ) -> Tensor:
        value = self.objective(leaves, batch, weight, noise)
        gradients = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
        with torch.no_grad():
            gradients, value = _whole(gradients, leaves), value.detach()
            if (shared := processes.current()) is not None:
                value, gradients = shared.mean(len(batch[-1]), value, gradients)
            return self._advance(leaves, gradients, state, value, rate, noise, False)

    def _pure(
        self,
        leaves: Mapping[str, Tensor],
        state: Mapping[str, Any],
        rate: Tensor,
        weight: Tensor,
        noise: tuple[Tensor, ...],
        batch: tuple[Any, ...],
    ) -> Tensor:
        """The same without autograd's tape, which a trace cannot see."""

        def total(leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            value = self.objective(leaves, batch, weight, noise)
            return value.sum(), value

        gradients, value = grad(total, has_aux=True)(dict(leaves))
        return self._advance(leaves, gradients, state, value, rate, noise, True)

    def _advance(
        self,
        leaves: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        state: Mapping[str, Any],
        value: Tensor,
        rate: Tensor,
        noise: tuple[Tensor, ...],
        masked: bool,
    ) -> Tensor:
        """Moves the leaves in place, save where the value or the gradient is not finite.

        Args:
            leaves: to be moved.
            gradients: of the same names.
            state: see `Step`.
            value: the objective, () or (member,).
            rate: the learning rate, of each member its own.
            noise: what the rule draws on.
            masked: True does not look at the numbers, as a trace must not.

        Returns:
            The value, and the place in `Step.names` of what is not finite, (2, *lead).
        """
        lead = value.shape
        flags = [torch.isfinite(value)]
        flags += [torch.isfinite(g.reshape((*lead, -1))).all(-1) for g in gradients.values()]
        numbered = [torch.where(flag, len(flags), number) for number, flag in enumerate(flags)]
        bad = torch.stack(numbered).amin(0)
        good = bad == len(flags)
        if not masked and good.all():
            kept = everyone
        else:
            kept = lambda new, old: torch.where(over(good, old), new, old)
        self.rule.move(leaves, gradients, state, rate, noise, kept)
        if "average" in state:
            share = 1 / state["averaged"].add_(good.to(value.dtype))
            for name, leaf in leaves.items():
                average = state["average"][name]
                if kept is everyone:
                    average.lerp_(leaf, over(share, leaf))
                else:
                    average.copy_(kept(torch.lerp(average, leaf, over(share, leaf)), average))
        return torch.stack([value, bad.to(value.dtype)])

    def hasten(
        self,
        steps: float,
        batches: list[tuple[Any, ...]],
        seed: np.random.SeedSequence,
        announce: Callable[[], None] = lambda: None,
    ) -> bool:
        """Compiles the step, if so many would repay it; True if it did.

        The decision depends on the model and on the count alone, never on a clock: the same fit
        takes the same route.

        Args:
            steps: how many are expected.
            batches: the first two; where they are the same object all steps see it.
            seed: of the points at which the compiled step is compared with the eager one.
            announce: called before the seconds that it takes.
        """
        size = sum(leaf.numel() for leaf in self.leaves.values())
        if steps < _FEW and _TOUCHED * size * _NUMBER * steps < _COMPILING:
            return False
        try:
            return self._hasten(steps, batches, seed, announce)
        except RuntimeError as error:
            if not singular(error):
                raise
            return _stays_eager(f"near the start it fails by {first_line(error)}", "")

    def _hasten(
        self,
        steps: float,
        batches: list[tuple[Any, ...]],
        seed: np.random.SeedSequence,
        announce: Callable[[], None],
    ) -> bool:
        with seeded(seed):
            point = self._point(branch(seed, 0), batches[0])
            with Work() as work:
                first = self._eager(*_copy(point))
            second = self._eager(*_copy(point))
            if work.random or not torch.equal(first, second):
                return False
            if (work.operations * _CALL + work.numbers * _NUMBER) * steps < _COMPILING:
                return False
            announce()
            try:
                graph, trial = self._traced(point, batches)
            except Exception as error:  # a branch on a value, an operation without a trace
                cure = "Write the model with tensor operations, without branches on values."
                return _stays_eager(first_line(error), cure)
            try:
                program = compiled(graph, *trial)
            except Exception as error:
                cure = "Is there a C++ compiler (g++ or clang) on the path?"
                return _stays_eager(first_line(error), cure)
            fixed = batches[0] is batches[1]
            for number, batch in enumerate(batches):
                if _kinds(batch) != _kinds(batches[0]):
                    continue  # a last, smaller one, which is run eagerly
                point = self._point(branch(seed, number + 1), batch)
                exact, tried = _copy(point), _copy(point)
                (outcome,) = program(*_flat(tried[:-1], () if fixed else tried[-1]))
                if not _close((*tried[:2], outcome), (*exact[:2], self._eager(*exact)), point[0]):
                    return _stays_eager("it gave other numbers", "")
        self._use(program, batches[0], fixed)
        return True

    def _traced(
        self, point: tuple[Any, ...], batches: list[tuple[Any, ...]]
    ) -> tuple[Any, list[Tensor]]:
        """The step's graph, and arguments for it. A batch that never changes is a constant."""
        fixed = batches[0] is batches[1]
        *rest, batch = point
        flat, layout = tree_flatten(rest)
        count = len(flat)

        def step(*flat: Tensor) -> tuple[Tensor]:
            leaves, state, rate, weight, noise = tree_unflatten(list(flat[:count]), layout)
            given = batch if fixed else flat[count:]
            return (self._pure(leaves, state, rate, weight, noise, given),)

        examples = lambda: _flat(_copy(point)[:-1], () if fixed else batch)
        return graph_of(step, *examples()), examples()

    def _use(self, program: Callable[..., Tensor], first: tuple[Any, ...], fixed: bool) -> None:
        standing = _flat((self.leaves, self.state, self._rate, self._weight), ())
        kinds = _kinds(first)

        def run(batch: tuple[Any, ...], noise: tuple[Tensor, ...]) -> Tensor:
            return program(*standing, *noise, *(() if fixed else batch))[0]

        def fits(batch: tuple[Any, ...]) -> bool:
            if fixed:
                return batch is first
            return _kinds(batch) == kinds

        self._program, self._fits, self.route = run, fits, "compiled"

    def _point(self, seed: np.random.SeedSequence, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments at which routes are compared: leaves not far off, the state of a fit midway."""
        with seeded(seed):
            noise = self.noise(batch)
            leaves = {
                name: (leaf.detach() + 0.1 * torch.randn_like(leaf)).requires_grad_()
                for name, leaf in self.leaves.items()
            }
            value = self.objective(leaves, batch, self._weight + 0.5, noise)
            gradients = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
            state = tree_map(torch.zeros_like, self.state)
            self.rule.midway(state, _whole(gradients, leaves))
            if "averaged" in state:
                state["averaged"] += 3.0
            return leaves, state, self._rate + 0.01, self._weight + 0.5, noise, batch


def _kinds(batch: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return [(each.shape, each.dtype) for each in batch]


def _whole(gradients: Any, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name; 0 for a leaf that the objective does not use."""
    pairs = zip(leaves.items(), gradients, strict=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in pairs}


def _copy(point: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a step whose leaves and state are the copy's own."""
    copied = lambda t: t.detach().clone().requires_grad_(t.requires_grad)
    return *tree_map(copied, point[:2]), *point[2:]


def _flat(rest: Any, batch: tuple[Any, ...]) -> list[Tensor]:
    return [each.detach() for each in tree_flatten((rest, batch))[0]]


def _close(first: Any, second: Any, leaves: Mapping[str, Tensor]) -> bool:
    """True if two steps agree to rounding, measured against the largest entry of each tensor."""
    start = {name: leaf.detach() for name, leaf in leaves.items()}
    moved = lambda outcome: ({k: outcome[0][k].detach() - v for k, v in start.items()}, outcome[1:])
    pairs = zip(*(tree_flatten(moved(each))[0] for each in (first, second)), strict=True)
    for a, b in pairs:
        tolerance = 1e-4 if b.dtype == torch.float32 else 1e-9
        finite = torch.isfinite(b)
        if not torch.equal(finite, torch.isfinite(a)):
            return False
        if not finite.any():
            continue
        a, b = a[finite], b[finite]
        if float((a - b).abs().max()) > tolerance * float(b.abs().max()):
            return False
    return True


def _stays_eager(reason: str, cure: str) -> bool:
    """Says why a step that ought to be compiled is not; False."""
    warnings.warn(
        f"The step could not be compiled ({reason}), so it runs as the model is written: the same "
        f"fit, only slower. {cure}".rstrip(),
        PerformanceWarning,
        stacklevel=outside(),
    )
    return False
