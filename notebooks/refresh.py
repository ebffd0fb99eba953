"""Runs notebooks and stores their outputs: `python notebooks/refresh.py [a.ipynb ...]`.

Without arguments all of them. What is stored is what a run gives and nothing of when or where it
ran, so that a rerun on one machine leaves the same bytes.
"""

import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
CELL = re.compile(r"\S*ipykernel_\d+\S+\.py:\d+: ")  # where a warning was raised: a file of the run


def refresh(path: Path) -> None:
    """Runs one notebook, from its own folder, and writes it back."""
    os.environ["TQDM_DISABLE"] = "1"  # bars are for who watches
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # how a stream was cut depends on the moment
        resources={"metadata": {"path": str(HERE)}},
    ).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                output.text = CELL.sub("", output.text)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)
    print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        refresh(path)
