"""Test log-likelihood, RMSE and coverage on UCI regression sets, beside published numbers.

Every method is given the same budget and fits the same net, 50 hidden units in one layer, on the
published splits (Hernandez-Lobato and Adams 2015). Each fit is a job whose result is appended to a
file as it ends: what is there is not run again, and the table can be made from part of it.
"""

import argparse
import dataclasses
import itertools
import math
import os
import re
import statistics
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import jobs
from benchmarks.common import begin, count, skipped, table

FOLDER = Path(__file__).parents[2] / "shared" / "data" / "uci"  # never part of the repository
SETS = {
    "yacht": "yacht",
    "concrete": "concrete",
    "wine": "wine-quality-red",
    "power": "power-plant",
}
GRADIENTS = 200_000  # of the log joint: what a method may take, over all that it runs side by side
ROWS = 1_000  # in a gradient; where there are more, minibatches of so many
LEVEL = 0.9  # of the interval whose coverage is told
PREDICTIVE = 2_000  # draws of y, at least, that its ends are read off
SPLITS = 20
ACTIVATION = "tanh"
SCALE = "fan_in"  # of the prior
WITHIN = 1.25  # of the budget: samplers learn how long a trajectory is only as they go
PREDICTED, LEARNED = (dict.fromkeys(SETS, noise) for noise in ("predicted", "learned"))
POINTS = PREDICTED | dict.fromkeys(("concrete", "wine"), "learned")  # modes overfit there
GUESS = 30.0  # seconds of a fit of which nothing is known yet

# What is published ----------------------------------------------------------------------------

PUBLISHED = """
              |yacht                |concrete             |wine               |power
PBP           |1.02±.05  -1.63      |5.67±.09  -3.16      |.64±.01  -.97      |4.12±.03  -2.84
MC dropout    |1.11±.38* -1.55      |5.23±.53* -3.04      |.62±.04* -.93      |4.02±.18* -2.80
MC dropout 2  |.67±.05   -1.25±.02  |4.82±.16  -2.94±.02  |.62±.01  -.93±.01  |4.01±.04  -2.81±.01
Deep ensemble |1.58±.48* -1.18±.21* |6.03±.58* -3.06±.18* |.64±.04* -.94±.12* |4.11±.17* -2.79±.04*
Concrete      |.57±.05   -          |4.46±.16  -          |.62±.00  -         |3.70±.04  -
MFVI          |-         -.68±.03   |-         -3.07±.01  |-        -.92±.01  |-         -2.80±.00
DVI           |-         -.47±.03   |-         -3.06±.01  |-        -.90±.01  |-         -2.80±.00
VMG ?         |.71±.05   -1.30      |4.89±.12  -3.01      |.63±.01  -.95      |4.04±.04  -2.82
HMC ?         |.56±.05   -1.62      |4.12±.14  -2.72      |.63±.01  -.91      |3.73±.04  -2.70
"""
SOURCES = """
PBP: Hernandez-Lobato and Adams (2015), Probabilistic backpropagation. MC dropout: Gal and
Ghahramani (2016), Dropout as a Bayesian approximation, 40 epochs. MC dropout 2: the same authors'
code with 4,000 epochs, rate and noise chosen on rows held out of the training rows. Deep ensemble:
Lakshminarayanan, Pritzel, Blundell (2017), 5 members, 40 epochs. Concrete: Gal, Hron, Kendall
(2017), Concrete dropout, RMSE as a later table credits it. MFVI, DVI: Wu et al. (2019),
Deterministic variational inference, predicted noise, empirical Bayes. VMG: Louizos and Welling
(2016), Matrix Gaussian posteriors. HMC: the same net, as later tables give it. ?: from memory, not
checked against the source. ± is the standard error over 20 splits; *: a standard deviation, or as
large as one and taken for it (divided by the root of 20 where compared). -: not published, or no
target: the log-likelihoods credited to concrete dropout are of another scale.
"""


@dataclass(frozen=True)
class Score:
    """A mean over splits and its standard error, NaN where there is none."""

    mean: float
    error: float = math.nan

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score":
        """Of the values of several splits."""
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.mean(values), spread / math.sqrt(len(values)))

    @classmethod
    def read(cls, text: str) -> "Score":
        """Of a published number: 4.02, 4.02±.18, 4.02±.18* (a standard deviation), or -."""
        found = re.fullmatch(r"(-?\d*\.\d+)(?:±(\d*\.\d+)(\*?))?", text)
        if found is None:
            if text != "-":
                raise ValueError(f"{text!r} is no published number.")
            return cls(math.nan)
        mean, error, deviation = found.groups()
        return cls(float(mean), float(error or "nan") / (math.sqrt(SPLITS) if deviation else 1))

    def above(self, other: "Score") -> tuple[float, float]:
        """By how much this is more, and the same in standard errors: of both, where known of both.

        One published without an error counts as exact; ours of a single split has none.
        """
        gain = self.mean - other.mean
        error = math.hypot(self.error, 0.0 if math.isnan(other.error) else other.error)
        return gain, gain / error if error > 0 else math.nan

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        digits = 1 if abs(self.mean) >= 50 else 2 if abs(self.mean) >= 3 else 3
        error = "" if math.isnan(self.error) else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"


def published() -> dict[str, dict[str, tuple[Score, Score]]]:
    """Set -> row -> (RMSE, log-likelihood), from `PUBLISHED`."""
    header, *lines = PUBLISHED.strip("\n").splitlines()
    found: dict[str, dict[str, tuple[Score, Score]]] = {}
    for line in lines:
        row, *cells = (cell.strip() for cell in line.split("|"))
        for name, cell in zip(header.split("|")[1:], cells, strict=True):
            rmse, log_likelihood = map(Score.read, cell.split())
            found.setdefault(name.strip(), {})[row] = (rmse, log_likelihood)
    return found


# What is fitted -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A line of the table: a method of bnn, and the noise of the model that it fits.

    Attributes:
        name: of its class.
        settings: of it, beyond the budget.
        shares: of the budget that a setting is given, in its unit: steps, or trajectories.
        noise: of each set; see `bnn.models.likelihoods.Gaussian`.
        beside: the published row that its log-likelihood is compared with.
        tuned: settings of one set alone, chosen like the noise on rows held out of its training
            rows, where the published row was tuned too.
        scales: of the prior of a set where not `SCALE`, chosen like `tuned`; two are `ByLayer`'s.
        enough: share of the budget that it takes on a set; see `_TENTH`.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=lambda: {"steps": 1.0})
    noise: Mapping[str, str] = field(default_factory=lambda: PREDICTED)
    beside: str = ""
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scales: Mapping[str, float | tuple[float, float]] = field(default_factory=dict)
    enough: Mapping[str, float] = field(default_factory=lambda: _TENTH)

    def method(self, name: str, rows: int, gradients: int) -> Any:
        """The method on a set, within a budget of so many gradients.

        Raises:
            Absent: bnn has no such method, or not with these settings or so few steps.
        """
        import bnn

        try:
            made = getattr(bnn, self.name)(**{**self.settings, **self.tuned.get(name, {})})
            allowed = gradients * self.enough.get(name, 1.0)
            each = allowed / abreast(made) / dearer(made, rows) / longest(made)
            given = {steps: max(int(share * each), 1) for steps, share in self.shares.items()}
            if rows > ROWS and hasattr(made, "batch_size"):
                given["batch_size"] = ROWS
            return dataclasses.replace(made, **given)
        except (AttributeError, TypeError, ValueError) as error:
            raise Absent(f"{type(error).__name__}: {error}") from error

    def model(self, name: str, rows: "Rows") -> Any:
        """The model of a set, in the units of the training rows."""
        from bnn.models import likelihoods, mlp_regression, priors

        scale = self.scales.get(name, SCALE)
        return mlp_regression(
            rows.x.shape[1],
            (50,),
            activation=ACTIVATION,
            prior=ByLayer(*scale) if isinstance(scale, tuple) else priors.Normal(scale=scale),
            likelihood=likelihoods.Gaussian(self.noise[name]),
            standardize=(rows.x, rows.y),
        )

    def told(self, name: str, rows: int, gradients: int) -> str:
        """Everything that decides a fit but its rows and seed."""
        scale = self.scales.get(name, SCALE)
        model = f"{ACTIVATION}, scale {scale}, noise {self.noise[name]}"
        return f"{self.method(name, rows, gradients)!r}; {model}"


@dataclass(frozen=True)
class ByLayer:
    """Normal of the fan-in, wider in the hidden layer and at the output that is the mean.

    The output that is the noise keeps the fan-in: as wide, it is noise of any size a priori.
    """

    hidden: float
    mean: float

    def __call__(self, name: str, parameter: Any, module: Any) -> Any:
        from pyro.distributions import Normal

        scale = parameter.new_ones(parameter.shape)
        if parameter.ndim > 1:
            scale /= math.sqrt(parameter.shape[1])
            rows = slice(None) if name == "layers.0.weight" else 0
            scale[rows] *= self.hidden if name == "layers.0.weight" else self.mean
        return Normal(0.0, scale).to_event(parameter.ndim)


class Absent(Exception):
    """This bnn has no such method."""


def abreast(method: Any) -> int:
    """Gradients that a method takes at every step."""
    sides = ("chains", "members", "restarts", "particles")
    return math.prod(getattr(method, side, 1) for side in sides)


def dearer(method: Any, rows: int) -> float:
    """What a gradient costs in gradients of `ROWS` rows: a method may know no minibatches."""
    return 1.0 if hasattr(method, "batch_size") else max(1.0, rows / ROWS)


def longest(method: Any) -> int:
    """Gradients that a trajectory may take, of a method that is given trajectories."""
    return 2**method.max_tree_depth - 1 if hasattr(method, "max_tree_depth") else 1


# Where the rest gained less than .02 of log-likelihood on rows held out of the training rows of
# split 0. On power, of many more rows, it was not tried but for MCLMC.
_TENTH = dict.fromkeys(("concrete", "wine", "power"), 0.1)
_GAINS = dict.fromkeys(("wine", "power"), 0.1)  # more does gain on concrete
_GLM = {"predictive": "linearized"}
_SWAG = {"steps": 0.5, "collection": 0.5}
_LANGEVIN = {"warmup": 0.25, "steps": 0.75}
_NUTS = {"warmup": 0.4, "draws": 0.6}
_WIDE = {"concrete": (2.0, 3.0)}  # a mean that can follow y a priori
_ONE = {"chains": 1}  # on power; of four, each would warm up for a few trajectories
_MCLMC = {"warmup": 0.4 / 1000, "draws": 0.6 / 1000}  # one has about so many, as it learns
_TEN = {"yacht": {"particles": 10}, "concrete": {"particles": 10}}  # draws of a step, as MFVI has
METHODS = {
    "MAP": Entry("MAP", {"draws": 200}, noise=POINTS),
    "Laplace, full": Entry("Laplace", {"structure": "full"} | _GLM, noise=POINTS),
    "Laplace, kron": Entry("Laplace", {"structure": "kron"} | _GLM, noise=POINTS),
    "Laplace, diag": Entry("Laplace", {"structure": "diag"} | _GLM, noise=POINTS),
    "Laplace, last layer": Entry("Laplace", {"structure": "last_layer"} | _GLM, noise=POINTS),
    "SWAG": Entry("SWAG", shares=_SWAG, noise=POINTS),
    "MultiSWAG": Entry("SWAG", {"restarts": 5}, shares=_SWAG, noise=POINTS, enough=_GAINS),
    "DeepEnsemble": Entry("DeepEnsemble", {"members": 5}, noise=POINTS, beside="Deep ensemble"),
    "RandomizedPriors": Entry("RandomizedPriors", {"members": 10}, noise=LEARNED),
    "MCDropout": Entry(
        "MCDropout",
        {"rate": 0.05},
        noise=POINTS,
        beside="MC dropout 2",
        tuned={
            "yacht": {"length_scale": 0.1},
            "concrete": {"length_scale": 0.2},
            "wine": {"length_scale": 3.0},
            "power": {"length_scale": 0.1},
        },
    ),
    "ConcreteDropout": Entry("ConcreteDropout", noise=POINTS),
    "SVI, normal": Entry(
        "SVI",
        {"guide": "normal"},
        beside="MFVI",
        tuned=_TEN,
        scales={"concrete": 0.5},
        enough=_GAINS,
    ),
    "SVI, local": Entry(
        "SVI",
        {"guide": "normal", "estimator": "local"},
        beside="MFVI",
        tuned={"yacht": _TEN["yacht"]},
        scales={"concrete": 0.5},
    ),
    "SVI, low_rank": Entry(
        "SVI", {"guide": "low_rank"}, tuned=_TEN, scales={"concrete": 0.5}, enough=_GAINS
    ),
    "SGHMC": Entry("SGHMC", {"chains": 4}, shares=_LANGEVIN, scales=_WIDE),
    "SGLD": Entry("SGLD", {"chains": 4}, shares=_LANGEVIN, scales=_WIDE),
    "MCLMC": Entry(
        "MCLMC",
        {"chains": 4},
        shares=_MCLMC,
        beside="HMC ?",
        scales=_WIDE,
        tuned={"power": _ONE},
        enough={},
    ),
    "NUTS": Entry(
        "NUTS",
        {"chains": 4, "max_tree_depth": 8, "target_accept": 0.8},
        shares=_NUTS,
        beside="HMC ?",
        scales=_WIDE,
        tuned={"power": _ONE | {"max_tree_depth": 5, "target_accept": 0.9}},
        enough={"power": 0.1},
    ),
}


# One job --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of a split, in the units of the file: x (row, input), y (row,)."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@cache
def _read(folder: Path) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """x, y, and the test rows of each split."""
    rows = np.loadtxt(folder / "data.txt")
    inputs = np.loadtxt(folder / "index_features.txt").astype(int).reshape(-1)
    target = int(np.loadtxt(folder / "index_target.txt"))
    splits = (folder / "test_rows.txt").read_text().splitlines()
    tests = [np.array(line.split(), float).astype(int) for line in splits if line.strip()]
    return rows[:, inputs].astype(np.float32), rows[:, target].astype(np.float32), tests


def split(folder: Path, number: int, inner: bool = False) -> Rows:
    """The training and test rows of a published split.

    Args:
        folder: of the set.
        number: of the split, from 0.
        inner: a fifth of the training rows takes the place of the test rows, which are left out.
    """
    x, y, tests = _read(folder)
    test, train = tests[number], np.setdiff1d(np.arange(len(y)), tests[number])
    if inner:
        shuffled = np.random.default_rng(number).permutation(train)
        test, train = np.split(shuffled, [len(shuffled) // 5])
    return Rows(x[train], y[train], x[test], y[test])


def scores(
    y: np.ndarray, mean: np.ndarray, draws: np.ndarray, log_density: np.ndarray
) -> dict[str, float]:
    """What a prediction is worth, in the units of y.

    Args:
        y: observed, (row,).
        mean: predictive mean, (row,).
        draws: of the predictive, (draw, row).
        log_density: log p(y | training rows), each row's own, (row,).

    Returns:
        rmse; log_likelihood, its mean over rows; coverage, the share of rows within the central
        interval of the predictive.
    """
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {
        "rmse": float(np.sqrt(np.mean((mean - y) ** 2))),
        "log_likelihood": float(np.mean(log_density)),
        "coverage": float(np.mean((low <= y) & (y <= high))),
    }


def predicted(posterior: Any, rows: Rows) -> dict[str, float]:
    """The scores of a posterior on test rows."""
    x, y = rows.x_test, rows.y_test
    several = -(-PREDICTIVE // math.prod(posterior.shape))  # an ensemble has as few draws as nets
    predictions = [posterior.predict(x, seed=seed) for seed in range(several)]
    draws = np.concatenate([p.y.flatten(0, 1).numpy() for p in predictions])  # (draw, row)
    density = posterior.log_score(x, y).double().numpy()
    mean = predictions[0].mean.double().numpy()
    return scores(y.astype(float), mean, draws.astype(float), density)


@dataclass(frozen=True)
class Job:
    """One fit. Equal jobs have equal results, and none is run twice."""

    set: str
    split: int
    name: str
    settings: str
    gradients: int = GRADIENTS
    inner: bool = False

    @property
    def line(self) -> tuple[str, str]:
        """The set and the method's name: its line in the tables."""
        return self.set, self.name


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Fits and scores: what is stored of a job."""
    import bnn

    warnings.simplefilter("ignore")  # what a fit warns of shows in its scores
    entry, rows = METHODS[job.name], split(folder / SETS[job.set], job.split, job.inner)
    method, model = entry.method(job.set, len(rows.y), job.gradients), entry.model(job.set, rows)
    posterior = bnn.fit(model, rows.x, rows.y, method=method, seed=job.split, progress=False)
    found = {"seconds": posterior.seconds, "taken": taken(posterior, entry)}
    return dataclasses.asdict(job) | found | predicted(posterior, rows)


def taken(posterior: Any, entry: Entry) -> float:
    """Gradients of at most `ROWS` rows that a fit took.

    Of samplers that choose their trajectories: as if warmup's were as long as those kept.
    """
    method = posterior.method
    if "n_steps" in posterior.stats:
        each = float(posterior.stats["n_steps"].double().mean())
        each *= dearer(method, posterior.data.rows)
        return method.chains * (method.warmup + method.draws) * each
    steps = {name: getattr(method, name) for name in entry.shares}
    if posterior.history is not None:
        steps["steps"] = min(steps["steps"], len(posterior.history))  # it may end early
    return sum(steps.values()) * abreast(method)


# All jobs -------------------------------------------------------------------------------------


def finished(path: Path) -> dict[Job, dict[str, Any]]:
    """The results in a file, by job."""
    names = [each.name for each in dataclasses.fields(Job)]
    return {
        Job(**{name: result[name] for name in names}): result
        for result in jobs.finished(path)
        if result.keys() >= set(names)
    }


def planned(args: argparse.Namespace) -> list[Job]:
    """Every job asked for, split after split; says what is left out."""
    planned = {}
    for name in args.sets:
        folder = args.data / SETS[name]
        if not folder.is_dir():
            skipped(name, f"no folder {folder}")
            continue
        _, y, tests = _read(folder)
        for method in args.methods:
            try:
                trained = len(y) - len(tests[0])
                settings = METHODS[method].told(name, trained, args.gradients)
            except Absent as reason:
                skipped(f"{name}, {method}", str(reason))
                continue
            for number in range(min(args.splits, len(tests))):
                job = Job(name, number, method, settings, args.gradients, args.inner)
                planned[number, len(planned)] = job
    return [planned[key] for key in sorted(planned)]


def forecast(todo: Sequence[Job], done: Mapping[Job, dict[str, Any]], workers: int) -> str:
    """How long the jobs will take, from those of the same line that are done."""
    known: dict[tuple[str, str], list[float]] = {}
    for job, result in done.items():
        known.setdefault(job.line, []).append(result["seconds"])
    guess = statistics.mean(itertools.chain(*known.values())) if known else GUESS
    seconds = [statistics.median(known.get(job.line, [guess])) for job in todo]
    guessed = len({job.line for job in todo} - set(known))
    unknown = f", {guessed} lines of them guessed at {guess:.0f} s a fit" if guessed else ""
    return f"{count(len(todo), 'fit')} to go: about {sum(seconds) / workers / 60:.0f} min{unknown}"


def run_all(todo: Sequence[Job], done: dict[Job, dict[str, Any]], args: argparse.Namespace) -> None:
    """Runs the jobs in worker processes, each result stored as it ends."""
    left = set(todo)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(run, job, args.data): job for job in todo}
        for future in as_completed(running):
            job = running[future]
            left.remove(job)
            try:
                done[job] = future.result()
            except BrokenProcessPool:
                raise SystemExit(
                    f"A worker was ended from outside, at or near {job.name} on {job.set}; memory? "
                    "The same command goes on from here."
                ) from None
            except Exception as error:  # the others go on, and the next run tries it again
                skipped(f"{job.set} {job.split} {job.name}", f"{type(error).__name__}: {error}")
                continue
            jobs.append(args.out, done[job])
            ahead = {each.split for each in left}
            told = "" if job.split in ahead or not left else "; " + forecast(left, done, args.jobs)
            print(_progress(done[job]) + told, file=sys.stderr, flush=True)


def _progress(result: Mapping[str, Any]) -> str:
    return (
        f"{result['set']} {result['split']} {result['name']}: log-likelihood "
        f"{result['log_likelihood']:.3f}, RMSE {result['rmse']:.3g}, {result['seconds']:.1f} s"
    )


# The table ------------------------------------------------------------------------------------

HEADER = (
    *("", "RMSE", "log-likelihood", "90 % coverage", "splits", "gradients", "s a fit"),
    "above its published row (standard errors)",
)


def tell(name: str, results: Iterable[Mapping[str, Any]], title: str) -> None:
    """Prints the table of a set: ours, best first, then the published rows.

    Last, and not the best, are those that refused some splits: the others are the easy ones. What
    took more than the budget is told beside its gradients, in budgets, and is not the best either.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        rows.setdefault(result["name"], []).append(result)
    theirs, ours, lines, over = published()[name], {}, [], set()
    for method, each in rows.items():
        rmse, density, coverage = (
            Score.of([r[key] for r in each]) for key in ("rmse", "log_likelihood", "coverage")
        )
        ours[method] = density
        beside, against = METHODS[method].beside, ""
        if beside and not math.isnan(theirs[beside][1].mean):
            against = f"{beside}: {_gain(density, theirs[beside][1])}"
        taken, seconds = (statistics.median(r[key] for r in each) for key in ("taken", "seconds"))
        budgets = taken / each[0]["gradients"]
        if budgets > WITHIN:
            over.add(method)
        told = f"{taken:,.0f}" + (f" ({budgets:.1f} x)" if method in over else "")
        cells = (str(rmse), str(density), str(coverage), str(len(each)))
        lines.append([method, *cells, told, f"{seconds:.1f}", against])
    most = max(map(len, rows.values()))
    part = {method for method, each in rows.items() if len(each) < most}
    lines.sort(key=lambda line: (line[0] in part, -ours[line[0]].mean))
    for row, (rmse, density) in theirs.items():
        lines.append([f"*{row}*", str(rmse), str(density), *[""] * 5])
    table(title, HEADER, lines)
    if not (fair := ours.keys() - over - part):
        return
    best = max(fair, key=lambda method: ours[method].mean)
    known = {row: density for row, (_, density) in theirs.items() if not math.isnan(density.mean)}
    top = max(known, key=lambda row: known[row].mean)
    print(
        f"\nBest within the budget: {best}, {ours[best]}; published: {top}, {known[top]}. "
        f"Above it by {_gain(ours[best], known[top])}."
    )


def _gain(ours: Score, theirs: Score) -> str:
    gain, errors = ours.above(theirs)
    return f"{gain:+.2f}" + ("" if math.isnan(errors) else f" ({errors:+.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--splits", type=int, default=SPLITS, help="the first so many of 20")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="fits at once, each on one thread")
    parser.add_argument("--out", type=Path, default=Path("uci.jsonl"), help="results so far")
    parser.add_argument("--table", action="store_true", help="of these results; fit nothing")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the sets")
    parser.add_argument("--gradients", type=int, default=GRADIENTS, help="the budget of a fit")
    parser.add_argument("--inner", action="store_true", help="score held-out training rows")
    args = parser.parse_args()
    begin("UCI regression", args.jobs, threads=1)
    asked, done = planned(args), finished(args.out)
    todo = [job for job in asked if job not in done]
    if todo and not args.table:
        print(forecast(todo, done, args.jobs), file=sys.stderr, flush=True)
        run_all(todo, done, args)
    kept = [done[job] for job in asked if job in done]
    for name in dict.fromkeys(result["set"] for result in kept):
        _, y, _ = _read(args.data / SETS[name])
        rows = "held-out training rows" if args.inner else "test rows"
        tell(
            name,
            [result for result in kept if result["set"] == name],
            f"{name}: {len(y):,} rows, {rows}; {args.gradients:,} gradients a fit",
        )
    if kept:
        print(f"\n{SOURCES.strip()}")


if __name__ == "__main__":
    main()
