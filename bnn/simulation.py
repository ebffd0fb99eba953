"""Simulation-based calibration: does a method find the posterior of data that the model makes?

Draw theta from the prior and y from the model at theta; then theta is a draw of p(. | y) like any
other. So the rank of q(theta, y) among q of draws that a method makes of p(. | y) is uniform over
data sets, whatever q, if the method is right. Ranks that crowd at both ends say that its posterior
is too narrow, in the middle too wide, at one end shifted.

    result = bnn.sbc(model, bnn.NUTS(), lambda: torch.randn(20, 2))
    print(result)
    bnn.plots.sbc(result)
"""

import hashlib
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bnn import contract, fitting
from bnn.arguments import argument_names
from bnn.calibration.uniform import Uniformity, uniformity
from bnn.data import tensors
from bnn.errors import ConvergenceWarning, DataError, FitError, ModelError, outside
from bnn.handlers import At, Capture, Score, branch, over_draws, quiet_pyro, seeded, threads
from bnn.journal import Journal
from bnn.method import Method, Model, Tensors, check_count
from bnn.posterior import Posterior
from bnn.prediction import predict
from bnn.progress import bar
from bnn.sites import Sites, require_every_row
from bnn.turns import ALONE, default_dtype
from bnn.workers import Workers, first_line, lost

if TYPE_CHECKING:
    import os

ALARM = 0.01  # of a right method, over all quantities and both tests
RELATED = 0.2  # correlation of neighbouring draws from which ranks of a right method show it
_SBC = 11  # branch of the seed tree
_INPUTS, _TRUTH, _FIT, _TIES, _NOISE = range(5)  # within a replicate
_FEW = 3  # rows at which f is ranked, unless `at` says which


@dataclass(frozen=True, eq=False)
class SBC:
    """Ranks of truths among draws, and whether they are uniform. Prints as a table.

    Attributes:
        ranks: draws below the truth, 0 to `draws`, (replicate, quantity).
        quantities: names: a site, `f[row]`, `log_likelihood`.
        draws: among which each truth was ranked.
        correlation: of neighbouring draws, the mean over replicates, (quantity,). Ranks assume
            independent ones.
        warned: how often fits warned, by category.
        seconds: of all fits.

    Example:
        >>> import bnn
        >>> model = bnn.models.linear(1, likelihood=bnn.models.likelihoods.Gaussian(1.0))
        >>> x = torch.linspace(-1, 1, 5)[:, None]
        >>> result = bnn.sbc(model, bnn.Laplace(steps=100, draws=19), lambda: x, 3, progress=False)
        >>> result.ranks.shape == (3, len(result.quantities))
        True
        >>> result.quantities
        ('layers.0.weight', 'layers.0.bias', 'f[0]', 'f[1]', 'f[2]', 'log_likelihood')
    """

    ranks: Tensor
    quantities: tuple[str, ...]
    draws: int
    correlation: Tensor
    warned: Mapping[str, int]
    seconds: float

    @cached_property
    def tests(self) -> dict[str, Uniformity]:
        """Of each quantity: distribution function with its simultaneous band, and two p-values."""
        places = (self.ranks.double() + 0.5) / (self.draws + 1)
        return {
            name: uniformity(places[:, i], cells=self.draws + 1)
            for i, name in enumerate(self.quantities)
        }

    @property
    def p(self) -> float:
        """The smallest p-value of all, times how many there are (Bonferroni); at most 1."""
        each = [p for test in self.tests.values() for p in (test.ecdf_p, test.chi_square_p)]
        return min(1.0, min(each) * len(each))

    @property
    def told_p(self) -> str:
        """`p` as one writes it: "= 0.21", or "< 1e-12"."""
        return f"= {self.p:.2g}" if self.p >= 1e-12 else "< 1e-12"

    @property
    def uniform(self) -> bool:
        """False where ranks so uneven come of a right method less than once in a hundred runs."""
        return self.p >= ALARM

    @cached_property
    def reading(self) -> dict[str, str]:
        """What the ranks say of each quantity's posterior: "" where they pass for uniform."""
        count, width = len(self.ranks), self.draws + 1
        ranks = self.ranks.double()
        variance = (width**2 - 1) / 12
        fourth = (width**2 - 1) * (3 * width**2 - 7) / 240  # of a uniform rank about its mean
        shift = (ranks.mean(0) - self.draws / 2) / sqrt(variance / count)
        spread = (ranks.var(0) - variance) / sqrt((fourth - variance**2) / count)
        found = {}
        for i, name in enumerate(self.quantities):
            p = min(self.tests[name].ecdf_p, self.tests[name].chi_square_p)
            moved, wide = float(shift[i]), float(spread[i])
            if p * 2 * len(self.quantities) >= ALARM:
                found[name] = ""
            elif max(abs(moved), abs(wide)) < 3:
                found[name] = "of another shape"
            elif abs(moved) > abs(wide):
                found[name] = "draws too low" if moved > 0 else "draws too high"
            else:
                found[name] = "draws too narrow" if wide > 0 else "draws too wide"
        return found

    def to_dict(self) -> dict[str, Any]:
        """Numbers and texts only, for JSON."""
        return {
            "replicates": len(self.ranks),
            "draws": self.draws,
            "p": self.p,
            "uniform": self.uniform,
            "quantities": {
                name: {
                    "ecdf_p": test.ecdf_p,
                    "chi_square_p": test.chi_square_p,
                    "correlation": float(self.correlation[i]),
                    "reading": self.reading[name],
                }
                for i, (name, test) in enumerate(self.tests.items())
            },
            "warned": dict(self.warned),
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        verdict = "uniform" if self.uniform else "not uniform"
        lines = [
            f"SBC({len(self.ranks)} replicates, ranks among {self.draws} draws: {verdict}, "
            f"p {self.told_p} over all; {self.seconds:.0f} s)"
        ]
        width = max(map(len, self.quantities))
        lines.append(f"  {'':<{width}}  ECDF p  chi-square p  draws' correlation")
        for i, (name, test) in enumerate(self.tests.items()):
            row = f"  {name:<{width}}  {test.ecdf_p:6.2g}  {test.chi_square_p:12.2g}  "
            lines.append(f"{row}{float(self.correlation[i]):19.2f}  {self.reading[name]}".rstrip())
        if self.warned:
            told = ", ".join(f"{count} x {name}" for name, count in self.warned.items())
            lines.append(f"  fits warned: {told}")
        return "\n".join(lines)


def sbc(
    model: Model,
    method: Method,
    data_sampler: Callable[[], Any],
    replicates: int = 200,
    *,
    draws: int = 19,
    at: Any = None,
    sites: Sequence[str] | None = None,
    seed: int = 0,
    path: "str | os.PathLike[str] | None" = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> SBC:
    """Simulation-based calibration of a method on a model.

    Of each replicate: inputs from `data_sampler`, weights from the model's prior, observations from
    the model at those weights; a fit; and the rank of the truth among draws of the posterior. What
    is ranked: global sites that are one number, f at a few rows, and the log likelihood of the
    observations, which tells a method that has learnt nothing from one that is right.

    200 replicates show a posterior sd 30 % off, or a mean .4 sds off, nine times in ten; 1,000 show
    20 % and .2 sds. The more quantities are ranked, the less each may deviate by chance.
    Methods that only approximate the posterior are expected to fail, and the picture says how.

    Args:
        model: the Pyro model. It has to have priors for all that it learns.
        method: how to fit.
        data_sampler: says which inputs, and no more: a callable without arguments that returns the
            model's inputs (one array, a tuple of several, () for none). The model itself draws the
            observations. Random inputs may come from torch's, NumPy's or Python's generators, which
            are seeded for it; fixed ones are `lambda: x`.
        replicates: data sets.
        draws: among which a truth is ranked, evenly thinned from all of the posterior. Fewer are
            less related, and a `ConvergenceWarning` says if they still are.
        at: inputs at which f is ranked, one array or a tuple; default the first three rows of each
            replicate's own.
        sites: global sites to be ranked, entry by entry; default those of one number. Weights of
            hidden units may be named too, and then have to mix over all their symmetries.
        seed: replicate i depends on it and on i, and on nothing else: 500 replicates begin with the
            same 200, and any executor gives the same ranks. All is computed on one thread.
        path: a file to which each replicate is appended as it ends; the same call goes on from it.
            Settings, the first replicate's data and the method are checked against it.
        executor: where replicates run: a `ProcessPoolExecutor` (everything passed must be
            picklable, so the model is a function of a module). Threads take turns.
        progress: show a bar, where a terminal can show one.

    Raises:
        ModelError: something of the model has no prior, or it does not run without observations.
        DataError: fewer posterior draws than `draws`; replicates whose f differ in shape.
        FitError: f or the log likelihood is not a number; or a worker of the executor ended.
        CheckpointError: the file at `path` belongs to another run.
        Exception: whatever a fit raises, with a note of which replicate it was.

    References:
        Talts et al. (2018), Validating Bayesian inference algorithms with simulation-based
        calibration. Modrak et al. (2023), Simulation-based calibration checking for Bayesian
        computation: the choice of test quantities shapes sensitivity (the log likelihood).

    Example:
        >>> import bnn
        >>> model = bnn.models.linear(1, likelihood=bnn.models.likelihoods.Gaussian(1.0))
        >>> x = torch.linspace(-1, 1, 5)[:, None]
        >>> method = bnn.Laplace(steps=100, draws=19)
        >>> bnn.sbc(model, method, lambda: x, 3, progress=False).uniform  # 3 are too few to tell
        True
    """
    check_count("sbc", replicates=replicates, draws=draws)
    if not isinstance(method, Method):
        raise TypeError(f"method is {method!r}. Pass settings, for example bnn.NUTS(chains=4).")
    if not callable(data_sampler):
        raise TypeError(
            f"data_sampler is a {type(data_sampler).__name__}. Pass a callable that returns the "
            "model's inputs, for example lambda: x."
        )
    fitting.seed_sequence(seed)
    names = None if sites is None else tuple(sites)
    where = None if at is None else _inputs(at)
    with ALONE:
        dtype = torch.get_default_dtype()
        job = _Job(model, method, data_sampler, int(draws), where, names, int(seed), dtype)
        journal = None if path is None else Journal(path, job.settings())
    found = {each["replicate"]: each for each in (journal.results if journal else [])}
    todo = [i for i in range(replicates) if i not in found]
    with bar(replicates, "SBC", progress, initial=replicates - len(todo)) as shown:
        for result in _results(job, todo, executor):
            found[result["replicate"]] = result
            if journal is not None:
                journal.add(result)
            shown.update()
    return _gathered([found[i] for i in range(replicates)], int(draws))


@dataclass(frozen=True, eq=False)
class _Job:
    """All that decides a replicate but its number."""

    model: Model
    method: Method
    data_sampler: Callable[[], Any]
    draws: int
    at: tuple[Any, ...] | None
    sites: tuple[str, ...] | None
    seed: int
    dtype: torch.dtype

    def branch(self, replicate: int, part: int) -> np.random.SeedSequence:
        return branch(fitting.seed_sequence(self.seed), _SBC, replicate, part)

    def settings(self) -> dict[str, Any]:
        """What a file of results is checked against; model and inputs by the data they make."""
        digest = hashlib.sha256()
        with threads(0):
            made = self.simulated(0)
        for name, value in [*enumerate(made.inputs), *made.latent.items(), ("y", made.y)]:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        for value in self.at or ():
            digest.update(np.ascontiguousarray(value).tobytes())
        return {
            "method": re.sub(r" at 0x[0-9a-f]+", "", repr(self.method)),
            "draws": self.draws,
            "sites": self.sites,
            "seed": self.seed,
            "dtype": str(self.dtype),
            "at": None if self.at is None else [list(np.shape(each)) for each in self.at],
            "simulated data": digest.hexdigest()[:16],
        }

    def simulated(self, replicate: int) -> "_Simulated":
        """Inputs, weights and observations."""
        with seeded(self.branch(replicate, _INPUTS)):
            args = _inputs(self.data_sampler())
        names = argument_names(self.model, len(args))
        inputs = tensors(args, names)
        sites = contract.check_prior(self.model, inputs, names)
        require_every_row(sites)
        with quiet_pyro(), seeded(self.branch(replicate, _TRUTH)), torch.no_grad():
            with Capture(sites.observed) as capture:
                self.model(*inputs, None)
        latent = {k: capture.values[k].detach() for k in sites.latent}
        return _Simulated(inputs, latent, capture.value.detach(), sites.observed)

    def __call__(self, replicate: int) -> dict[str, Any]:
        """One replicate, as JSON takes it."""
        dtype = default_dtype(self.dtype)
        with dtype, threads(0), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return self._ranked(replicate) | {
                    "warned": [each.category.__name__ for each in caught]
                }
            except Exception as error:
                error.add_note(f"in replicate {replicate} of SBC, seed {self.seed}")
                raise

    def _ranked(self, replicate: int) -> dict[str, Any]:
        made = self.simulated(replicate)
        seed = int(self.branch(replicate, _FIT).generate_state(1, np.uint64)[0])
        start = time.perf_counter()
        posterior = fitting.fit(
            self.model, *made.inputs, made.y, method=self.method, seed=seed, progress=False
        )
        seconds = time.perf_counter() - start
        _check(posterior, made)
        thinned = self._thinned(posterior)
        truth = replace(posterior, draws={k: v[None, None] for k, v in made.latent.items()})
        noise = self.branch(replicate, _NOISE)
        values = self._quantities(thinned, thinned.program, branch(noise, 0))
        exact = self._quantities(truth, self.model, branch(noise, 1))
        generator = np.random.default_rng(self.branch(replicate, _TIES))
        ranks, correlation = {}, {}
        for name, drawn in values.items():
            if name not in exact or exact[name].shape[1:] != drawn.shape[1:]:
                raise DataError(f"The posterior's \"{name}\" is of another shape than the model's.")
            if bool(drawn.isnan().any() | exact[name].isnan().any()):
                raise FitError(f'"{name}" is not a number at some draw, so it has no rank.')
            below = int((drawn < exact[name]).sum())
            equal = int((drawn == exact[name]).sum())
            ranks[name] = below + int(generator.integers(equal + 1))
            correlation[name] = _neighbours(drawn.double())
        return {
            "replicate": replicate,
            "ranks": ranks,
            "correlation": correlation,
            "seconds": seconds,
        }

    def _thinned(self, posterior: Posterior) -> Posterior:
        """So many draws evenly spread over all chains, as one chain."""
        have = posterior.shape[0] * posterior.shape[1]
        if have < self.draws:
            raise DataError(
                f"A truth is ranked among {self.draws} draws, and the posterior has {have}. Pass "
                f"sbc(..., draws={have}), or have the method make more."
            )
        keep = torch.linspace(0, have - 1, self.draws).round().long()
        draws = {k: v.flatten(0, 1)[keep][None] for k, v in posterior.draws.items()}
        return replace(posterior, draws=draws)

    def _quantities(
        self, posterior: Posterior, program: Model, seed: np.random.SeedSequence
    ) -> Tensors:
        """What is ranked, of each draw of the one chain, (draw,) each."""
        sites, data, (_, count) = posterior.sites, posterior.data, posterior.shape
        pooled = {k: v[0] for k, v in posterior.draws.items()}
        found = {}
        for name in _ranked_sites(sites, self.sites):
            found |= _entries(name, pooled[name])
        carried = {k: v for k, v in pooled.items() if k not in sites.locals}
        where = data.inputs if self.at is None else tensors(self.at, data.names[:-1])
        f = predict(program, carried, where, sites, seed, (1, count)).f[0]  # (draw, row, *)
        found |= _entries("f", f[:, :_FEW] if self.at is None else f)

        def score(draw: Tensors) -> Tensor:
            with Score() as total, At(draw):
                program(*data.tensors)
            return torch.as_tensor(total.likelihood)

        with quiet_pyro(), torch.no_grad(), seeded(seed):
            found["log_likelihood"] = over_draws(score, pooled, count)
        return found


@dataclass(frozen=True, eq=False)
class _Simulated:
    inputs: tuple[Tensor, ...]
    latent: Tensors
    y: Tensor
    observed: str


def _inputs(given: Any) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else () if given is None else (given,)


def _check(posterior: Posterior, made: _Simulated) -> None:
    if posterior.sites.params:
        raise ModelError(
            "Simulation-based calibration draws everything from the prior, and these have none: "
            f"{', '.join(posterior.sites.params[:3])}. Give each a prior."
        )
    if posterior.sites.observed != made.observed:
        raise ModelError(
            f'Without observations the model ends at "{made.observed}", and with them it observes '
            f'"{posterior.sites.observed}". State the observed site last.'
        )


def _ranked_sites(sites: Sites, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    if asked is None:
        return tuple(n for n in sites.globals if np.prod(sites.latent[n].shape, dtype=int) == 1)
    if unknown := [name for name in asked if name not in sites.globals]:
        raise ModelError(
            f"The model has no global site {unknown}; it has {', '.join(sites.globals)}."
        )
    return asked


def _entries(name: str, values: Tensor) -> dict[str, Tensor]:
    """(draw, *) as one name for each number of a draw."""
    if values[0].numel() == 1 and name != "f":
        return {name: values.reshape(-1)}
    places = np.ndindex(*values.shape[1:])
    return {f"{name}[{', '.join(map(str, i))}]": values[(slice(None), *i)] for i in places}


def _neighbours(values: Tensor) -> float | None:
    """Correlation of each draw with the next, without the bias of so few; None of a constant."""
    away = values - values.mean()
    total = float(away.square().sum())
    if len(values) < 3 or total == 0:
        return None
    return float((away[1:] * away[:-1]).sum()) / total + 1 / len(values)


def _results(job: _Job, todo: Sequence[int], executor: Executor | None) -> Iterator[dict[str, Any]]:
    if executor is None:
        yield from map(job, todo)
        return
    with Workers(executor, [partial(job, i) for i in todo]) as workers:
        while workers.left:
            ended = workers.ended()
            if ended is None:
                continue
            number, future, error = ended
            if error is not None and lost(error):
                dead = workers.dead if isinstance(error, BrokenExecutor) else [number]
                over = " over replicate " + " and ".join(str(todo[k]) for k in dead) if dead else ""
                raise FitError(
                    f"sbc: a worker ended{over} (killed, or out of memory?): {first_line(error)}. "
                    "With path= the same call computes only the replicates that are not there yet."
                ) from error
            yield future.result()


def _gathered(results: Sequence[Mapping[str, Any]], draws: int) -> SBC:
    names = tuple(results[0]["ranks"])
    for each in results:
        if tuple(each["ranks"]) != names:
            raise DataError(
                f"Replicate {each['replicate']} ranks {', '.join(each['ranks'])}, and replicate 0 "
                f"{', '.join(names)}. Pass at=, inputs at which f is ranked in all."
            )
    ranks = torch.tensor([[each["ranks"][n] for n in names] for each in results])
    related = torch.tensor(
        [
            [np.nan if (r := each["correlation"][n]) is None else r for n in names]
            for each in results
        ]
    )
    correlation = related.nanmean(0)
    counts = Counter(name for each in results for name in each["warned"])
    seconds = sum(each["seconds"] for each in results)
    worst = int(correlation.nan_to_num(-inf).argmax())
    error = 1 / sqrt(len(results) * max(draws - 1, 1))
    if float(correlation[worst]) > RELATED + 3 * error:
        warnings.warn(
            f'Neighbours among the {draws} draws of "{names[worst]}" are correlated, '
            f"{float(correlation[worst]):.2f} on average: ranks of a right method crowd at both "
            "ends then. Have the method draw more, or rank among fewer (draws=9).",
            ConvergenceWarning,
            stacklevel=outside(),
        )
    return SBC(ranks, names, draws, correlation, dict(counts), seconds)
