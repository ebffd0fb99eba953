"""Each method's honest scorecard: how far its predictions are from those of a long NUTS run.

Four fixed small problems. NUTS, long, is what the exact posterior predicts; every method is fitted
to the same rows at its defaults, and its predictions at test rows are held against that and against
the truth. Each fit is appended to a file as it ends: what is there is not run again.
"""

import argparse
import dataclasses
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import jobs
from benchmarks.common import begin, skipped, table

LEVEL = 0.9  # of the interval whose coverage is told
PREDICTIVE = 2_000  # draws of y, at least, that its ends are read off
GRID = 200  # values of y at which the predictive densities of a row are compared
DENSITY = 500  # draws, at most, of which they are mixtures
TESTED = 100  # test rows
ATTENTION = 3.0  # concentration of the prior of attention, over all keys
REFERENCE, SEED = "reference", 12345


@dataclass(frozen=True)
class Problem:
    """Rows of a known law, and the net that is fitted to them.

    Attributes:
        title: for the table.
        rows: to train on.
        inputs: columns of x.
        hidden: units of the net's one layer; of a transformer, the width of its tokens.
        classes: 0 where y is a number.
        words: that the columns of x are ids of; 0 where they are numbers.
    """

    title: str
    rows: int
    inputs: int
    hidden: int
    classes: int = 0
    words: int = 0

    def data(self, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the law: x (row, input), y (row,); always the same."""
        rng = np.random.default_rng([seed, self.inputs])
        if self.words:  # the first half of the words speak for 1, the others against
            x = rng.integers(self.words, size=(rows, self.inputs))
            says = np.where(x < self.words // 2, 1.0, -1.0).sum(1)
            return x, (rng.uniform(size=rows) < 1 / (1 + np.exp(-says))).astype(np.int64)
        if self.classes:  # arms of a spiral
            y = rng.integers(self.classes, size=rows)
            radius = rng.uniform(0.2, 2.0, rows)
            angle = 2 * np.pi * y / self.classes + radius + 0.35 * rng.normal(size=rows)
            return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1), y
        if self.inputs == 1:  # with a gap in the middle
            x = rng.uniform(0.5, 2.5, (rows, 1)) * rng.choice([-1, 1], (rows, 1))
            return x, np.sin(2 * x[:, 0]) + 0.2 * rng.normal(size=rows)
        x = rng.normal(size=(rows, self.inputs))
        f = np.sin(1.5 * x[:, 0]) + np.tanh(2 * x[:, 1] * x[:, 2]) + 0.5 * x[:, 3]
        return x, f + 0.3 * rng.normal(size=rows)

    def split(self) -> tuple[np.ndarray, ...]:
        """Training rows x, y and test rows x, y; numbers in float32."""
        x, y = self.data(self.rows, 0)
        x_test, y_test = self.data(TESTED, 1)
        if not self.classes:
            y, y_test = y.astype(np.float32), y_test.astype(np.float32)
        if not self.words:
            x, x_test = x.astype(np.float32), x_test.astype(np.float32)
        return x, y, x_test, y_test

    @cache  # noqa: B019  four of them
    def model(self) -> Any:
        """One hidden layer of tanh units, weights N(0, 1 / sqrt(inputs)), sigma learned.

        Of words: one block of a transformer under the same `priors.Normal`, its attention weights
        a Dirichlet site of each row.
        """
        from bnn.models import (
            mlp_classification,
            mlp_regression,
            priors,
            transformer_classification,
        )

        prior = priors.Normal(scale="fan_in")
        if self.words:
            net = {"vocabulary": self.words, "width": self.hidden, "heads": 1, "layers": 1}
            attention = priors.UniformAttention(ATTENTION)
            return transformer_classification(
                self.inputs, self.classes, prior=prior, attention=attention, **net
            )
        if self.classes:
            return mlp_classification(self.inputs, self.classes, (self.hidden,), prior=prior)
        return mlp_regression(self.inputs, (self.hidden,), prior=prior)


PROBLEMS = {
    "line": Problem("1-D regression, 40 rows, 1-20-1", 40, 1, 20),
    "spiral": Problem("2-D, three classes, 90 rows, 2-10-3", 90, 2, 10, classes=3),
    "eight": Problem("8-feature regression, 200 rows, 8-10-1", 200, 8, 10),
    "words": Problem("Rows of three words, 40 rows, a transformer", 40, 3, 4, classes=2, words=6),
}


@dataclass(frozen=True)
class Entry:
    """A line of the table: a method of bnn by name, and its settings where not the defaults."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def method(self) -> Any:
        """The method.

        Raises:
            Absent: this bnn has no such method, or not with these settings.
        """
        import bnn

        try:
            return getattr(bnn, self.name)(**self.settings)
        except (AttributeError, TypeError, ValueError) as error:
            raise Absent(f"{type(error).__name__}: {error}") from error


class Absent(Exception):
    """This bnn has no such method."""


METHODS = {
    "NUTS, defaults": Entry("NUTS"),
    "MCLMC": Entry("MCLMC"),
    "SGHMC": Entry("SGHMC"),
    "SGLD": Entry("SGLD"),
    "SVI, normal": Entry("SVI"),
    "SVI, low_rank": Entry("SVI", {"guide": "low_rank"}),
    "SVI, full_rank": Entry("SVI", {"guide": "full_rank"}),
    "SVI, flow": Entry("SVI", {"guide": "flow"}),
    "Laplace, full": Entry("Laplace", {"structure": "full", "predictive": "linearized"}),
    "Laplace, kron": Entry("Laplace", {"structure": "kron", "predictive": "linearized"}),
    "Laplace, last layer": Entry("Laplace", {"structure": "last_layer"}),
    "SWAG": Entry("SWAG"),
    "MultiSWAG": Entry("SWAG", {"restarts": 5}),
    "DeepEnsemble": Entry("DeepEnsemble", {"members": 10}),
    "RandomizedPriors": Entry("RandomizedPriors", {"members": 20}),
    "MCDropout": Entry("MCDropout", {"rate": 0.05}),
    "ConcreteDropout": Entry("ConcreteDropout"),
    "GFlowOut": Entry("GFlowOut"),
    "DirichletAttention": Entry("DirichletAttention"),
    "DirichletAttention, normal": Entry("DirichletAttention", {"weights": "normal"}),
    "MAP": Entry("MAP"),
}


# Against the reference ------------------------------------------------------------------------


def distances(posterior: Any, reference: Any, x: np.ndarray) -> dict[str, float]:
    """How far two predictives are apart, means over rows.

    Of labels: `tv`, total variation of the class probabilities; `w1`, the Wasserstein distance of
    their draws, one for each class; and `agreement`, the share of rows with the same most probable
    label. Of numbers: `tv`, total variation of the predictive densities, and `w1`, their
    Wasserstein distance in units of y, both by densities on a grid, so that draws of y add no
    noise. (`bnn.reference` measures f, and p(y | x) at drawn y, of any model; a row of numbers is
    little enough for a grid.)
    """
    import torch

    from bnn.reference import wasserstein

    ours, theirs = posterior.predict(x), reference.predict(x)
    if ours.probs is not None:
        p, q = ours.probs.double(), theirs.probs.double()
        agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
        apart = wasserstein(*(each.draw_probs.flatten(0, 1).double() for each in (ours, theirs)))
        tv = (p - q).abs().sum(-1).mean() / 2
        return {"tv": float(tv), "w1": float(apart.mean()), "agreement": float(agreement)}
    rows, columns = len(x), x.shape[1:]
    ends = [(p.mean + side * 8 * p.std).double() for p in (ours, theirs) for side in (-1, 1)]
    low, high = torch.stack(ends).amin(0), torch.stack(ends).amax(0)
    step = (high - low) / (GRID - 1)  # (row,)
    grid = low[:, None] + step[:, None] * torch.arange(GRID)  # (row, value)
    each = np.broadcast_to(x[:, None], (rows, GRID, *columns)).reshape(rows * GRID, *columns)
    p, q = (
        thinned(side).log_score(each.copy(), grid.flatten().float()).double().exp()
        for side in (posterior, reference)
    )
    apart = (p - q).reshape(rows, GRID) * step[:, None]
    tv, w1 = apart.abs().sum(1) / 2, (apart.cumsum(1).abs() * step[:, None]).sum(1)
    return {"tv": float(tv.mean()), "w1": float(w1.mean())}


def thinned(posterior: Any) -> Any:
    """Evenly spread draws of all chains, so many that densities hardly change with more."""
    have = math.prod(posterior.shape)
    keep = np.linspace(0, have - 1, min(have, DENSITY)).round().astype(int)
    draws = {name: each.flatten(0, 1)[keep][None] for name, each in posterior.draws.items()}
    return dataclasses.replace(posterior, draws=draws)


def scores(posterior: Any, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Mean negative log predictive density of the test rows, and coverage: of 90 % intervals.

    Of labels: of the smallest sets that are 90 % probable.
    """
    from bnn.calibration import interval_coverage, set_coverage

    found = {"nll": -float(posterior.log_score(x, y).double().mean())}
    probs = posterior.predict(x).probs
    if probs is not None:
        return found | {"coverage": float(set_coverage(probs, y, LEVEL))}
    several = -(-PREDICTIVE // math.prod(posterior.shape))  # an ensemble has as few draws as nets
    predictions = [posterior.predict(x, seed=seed) for seed in range(several)]
    draws = np.concatenate([p.y.flatten(0, 1).numpy() for p in predictions])
    return found | {"coverage": float(interval_coverage(draws, y, LEVEL))}


# Jobs -------------------------------------------------------------------------------------------


def reference_method(args: argparse.Namespace) -> Any:
    import bnn

    return bnn.NUTS(chains=args.chains, warmup=args.warmup, draws=args.draws, target_accept=0.9)


def reference(name: str, args: argparse.Namespace) -> Any:
    """The long run of a problem: read where it is stored, else made and stored."""
    import bnn

    problem, method = PROBLEMS[name], reference_method(args)
    path = args.out.with_name(f"{args.out.stem}-{name}.bnn")
    if path.exists():
        stored = bnn.load(path, problem.model())
        if stored.method == method:
            return stored
    x, y, *_ = problem.split()
    made = bnn.fit(problem.model(), x, y, method=method, seed=SEED, progress=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return made


def quality(posterior: Any, x: np.ndarray) -> dict[str, float]:
    """R-hat and the least effective number of draws of f at the test rows."""
    import arviz

    f = posterior.predict(x).f.double().numpy()
    columns = f.reshape(*f.shape[:2], -1)
    rhat = [float(arviz.rhat(columns[..., i])) for i in range(columns.shape[2])]
    ess = [float(arviz.ess(columns[..., i])) for i in range(columns.shape[2])]
    return {"rhat": max(rhat), "ess": min(ess)}


def run(problem: Problem, method: Any, against: Any, seed: int) -> dict[str, Any]:
    """Fits and scores: what is stored of a job."""
    import bnn

    x, y, x_test, y_test = problem.split()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = bnn.fit(problem.model(), x, y, method=method, seed=seed, progress=False)
    kinds = {w.category.__name__ for w in caught if issubclass(w.category, UserWarning)}
    warned = sorted(kinds & {"ConvergenceWarning", "ApproximationWarning"})
    found = {"seconds": posterior.seconds, "warned": warned}
    return found | distances(posterior, against, x_test) | scores(posterior, x_test, y_test)


@dataclass(frozen=True)
class Job:
    """One fit. Equal jobs have equal results but for the seconds, and none is run twice."""

    problem: str
    method: str
    settings: str
    seed: int
    reference: str
    law: str

    @classmethod
    def of(cls, name: str, label: str, args: argparse.Namespace) -> "Job":
        """The job of a method, or of the reference itself.

        Raises:
            Absent: this bnn has no such method.
        """
        trusted, law = repr(reference_method(args)), f"{PROBLEMS[name]!r}, {TESTED} test rows"
        if label == REFERENCE:
            return cls(name, label, trusted, SEED, trusted, law)
        return cls(name, label, repr(METHODS[label].method()), args.seed, trusted, law)


def finished(path: Path) -> dict[Job, dict[str, Any]]:
    """The results in a file, those of other settings included."""
    names = [each.name for each in dataclasses.fields(Job)]
    results = [each for each in jobs.finished(path) if set(names) <= set(each)]
    return {Job(**{name: each[name] for name in names}): each for each in results}


def run_all(args: argparse.Namespace, done: dict[Job, dict[str, Any]]) -> None:
    """Runs what is not done, problem after problem."""
    for name in args.problems:
        against = None
        for label in (REFERENCE, *args.methods):
            try:
                job = Job.of(name, label, args)
                if job in done:
                    continue
                against = against or reference(name, args)
                if label == REFERENCE:
                    x, y = PROBLEMS[name].split()[2:]
                    found = {"seconds": against.seconds} | quality(against, x)
                    found |= scores(against, x, y)
                else:
                    found = run(PROBLEMS[name], METHODS[label].method(), against, args.seed)
            except Absent as reason:
                skipped(label, str(reason))
                continue
            except Exception as error:  # the others go on, and the next run tries it again
                skipped(f"{name}, {label}", f"{type(error).__name__}: {error}")
                continue
            done[job] = dataclasses.asdict(job) | found
            jobs.append(args.out, done[job])
            print(f"{name} {label}: {found['seconds']:.1f} s", file=sys.stderr, flush=True)


# The table ------------------------------------------------------------------------------------

COLUMNS = {
    "tv": "TV",
    "w1": "W1",
    "agreement": "agreement",
    "nll": "NLL",
    "coverage": "90 % coverage",
    "seconds": "s",
}


def tell(name: str, args: argparse.Namespace, done: Mapping[Job, Mapping[str, Any]]) -> None:
    """Prints the table of a problem, the nearest to the reference first."""
    base = done.get(Job.of(name, REFERENCE, args))
    if base is None:
        return
    found = []
    for label in args.methods:
        try:
            found += [each for each in [done.get(Job.of(name, label, args))] if each]
        except Absent:
            continue
    found.sort(key=lambda each: each["tv"])
    shown = [key for key in COLUMNS if any(key in each for each in (base, *found))]
    rows = [["*reference*", *(_cell(base, key) for key in shown), ""]]
    for each in found:
        warned = ", ".join(kind.removesuffix("Warning").lower() for kind in each["warned"])
        rows.append([each["method"], *(_cell(each, key) for key in shown), warned])
    table(PROBLEMS[name].title, ["", *(COLUMNS[key] for key in shown), "warned of"], rows)
    print(f"\nreference: R-hat of f at most {base['rhat']:.3f}, ESS at least {base['ess']:.0f}.")


def _cell(result: Mapping[str, Any], key: str) -> str:
    value = result.get(key)
    if value is None:
        return ""
    return f"{value:.1f}" if key == "seconds" else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chains", type=int, default=8, help="of the reference")
    parser.add_argument("--warmup", type=int, default=1_000, help="of the reference")
    parser.add_argument("--draws", type=int, default=2_000, help="of the reference, a chain")
    parser.add_argument("--out", type=Path, default=Path("scorecard.jsonl"), help="results so far")
    parser.add_argument("--table", action="store_true", help="of these results; fit nothing")
    args = parser.parse_args()
    begin("Scorecard", 1)
    done = finished(args.out)
    if not args.table:
        run_all(args, done)
    for name in args.problems:
        tell(name, args, done)


if __name__ == "__main__":
    main()
