"""The README's picture, by the README's own example: `python docs/pictures.py`, about a minute."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PANELS = {"nuts": "NUTS", "ensemble": "DeepEnsemble", "dropout": "MCDropout"}


def example() -> str:
    """The first block of Python in the README."""
    readme = (HERE.parent / "README.md").read_text()
    return re.search(r"```python\n(.*?)```", readme, re.S)[1]


def main() -> None:
    """Runs the example and draws its posteriors side by side."""
    import bnn

    found: dict = {}
    exec(example(), found)
    plt.close("all")
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.1), sharey=True, layout="constrained")
    for ax, (name, title) in zip(axes, PANELS.items(), strict=True):
        prediction = found[name].predict(found["grid"])
        bnn.plots.band(prediction, (found["x"], found["y"]), title=title, ax=ax)
        handles, labels = ax.get_legend_handles_labels()
        ax.get_legend().remove()
        ax.set(ylim=(-3, 3), ylabel="y" if ax is axes[0] else "")
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    path = HERE / "pictures" / "gap.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
