"""A million rows, minibatches: does a step of SVI stay as quick and the memory as small."""

import resource
import tempfile
from pathlib import Path
from time import process_time

import numpy as np

from benchmarks.common import arguments, begin, table

COLUMNS, HIDDEN, BATCH = 8, 50, 256
SETTLED = 1_000  # steps after which neither may change any more
LIMITS = {"memory": 5.0, "time": 0.10}  # MB, and share of a step


def anonymous() -> float:
    """Megabytes of this process that are no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1_000
    raise OSError("no RssAnon: this benchmark needs Linux")


class Watch:
    """A constant schedule that notes memory and processor time each thousand steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.memory: list[float] = []
        self.seconds: list[float] = []

    def __call__(self, step: int) -> float:
        if step % 1_000 == 0 and step not in self.steps[-1:]:
            self.steps.append(step)
            self.memory.append(anonymous())
            self.seconds.append(process_time())
        return 1.0

    def told(self) -> tuple[float, float, float, float]:
        """MB grown, ms of a step, its drift as a share, and the peak of all memory in MB."""
        start = self.steps.index(SETTLED)
        each = np.diff(self.seconds[start:]) / np.diff(self.steps[start:])
        third = max(len(each) // 3, 1)
        drift = np.median(each[-third:]) / np.median(each[:third]) - 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1_000
        return max(self.memory[start:]) - self.memory[start], 1e3 * np.median(each), drift, peak


def write(folder: str, rows: int) -> tuple[np.memmap, np.memmap]:
    """The rows x (row, column) and y (row,) on the disk, written a stretch at a time."""
    shapes = {"x": (rows, COLUMNS), "y": (rows,)}
    made = {k: np.memmap(f"{folder}/{k}", np.float32, "w+", shape=v) for k, v in shapes.items()}
    rng = np.random.default_rng(0)
    for start in range(0, rows, 100_000):
        some = slice(start, min(start + 100_000, rows))
        made["x"][some] = rng.normal(size=(some.stop - start, COLUMNS))
        noise = 0.3 * rng.normal(size=some.stop - start)
        made["y"][some] = np.sin(made["x"][some, 0]) + 0.5 * made["x"][some, 1] + noise
    return made["x"], made["y"]


def main() -> None:
    parser = arguments(__doc__, repeats=0)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()
    if args.quick:
        args.rows, args.steps = 20_000, 3_000
    begin(f"{args.rows:,} rows, {args.steps:,} steps of {BATCH} rows", args.cores)
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    import bnn
    from bnn.models import mlp_regression

    model = mlp_regression(COLUMNS, (HIDDEN,))
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        x, y = write(folder, args.rows)
        memory = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y))
        held = DataLoader(TensorDataset(*memory), BATCH, shuffle=True)
        given = {"mapped from the disk": (x, y), "in memory": memory, "DataLoader": (held,)}
        for name, data in given.items():
            watch = Watch()
            method = bnn.SVI(steps=args.steps, batch_size=BATCH, schedule=watch)
            bnn.fit(model, *data, method=method, progress=False)
            grown, step, drift, peak = watch.told()
            passed = grown < LIMITS["memory"] and abs(drift) < LIMITS["time"]
            verdict = "yes" if passed else "NO"
            row = [f"{grown:.1f}", f"{step:.2f}", f"{drift:+.1%}", f"{peak:.0f}", verdict]
            lines.append([name, *row])
    header = ["rows", "MB grown", "ms a step", "drift", "peak MB so far", "within limits"]
    title = f"From step {SETTLED:,} on; limits {LIMITS['memory']:g} MB and {LIMITS['time']:.0%}"
    table(title, header, lines)
    print(f"\nThe data take {args.rows * (COLUMNS + 1) * 4 / 1e6:.0f} MB.")


if __name__ == "__main__":
    main()
