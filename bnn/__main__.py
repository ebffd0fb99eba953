"""`python -m bnn`: fit a Bayesian net to a table by several methods, compare them, draw, export."""

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import bnn
from bnn import models
from bnn.method import Method
from bnn.posterior import Posterior

METHODS: dict[str, Method] = {
    "svi": bnn.SVI(particles=4, learning_rate=0.03),
    "nuts": bnn.NUTS(chains=4, warmup=300, draws=500),
    "map": bnn.MAP(),
}
HIDDEN = 20
UNNAMED = "Unnamed: 0"  # pandas' name for a first column without one: where it wrote its index
CLASSES = 20  # text with more different values than this is no label, and no kind of a row


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        run(options)
    except (bnn.ModelError, bnn.DataError, bnn.FitError, OSError) as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Reads, fits, compares, draws and writes."""
    start = time.perf_counter()
    table = Table.read(options.table, options.target)
    train, test = table.split(options.test_share, options.seed)
    model = table.model(train)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"{table.name}: {len(table.y)} rows, {len(table.columns)} inputs, target "
        f'"{table.target}" ({table.kind}); {len(train[1])} rows to fit, {len(test[1])} held out.'
    )
    posteriors: dict[str, Posterior] = {}
    for name in options.method:
        print(f"Fitting a net of {HIDDEN} hidden units with {METHODS[name]!r} ...", flush=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            posteriors[name] = bnn.fit(model, *train, method=METHODS[name], seed=options.seed)
        for text in dict.fromkeys(str(w.message) for w in caught):
            print(f"  note: {text}")
        (folder / name).mkdir(exist_ok=True)
        file = folder / name / "posterior.nc"
        predictions = posteriors[name].predict(*test[:-1])
        _quietly(
            lambda n=name, p=predictions, f=file: posteriors[n].to_arviz(predictions=p).to_netcdf(f)
        )
        print(f"  {posteriors[name].seconds:.0f} s; wrote {file}", flush=True)
    comparison = bnn.compare(posteriors, data=test)
    units = "" if table.labels else ", rmse in units of the target"
    print(f"\nHeld-out rows (log score in nats a row{units}):")
    print(comparison.to_string(float_format=lambda v: f"{v:.3f}"))
    comparison.to_csv(folder / "comparison.csv")
    for file in draw(posteriors, test, table, folder):
        print(f"wrote {file}")
    print(f"Done in {time.perf_counter() - start:.0f} s. Open a posterior with")
    file = folder / options.method[-1] / "posterior.nc"
    print(f'  import arviz as az; az.summary(az.from_netcdf("{file}"))')


def draw(
    posteriors: dict[str, Posterior], test: tuple[Any, ...], table: "Table", folder: Path
) -> list[Path]:
    """Predictions against the truth, and calibration, as PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from bnn import plots

    predictions = {name: p.predict(*test[:-1]) for name, p in posteriors.items()}
    files = []
    if not table.labels:
        size = (4.6 * len(predictions), 4.6)
        figure, axes = pyplot.subplots(
            1, len(predictions), figsize=size, sharex=True, sharey=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for ax, (name, prediction) in zip(axes[0], predictions.items(), strict=True):
            plots.truth(prediction, test[-1], unit=table.target, title=name.upper(), ax=ax)
        files.append(folder / "predictions.png")
        figure.savefig(files[-1], dpi=110)
        pyplot.close(figure)
    figure, ax = pyplot.subplots(figsize=(4.8, 4.6), layout="constrained")
    plot = plots.reliability if table.labels else plots.coverage
    plot(predictions, test[-1], title="Calibration on held-out rows", ax=ax)
    files.append(folder / "calibration.png")
    figure.savefig(files[-1], dpi=110)
    pyplot.close(figure)
    return files


class Table:
    """A table with one target: numbers to regress on, or labels to tell apart."""

    def __init__(self, frame: Any, target: str, name: str):
        import pandas

        if target not in frame.columns:
            columns = ", ".join(map(str, frame.columns))
            raise bnn.DataError(
                f'The table has no column "{target}" (columns: {columns}). '
                "Pass one of them with --target."
            )
        frame = frame.replace([np.inf, -np.inf], np.nan)
        if not len(frame[target].dropna()):
            raise bnn.DataError(f'The target "{target}" has no value in any row.')
        if UNNAMED in frame.columns and target != UNNAMED:
            if (frame[UNNAMED] == np.arange(len(frame))).all():
                print("note: the first column has no name and numbers the rows; left out.")
                frame = frame.drop(columns=UNNAMED)
        some = frame.dropna(axis="columns", how="all")
        whole, missing = some.dropna(), some.isna().sum()
        holes = ", ".join(f'{n} in "{c}"' for c, n in missing[missing > 0].items())
        if lost := len(frame) - len(whole):
            print(
                f"note: {lost} of {len(frame)} rows have missing or infinite values ({holes}); "
                "left out."
            )
        if len(whole) < 10:
            raise bnn.DataError(
                f"{len(whole)} rows without missing values ({holes or 'none is missing'}); at "
                "least 10 are needed. Drop the columns that miss many."
            )
        y = whole.pop(target)
        text = [c for c in whole.columns if not pandas.api.types.is_numeric_dtype(whole[c])]
        if wide := [c for c in text if whole[c].nunique() > CLASSES]:
            raise bnn.DataError(
                f"The text columns {wide} have more than {CLASSES} different values. Drop them, or "
                "write numbers: 1200.5 for 1,200.5 or $1200.50, days for dates."
            )
        if text:
            print(f"note: the text columns {text} become one 0/1 column for each value.")
            whole = pandas.get_dummies(whole, columns=text, dtype=float)
        whole = whole.astype(float)
        constant = [c for c in whole.columns if len(whole[c].unique()) == 1]
        if constant:
            print(f"note: the columns {constant} are constant; left out.")
        self.x = whole.drop(columns=constant)
        if self.x.empty:
            raise bnn.DataError(
                f'Besides the target "{target}" the table has no column that tells rows apart.'
            )
        if y.nunique() == 1:
            raise bnn.DataError(f'The target "{target}" is the same in every row.')
        self.columns, self.target, self.name = list(self.x.columns), target, name
        number = pandas.api.types.is_numeric_dtype(y) and y.nunique() > 2  # else yes or no
        self.labels = [] if number else sorted(y.unique().tolist())
        if number and y.nunique() <= CLASSES:
            print(
                f'note: the target "{target}" has {y.nunique()} different values, and is taken for '
                "a number. Write its values as text for classes."
            )
        self.y = y.to_numpy(float) if number else np.array([self.labels.index(v) for v in y])
        if len(self.labels) > CLASSES:
            raise bnn.DataError(
                f'The target "{target}" is text with {len(self.labels)} values; classes are at '
                f"most {CLASSES}. Write numbers as 1200.5, without units or commas."
            )

    @classmethod
    def read(cls, path: str | None, target: str | None) -> "Table":
        """A CSV file; without one, the diabetes study that ships with the package."""
        import pandas

        file = Path(path) if path else Path(__file__).parent / "diabetes.csv"
        if path and target is None:
            raise bnn.DataError("Say which column to predict: --target NAME.")
        try:
            frame = pandas.read_csv(file)
            if len(frame.columns) == 1 and ";" in frame.columns[0]:
                raise bnn.DataError(
                    f"{file} has semicolons between its columns. Write commas, and points in "
                    "numbers."
                )
        except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeError) as error:
            raise bnn.DataError(f"{file} cannot be read as a CSV table: {error}") from error
        return cls(frame, target or "target", file.stem)

    @property
    def kind(self) -> str:
        """What the target is, in words."""
        return f"{len(self.labels)} classes" if self.labels else "a number"

    def split(self, share: float, seed: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """Rows to fit and rows held out, at random."""
        order = np.random.default_rng(seed).permutation(len(self.y))
        cut = max(1, round(share * len(order)))
        test, train = order[:cut], order[cut:]
        if len(train) < 5:
            raise bnn.DataError(
                f"--test-share {share:g} leaves {len(train)} of {len(order)} rows to fit; at least "
                "5 are needed."
            )
        return (self.x.iloc[train], self.y[train]), (self.x.iloc[test], self.y[test])

    def model(self, train: tuple[Any, Any]) -> Any:
        """A net of one hidden layer in the units of the rows it is fitted to."""
        if self.labels:
            return models.mlp_classification(
                len(self.columns), len(self.labels), hidden=(HIDDEN,), standardize=train[0]
            )
        return models.mlp_regression(len(self.columns), hidden=(HIDDEN,), standardize=train)


def _quietly(call: Any) -> None:
    """Runs what says nothing to the user but other libraries' plans for their future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError("a share in (0, 1)")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError("a whole number from 0 below 2**64")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bnn",
        description="Fit a Bayesian neural net to a table and say how sure it is.",
    )
    parser.add_argument("table", nargs="?", help="a CSV file; default: the diabetes study")
    parser.add_argument("--target", help="name of the column to predict")
    parser.add_argument(
        "--method",
        nargs="+",
        choices=sorted(METHODS),
        default=["svi", "nuts"],
        help="one or several (default: svi nuts)",
    )
    parser.add_argument(
        "--out", default="bnn-output", help="folder for results (default: bnn-output)"
    )
    parser.add_argument(
        "--test-share", type=_share, default=0.2, help="share of rows held out (0.2)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the split and the fits (0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
