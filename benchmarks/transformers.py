"""One transformer, fitted by every method: what each says of labels, and how well it knows.

Digits: scikit-learn's 1,797 images of 8 x 8, cut into 16 patches; 1,000 to train on. Strange rows
are the test images turned by 90 degrees, and images whose pixels are shuffled.

Tags: rows of 6 to 12 words, one label a word; see `corpus`. Strange rows have words that were
never seen in training.

Each fit is appended to a file as it ends: what is there is not run again.
"""

import argparse
import dataclasses
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import jobs
from benchmarks.common import begin, table

STEPS, BATCH = 2_000, 128
WORDS, STRANGE, MARKERS, TAGS, PLACES = 41, 10, 4, 5, 12
NOISE = 0.05  # of tags, drawn anew from all
NET = {"width": 32, "heads": 4, "layers": 2}


@dataclass(frozen=True)
class Rows:
    """Rows to train on and to test on, and strange ones by name.

    Attributes:
        x: (row, *).
        y: (row,), or (row, token).
        real: True where a label counts, the shape of y_test.
    """

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    real: np.ndarray
    strange: Mapping[str, np.ndarray]


@cache
def digits(seed: int) -> Rows:
    """Images in 0..1, split at random."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    x, y = (x[order] / 16).astype(np.float32).reshape(-1, 8, 8), y[order]
    test = x[1_000:]
    turned = np.rot90(test, axes=(1, 2)).copy()
    shuffled = rng.permuted(test.reshape(-1, 64), axis=1).reshape(-1, 8, 8)
    strange = {"turned": turned, "shuffled": shuffled}
    return Rows(x[:1_000], y[:1_000], test, y[1_000:], np.ones(len(test), bool), strange)


@cache
def corpus(seed: int) -> Rows:
    """Rows of words and their tags, from a law that asks for attention.

    A row starts with a marker, one of the words 1..4; each other word is a marker with probability
    .15, else one of 5..40. The tag of a marker is 4. That of a word w is (w + the last marker
    before it) mod 4: it takes the word and one that may be many places away. Tags are replaced by
    random ones with probability .05. Id 0 fills rows up; strange rows have, for the words that are
    no markers, the ids 41..50.
    """
    rng = np.random.default_rng(seed)

    def draw(rows: int) -> tuple[np.ndarray, np.ndarray]:
        marker = rng.integers(1, 1 + MARKERS, (rows, PLACES))
        word = rng.integers(1 + MARKERS, WORDS, (rows, PLACES))
        marked = rng.random((rows, PLACES)) < 0.15
        marked[:, 0] = True
        x = np.where(marked, marker, word)
        last = np.maximum.accumulate(np.where(marked, np.arange(PLACES), 0), 1)
        y = np.where(marked, MARKERS, (x + np.take_along_axis(x, last, 1)) % MARKERS)
        y = np.where(rng.random(y.shape) < NOISE, rng.integers(TAGS, size=y.shape), y)
        x[np.arange(PLACES) >= rng.integers(6, PLACES + 1, rows)[:, None]] = 0
        return x, y

    (x, y), (x_test, y_test) = draw(1_000), draw(800)
    unseen = rng.integers(WORDS, WORDS + STRANGE, x_test.shape)
    strange = {"unseen words": np.where(x_test > MARKERS, unseen, x_test)}
    return Rows(x, y, x_test, y_test, x_test > 0, strange)


def digits_model(dropout: float) -> Any:
    """Sixteen patches of 2 x 2 pixels."""
    from bnn.models import vit

    return vit((8, 8), 10, patch=2, dropout=dropout, **NET)


def tags_model(dropout: float) -> Any:
    """A label for each word."""
    from bnn.models import transformer_tagging

    words = {"vocabulary": WORDS + STRANGE, "padding": 0}
    return transformer_tagging(PLACES, TAGS, dropout=dropout, **words, **NET)


def without_prior(model: Any) -> Any:
    """The same net and likelihood; its weights are trained from torch's own start."""
    import pyro
    import pyro.distributions as dist

    def likelihood(x: Any, y: Any = None) -> None:
        net = pyro.module("net", model.net)
        with pyro.plate("data", len(x)):
            f = net(x)
            f = pyro.deterministic("f", f, event_dim=f.ndim - 1)
            fn = dist.Categorical(logits=f)
            if f.ndim > 2:
                fn = fn.mask(model.net.real(x)).to_event(1)
            pyro.sample("y", fn, obs=y)

    return likelihood


PROBLEMS: dict[str, tuple[Callable[[int], Rows], Callable[[float], Any]]] = {
    "digits": (digits, digits_model),
    "tags": (corpus, tags_model),
}


@dataclass(frozen=True)
class Entry:
    """A method of bnn and its settings.

    Attributes:
        prior: False for weights without one.
        dropout: rate of the net's own dropout.
        steps: name -> share of the steps.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    prior: bool = True
    dropout: float = 0.0
    steps: Mapping[str, float] = field(default_factory=lambda: {"steps": 1.0})

    def method(self, steps: int) -> Any:
        """The method, with so many steps of each member."""
        import bnn

        given = {name: max(int(share * steps), 1) for name, share in self.steps.items()}
        common = {"batch_size": BATCH, "schedule": "cosine", "learning_rate": 0.005, "draws": 50}
        common["annealing"] = 0.3
        if self.name == "DeepEnsemble":
            del common["draws"]
        return getattr(bnn, self.name)(**common | given | dict(self.settings))

    def model(self, problem: str) -> Any:
        """The model of a problem: weights ~ N(0, 1 / sqrt(inputs))."""
        model = PROBLEMS[problem][1](self.dropout)
        return model if self.prior else without_prior(model)


METHODS = {
    "maximum likelihood": Entry("MAP", prior=False),
    "MAP": Entry("MAP"),
    "Laplace, last layer": Entry("Laplace", {"structure": "last_layer"}),
    "SWAG": Entry("SWAG", steps={"steps": 0.7, "collection": 0.3}),
    "SVI, normal": Entry("SVI"),
    "DeepEnsemble": Entry("DeepEnsemble", {"members": 5}),
    "MCDropout": Entry("MCDropout", dropout=0.1),
    "ConcreteDropout": Entry("ConcreteDropout"),
    "DirichletAttention": Entry("DirichletAttention"),
    "DirichletAttention, uniform": Entry("DirichletAttention", {"prior": "uniform"}),
    "DirichletAttention, contextual": Entry("DirichletAttention", {"prior": "contextual"}),
    "GFlowOut": Entry("GFlowOut", {"prior_keep": 0.9}),
    "ID-GFlowOut": Entry("GFlowOut", {"prior_keep": 0.9, "conditional": False}),
}
COLUMNS = {
    "accuracy": "{:.3f}",
    "nll": "{:.3f}",
    "ece": "{:.3f}",
    "brier": "{:.3f}",
    "risk area": "{:.4f}",
    "seconds": "{:.0f}",
}


@dataclass(frozen=True)
class Job:
    """What is stored of a fit, beside its scores."""

    problem: str
    name: str
    seed: int
    settings: str


def run(job: Job, steps: int) -> dict[str, Any]:
    """Fits and scores."""
    import bnn

    entry, rows = METHODS[job.name], PROBLEMS[job.problem][0](job.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a fit warns of shows in its scores
        posterior = bnn.fit(
            entry.model(job.problem),
            rows.x,
            rows.y,
            method=entry.method(steps),
            seed=job.seed,
            progress=False,
        )
        return dataclasses.asdict(job) | {"seconds": posterior.seconds} | scores(posterior, rows)


def scores(posterior: Any, rows: Rows) -> dict[str, float]:
    """Of the labels that count."""
    import torch

    from bnn import calibration, selective

    prediction = posterior.predict(rows.x_test)
    real = torch.as_tensor(rows.real)
    probs, labels = prediction.probs[real], torch.as_tensor(rows.y_test)[real]
    wrong = probs.argmax(-1) != labels
    found = {
        "accuracy": 1 - float(wrong.double().mean()),
        "nll": calibration.nll(probs, labels),
        "ece": calibration.ece(probs, labels),
        "brier": calibration.brier(probs, labels),
        "risk area": selective.risk_coverage(prediction.entropy[real], wrong).area,
    }
    for name, x in rows.strange.items():
        other = posterior.predict(x)
        of = lambda value: _each_row(value, real)
        found |= {
            f"AUROC {name}": selective.auroc(of(prediction.entropy), of(other.entropy)),
            f"AUROC {name}, by mutual information": selective.auroc(
                of(prediction.mutual_information), of(other.mutual_information)
            ),
        }
    return found


def _each_row(value: Any, real: Any) -> Any:
    """Mean over the tokens of a row that count, (row,)."""
    return (value * real).flatten(1).sum(1) / real.flatten(1).sum(1) if value.ndim > 1 else value


def tell(problem: str, results: list[dict[str, Any]], title: str) -> None:
    """Prints the table of a problem: means over seeds, the best NLL first."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        lines.setdefault(result["name"], []).append(result)
    mean = lambda name, column: statistics.mean(each[column] for each in lines[name])
    aurocs = [key for key in results[0] if key.startswith("AUROC")]
    columns = COLUMNS | dict.fromkeys(aurocs, "{:.3f}")
    rows = [
        [name, *(form.format(mean(name, column)) for column, form in columns.items())]
        for name in sorted(lines, key=lambda name: mean(name, "nll"))
    ]
    table(f"{problem}: {title}", ["", *columns], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each member")
    parser.add_argument("--out", type=Path, default=Path("transformers.jsonl"))
    parser.add_argument("--table", action="store_true", help="of these results; fit nothing")
    args = parser.parse_args()
    begin("Transformers", 1)
    names = [each.name for each in dataclasses.fields(Job)]
    known = [each for each in jobs.finished(args.out) if each.keys() >= set(names)]
    done = {Job(**{name: each[name] for name in names}): each for each in known}
    asked = [
        Job(problem, name, seed, repr(METHODS[name].method(args.steps)))
        for seed in args.seeds
        for problem in args.problems
        for name in args.methods
    ]
    for job in asked:
        if job not in done and not args.table:
            done[job] = run(job, args.steps)
            jobs.append(args.out, done[job])
            told = ", ".join(f"{k} {done[job][k]:.3g}" for k in ("accuracy", "nll", "seconds"))
            print(f"{job.problem} {job.seed} {job.name}: {told}", file=sys.stderr, flush=True)
    for problem in args.problems:
        results = [done[job] for job in asked if job in done and job.problem == problem]
        if results:
            seeds = len({each["seed"] for each in results})
            tell(problem, results, f"{args.steps:,} steps on batches of {BATCH}; seeds: {seeds}")


if __name__ == "__main__":
    main()
