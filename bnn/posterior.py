"""Posterior: draws of a model's weights, whatever the method, and what can be done with them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from bnn import arguments, contract, markup
from bnn.calibration import log_score
from bnn.chunks import in_chunks
from bnn.data import Data, take, take_filled
from bnn.devices import on
from bnn.errors import DataError, ModelError
from bnn.handlers import (
    At,
    Capture,
    branch,
    over_draws,
    parameters,
    quiet_pyro,
    seeded,
    unvalidated,
)
from bnn.method import Method, Model, Tensors, name_of
from bnn.prediction import ROWS, Prediction, predict, rows_together
from bnn.sites import Sites, require_every_row
from bnn.summary import QUANTILES, Summary, checked_levels, summarize
from bnn.turns import alone

if TYPE_CHECKING:
    import os

    from torch.utils.data import DataLoader

    from bnn.diagnostics import Report

_PREDICT, _LIKELIHOOD = 1, 2  # branches of the seed tree, apart from the fit's


@dataclass(frozen=True, eq=False, kw_only=True)
class Posterior:
    """What a method knows of p(weights | data): draws, and the program to run at them.

    *chain* counts independent runs, whose agreement is a question of convergence; *draw* counts
    exchangeable samples. NUTS gives (chains, draws), variational inference (1, draws), K restarts
    (K, draws).

    Attributes:
        model: the user's model.
        method: the settings it was fitted with.
        data: what it was fitted to.
        sites: what the contract check found in the model.
        draws: latent site -> (chain, draw, *site), in the space that the model states. Sites
            inside the data plate belong to the training rows.
        params: trainable tensors that have no prior, and tensors of a fitted guide.
        stats: (chain, draw) each, under ArviZ's names: diverging, energy, tree_depth, lp, ...;
            log_q, log density of a draw on the real line under a guide or a Gaussian.
        history: objective at each step, (step,), for the methods that optimise; the ELBO for
            variational inference, the log joint for a mode.
        elbo: evidence lower bound of the fit, nats, where the method has one.
        log_evidence: log marginal likelihood, nats, where the method estimates it.
        snapshots: copies of draws while they were trained, (copy, chain, draw, *site), for the
            methods that were asked for some; see `frames`.
        snapshot_steps: steps taken before each copy, (copy,).
        count: (chain, draw) where the model has no global site, and so `draws` is empty.
        seed: the seed of the fit.
        seconds: how long the fit took; where it was stopped and gone on with, all its calls.
        complete: False of a fit that was stopped: the draws are what there was by then.

    Example:
        >>> import bnn, torch
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> model = bnn.models.linear(1, likelihood=bnn.models.likelihoods.Gaussian(0.1))
        >>> posterior = bnn.fit(model, x, 2 * x[:, 0], method=bnn.Laplace(steps=200, draws=100))
        >>> posterior.shape, posterior.draws["layers.0.weight"].shape
        ((1, 100), torch.Size([1, 100, 1, 1]))
        >>> posterior.predict(torch.zeros(3, 1)).y.shape  # chain, draw, row
        torch.Size([1, 100, 3])
    """

    model: Model
    method: Method
    data: Data
    sites: Sites
    draws: Tensors
    params: Tensors = field(default_factory=dict)
    stats: Tensors = field(default_factory=dict)
    history: Tensor | None = None
    elbo: float | None = None
    log_evidence: float | None = None
    snapshots: Tensors = field(default_factory=dict)
    snapshot_steps: Tensor | None = None
    count: tuple[int, int] = (1, 1)
    seed: int = 0
    seconds: float = math.nan
    complete: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """(chain, draw)."""
        first = next(iter(self.draws.values()), None)
        return self.count if first is None else (first.shape[0], first.shape[1])

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return self.data.observations.device

    def to(self, device: "str | torch.device") -> "Posterior":
        """The same posterior on a device, where it then predicts."""
        moved = lambda tensors: {k: _moved(v, device) for k, v in tensors.items()}
        data = replace(self.data, tensors=tuple(v.to(device) for v in self.data.tensors))
        return replace(
            self,
            data=data,
            draws=moved(self.draws),
            params=moved(self.params),
            snapshots=moved(self.snapshots),
        )

    @property
    def program(self) -> Model:
        """The callable that predicts: the model, or what the method made of it."""
        return self.method.program(self.model, self.params)

    @property
    def frames(self) -> "list[Posterior]":
        """The posterior while it was trained, one for each snapshot: a picture that moves.

        Each is a posterior like any other, whose history ends where it was taken; its last is this
        one. Empty for a method that was not asked for snapshots.
        """
        steps = [] if self.snapshot_steps is None else self.snapshot_steps.tolist()
        return [
            replace(
                self,
                draws=self.draws | {k: v[i] for k, v in self.snapshots.items()},
                history=None if self.history is None else self.history[:step],
                snapshots={},
                snapshot_steps=None,
            )
            for i, step in enumerate(steps)
        ]

    @overload
    def predict(
        self,
        batches: "DataLoader | Iterator[Any]",
        /,
        *,
        draws: int | None = None,
        seed: int = 0,
        mode: Literal["draws", "mean"] = "draws",
        quantiles: Iterable[float] = QUANTILES,
    ) -> Summary: ...

    @overload
    def predict(
        self,
        *inputs: Any,
        draws: int | None = None,
        seed: int = 0,
        seams: Sequence[str] = (),
        mode: Literal["draws", "mean"] = "draws",
    ) -> Prediction: ...

    @alone
    def predict(
        self,
        *inputs: Any,
        draws: int | None = None,
        seed: int = 0,
        seams: Sequence[str] = (),
        mode: Literal["draws", "mean"] = "draws",
        quantiles: Iterable[float] = QUANTILES,
    ) -> Prediction | Summary:
        """Runs the program at each draw on new rows.

        Sites inside the data plate are sampled anew: new rows have no fitted ones.

        Args:
            *inputs: the model's arguments without the observations, (row, *) each. The number of
                rows is free; all else is as in the fit. Or one `DataLoader` or other iterable of
                batches of them, with the observations or without: then rows are predicted as they
                come, and a `Summary` takes the place of draws that nothing could hold.
            draws: use this many of each chain's draws, evenly spread; None uses all.
            seed: of the noise.
            seams: deterministic sites with a row axis to keep beside the local ones, such as
                "hidden.0", in `Prediction.local`.
            mode: "mean" gives sites inside the data plate their mean in place of a draw. Draws of
                the global sites that are all the same are then run once: one deterministic pass.
            quantiles: which a `Summary` keeps.

        Returns:
            Draws of f and y, (chain, draw, row, *), and their moments; of batches a `Summary`, the
            same numbers without draws and, where the batches hold observations, log scores.

        Raises:
            DataError: the inputs are not of the kind that the model was fitted to.
            ModelError: the model does not run with its observations set to None; it announces no
                such seam; a site inside the data plate has no mean.
        """
        if mode not in ("draws", "mean"):
            raise ValueError(f'mode is {mode!r}. Pass "draws" or "mean".')
        values, shape = self._pooled(draws)
        if mode == "mean" and all(bool((v == v[:1]).all()) for v in values.values()):
            values, shape = {k: v[:1] for k, v in values.items()}, (1, 1)
        rowed = {name for name, seam in self.sites.seams.items() if seam.local}
        if isinstance(seams, str) or set(seams) - rowed:
            raise ModelError(
                f"seams is {seams!r}. Pass a list of names; the model announces, with a row axis, "
                f"{', '.join(sorted(rowed)) or 'none'}."
            )
        run = partial(
            self._predict, values, shape, branch(_root(seed), _PREDICT), means=mode == "mean"
        )
        if arguments.is_stream(inputs):
            if seams:
                raise ModelError("A Summary keeps no seams. Predict some rows at a time for them.")
            return self._summary(inputs[0], run, values, draws, checked_levels(quantiles))
        prediction = run(arguments.check_inputs(inputs, self.data), seams=frozenset(seams))
        at_seams = tuple(f"{seam}." for seam in rowed)
        shared = {
            name: value.reshape(*shape, 1, *value.shape[1:]).expand(
                *shape, prediction.y.shape[2], *value.shape[1:]
            )
            for name, value in values.items()
            if name not in self.sites.latent and name.startswith(at_seams)
        }
        return replace(prediction, local=prediction.local | shared)

    def _predict(
        self,
        values: Tensors,
        shape: tuple[int, int],
        root: Any,
        inputs: tuple[Tensor, ...],
        **options: Any,
    ) -> Prediction:
        with self._parameters(inputs):
            return predict(self.program, values, inputs, self.sites, root, shape, **options)

    def _summary(
        self,
        batches: Any,
        run: Callable[..., Prediction],
        values: Tensors,
        draws: int | None,
        levels: Tensor,
    ) -> Summary:
        """What `predict` gives of batches."""
        require_every_row(self.sites)
        stream = arguments.check_batches(batches, self.data)
        first = next(stream, None)
        inputs = len(self.data.names) - 1
        scored = first is not None and len(first) > inputs

        def together(some: tuple[Tensor, ...]) -> int:
            with quiet_pyro(), torch.no_grad(), self._parameters(some[:inputs]):
                args = (*some[:inputs], None)
                found = rows_together(self.program, values, args, self.sites)
            if found is None:
                raise ModelError(
                    "The model runs on all rows at once only: it has no data plate, or states how "
                    "many rows there are. Give its plate the number of its inputs, "
                    f'pyro.plate("data", len({self.data.names[0]})), or predict without batches.'
                )
            return found

        score = lambda rows, at: log_score(self._log_likelihood(rows, draws, origin=at))
        return summarize(
            chain([] if first is None else [first], stream),
            together,
            lambda rows, at: run(rows[:inputs], origin=at, kept={"y"}),
            score if scored else None,
            levels,
        )

    @alone
    def log_likelihood(self, *data: Any) -> Tensor:
        """Log p(y | x, draw) of each row, (chain, draw, row).

        Without arguments: of the training rows, at the fitted draws of the sites inside the data
        plate. With them: of new rows, where those sites are sampled anew.

        Args:
            *data: the model's arguments, observations included; or nothing.

        Raises:
            DataError: the data are not of the kind that the model was fitted to.
            ModelError: the model does not state its rows as independent.
        """
        args = self._training_tensors() if not data else arguments.check_arguments(data, self.data)
        return self._log_likelihood(args, trained=not data)

    def _log_likelihood(
        self,
        args: tuple[Tensor, ...],
        draws: int | None = None,
        *,
        trained: bool = False,
        origin: int = 0,
    ) -> Tensor:
        """See `log_likelihood`; `origin` is the place of the first row among more rows."""
        require_every_row(self.sites)
        if self.sites.subsampled and self.sites.locals and trained:
            raise ModelError(
                f'Draws of "{self.sites.locals[0]}" belong to the minibatch that the plate '
                f'"{self.sites.plate}" drew with them, not to all training rows. Pass the data, '
                "and the site is sampled anew."
            )
        axis = self.sites.row_axis
        if axis is None:
            raise ModelError(
                f'The rows of "{self.sites.observed}" are one statement, so no row has a '
                'likelihood of its own. Put it in a plate: with pyro.plate("data", len(x)).'
            )
        values, shape = self._pooled(draws, local=trained)
        rows, count = len(args[-1]), math.prod(shape)
        out = args[-1].new_empty((count, rows), dtype=torch.get_default_dtype())
        with quiet_pyro(), torch.no_grad(), self._parameters(args[:-1]):
            program = self.program
            block = self.sites.subsample_size or max(rows, 1)
            if rows > ROWS and not (self.sites.locals and trained):
                block = rows_together(program, values, args, self.sites) or rows
            if not trained:
                contract.check_rows(program, {k: v[0] for k, v in values.items()}, args, self.sites)
            for first in range(0, rows, block):
                batch = take(args, slice(first, first + block))
                if self.sites.subsampled:
                    batch = take_filled(args, first, block)
                at = _row_log_prob(program, batch, self.sites)

                def run(part: slice, first: int = first, at: Any = at) -> Tensor:
                    some = {k: v[part] for k, v in values.items()}
                    with seeded(branch(_root(0), _LIKELIHOOD, origin + first, part.start)):
                        return over_draws(at, some, part.stop - part.start)

                for part, each in in_chunks(run, count):
                    out[part, first : first + block] = each[:, : rows - first]
        return out.reshape(*shape, rows)

    @alone
    def deterministic(self, *names: str) -> Tensors:
        """Values of deterministic sites at the fitted draws and rows, (chain, draw, *site) each.

        Args:
            *names: which; default those outside the data plate and those with one number a row,
                without f, which `predict` gives.

        Raises:
            ModelError: the model has no such site.
        """
        args = self._training_tensors()
        values, shape = self._pooled(None, local=not self.sites.subsampled)
        known = self.sites.seams
        if self.sites.subsampled:
            known = {k: v for k, v in known.items() if not v.local}  # a run shows some rows only
        small = {k for k, v in known.items() if not v.local or len(v.shape) == 1}
        wanted = set(names) or small - {"f"}
        if unknown := wanted - set(known):
            raise ModelError(
                f"The model has no deterministic site {sorted(unknown)}; it announces "
                f"{sorted(known) or 'none'}"
                + (
                    " for the rows of its minibatch too: see predict."
                    if self.sites.subsampled
                    else "."
                )
            )
        if not wanted:
            return {}

        def at(draw: Tensors) -> Tensors:
            with Capture(self.sites.observed) as capture, At(draw):
                self.program(*args)
            return {k: capture.values[k] for k in wanted}

        def run(part: slice) -> Tensors:
            some = {k: v[part] for k, v in values.items()}
            return over_draws(at, some, part.stop - part.start)

        with quiet_pyro(), torch.no_grad(), self._parameters(args[:-1]), seeded(_root(0)):
            parts = [found for _, found in in_chunks(run, math.prod(shape))]
        return {
            k: torch.cat([p[k] for p in parts]).reshape(*shape, *parts[0][k].shape[1:])
            for k in self.sites.seams
            if k in wanted
        }

    def log_score(self, *data: Any) -> Tensor:
        """Log posterior predictive density of each row, nats, (row,).

        log (1/S) sum_s p(y | x, draw s): the mean over draws is inside the logarithm, and rows
        are apart (Gelman, Hwang, Vehtari 2014, eq. 5).
        """
        return log_score(self.log_likelihood(*data))

    def to_arviz(
        self,
        *,
        predictions: Prediction | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
    ) -> Any:
        """An ArviZ object: `InferenceData` on 0.x, `DataTree` on 1.x, the same groups on both.

        Args:
            predictions: from `predict`; becomes the groups predictions, predictions_constant_data.
            dims: variable -> what to call its own axes; default <variable>_dim_<axis>. Columns of
                an input x are the axis "x_column", with the names that they had: for a weight of
                each, `dims={"w": ["x_column"]}`.
            coords: axis -> labels of its places; default 0, 1, 2, ...

        Raises:
            DataError: no such variable; another number of axes, or of labels.
        """
        from bnn.export import to_arviz

        return to_arviz(self, predictions, dims, coords)

    def diagnose(self, *inputs: Any) -> "Report":
        """What can be said of the fit itself: has it reached the posterior, or anything at all.

        Chains are compared where the model is the same whichever weights make it, in f at some
        rows, the log density and single numbers such as a noise scale; R-hat of weights is told and
        never doubtful. What a method alone can tell (k-hat of a guide, diversity of members) stands
        beside it. `print` the report; `doubtful` lists what should not be passed over.

        Args:
            *inputs: rows at which f is looked at, as for `predict`; default up to 50 training rows.

        Raises:
            DataError: the inputs are not of the kind that the model was fitted to.
        """
        from bnn.diagnostics import diagnose

        return diagnose(self, *inputs)

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Writes one file: tensors and JSON, nothing that can be executed. See `bnn.load`.

        The model is code and stays out; hand it to `bnn.load` again.
        """
        from bnn.checkpoint import write

        write(self, path)

    def __repr__(self) -> str:
        sites = ", ".join(f"{k} {tuple(v.shape[2:])}" for k, v in list(self.draws.items())[:6])
        more = "" if len(self.draws) <= 6 else f", and {len(self.draws) - 6} more"
        elbo = "" if self.elbo is None else f", elbo {self.elbo:.2f}"
        stopped = "" if self.complete else "INCOMPLETE, "
        return (
            f"Posterior({stopped}{name_of(self.model)} by {self.method!r}: "
            f"{markup.runs(*self.shape)} of {sites}{more}; "
            f"{self.data.rows} rows{elbo}, {self.seconds:.1f} s)"
        )

    def _repr_html_(self) -> str:
        told = {"elbo": self.elbo, "log evidence": self.log_evidence}
        nats = "".join(f", {k} {v:.2f} nats" for k, v in told.items() if v is not None)
        rows = [
            (name, str(tuple(v.shape[2:])), _spread(v)) for name, v in list(self.draws.items())[:12]
        ]
        rows += [(f"and {len(self.draws) - 12} more", "", "")] if len(self.draws) > 12 else []
        return markup.paragraph(
            f"Posterior of {name_of(self.model)} by {markup.settings(self.method)}"
            + ("" if self.complete else ": INCOMPLETE, the fit was stopped"),
            f"{markup.runs(*self.shape, times='×')}, {self.data.rows:,} rows, "
            f"{self.seconds:.1f} s{nats}",
        ) + markup.table(("site", "shape", "mean ± sd"), rows)

    def _pooled(self, draws: int | None, local: bool = False) -> tuple[Tensors, tuple[int, int]]:
        """Global draws with chain and draw in one axis, thinned evenly, and (chain, draw)."""
        chains, have = self.shape
        want = have if draws is None else draws
        if isinstance(want, bool) or not isinstance(want, int):
            raise TypeError(f"draws is {draws!r}. Pass a whole number, or None for all.")
        if not 1 <= want <= have:
            raise ValueError(f"draws is {want}. Pass 1 to {have}, the draws of a chain.")
        keep = torch.linspace(0, have - 1, want).round().long()
        names = set(self.draws) if local else set(self.draws) - set(self.sites.locals)
        pooled = {k: v[:, keep].flatten(0, 1) for k, v in self.draws.items() if k in names}
        return pooled, (chains, want)

    def _training_tensors(self) -> tuple[Tensor, ...]:
        if self.data.loader is not None:
            raise DataError("The training rows came from a loader and are not kept. Pass the data.")
        return self.data.tensors

    @contextmanager
    def _parameters(self, inputs: tuple[Tensor, ...]) -> Iterator[None]:
        """The trainable leftovers as fitted, while the program runs."""
        with on(self.device), ExitStack() as stack:
            if self.sites.params:
                args = (*take(inputs, slice(0, 1)), None)
                with seeded(_root(0)):  # a run finds them, and what it draws is lost
                    stack.enter_context(parameters(self.model, args, self.params))
            yield


def _spread(draws: Tensor) -> str:
    """Mean and standard deviation of a single number; entries of a weight mean little alone."""
    if draws[0, 0].numel() != 1:
        return ""
    return f"{float(draws.double().mean()):.3g} ± {float(draws.double().std(correction=0)):.2g}"


def _moved(draws: Tensor, device: "str | torch.device") -> Tensor:
    """On a device; a mode that is repeated without taking memory still takes none."""
    if draws.ndim > 1 and draws.stride(1) == 0:
        return draws[:, :1].to(device).expand(draws.shape)
    return draws.to(device)


def _root(seed: int) -> Any:
    from bnn.fitting import seed_sequence

    return seed_sequence(seed)


def _row_log_prob(program: Model, args: tuple, sites: Sites) -> Callable[[Tensors], Tensor]:
    """Log p(y | x, draw), summed over everything but the row, as a function of the draw: (row,)."""

    def at(draw: Tensors) -> Tensor:
        with Capture(sites.observed) as capture, At(draw):
            program(*args)
        log_prob = unvalidated(capture.fn).log_prob(capture.value)
        if capture.mask is not None:
            log_prob = log_prob * capture.mask
        return (
            log_prob.movedim(sites.row_axis or 0, 0).flatten(1).sum(1)
            if log_prob.ndim > 1
            else log_prob
        )

    return at
