"""The site's claims: names that exist, code that runs, numbers that were measured."""

import ast
import importlib
import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import bnn

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {str(p.relative_to(DOCS)): p.read_text() for p in sorted(DOCS.rglob("*.md"))}
METHODS = [c for c in bnn.method.METHODS.values() if c.__module__.startswith("bnn.")]
ROOMS = ["bnn.models", "bnn.models.priors", "bnn.models.likelihoods", "bnn.calibration",
         "bnn.conformal", "bnn.selective", "bnn.plots", "bnn.sklearn", "bnn.errors"]  # fmt: skip


def test_every_public_name_is_in_the_reference():
    text = "\n".join(PAGES.values())
    rooms = {name for name in ROOMS if f".. automodule:: {name}\n   :members:" in text}
    assert rooms == set(ROOMS)
    for name in bnn.__all__:
        thing = getattr(bnn, name)
        if inspect.ismodule(thing):
            continue
        told = re.search(rf"\.\. auto(class|function):: bnn\.{name}\n", text)
        assert told or issubclass(thing, Warning | Exception), name


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_every_method_has_a_page_and_every_formula_of_it_is_drawn(kind):
    page = PAGES[f"methods/{kind.__module__.rpartition('.')[2]}.md"]
    assert f".. automodule:: {kind.__module__}\n" in page
    formulas = _formulas()
    for first in _blocks(importlib.import_module(kind.__module__).__doc__):
        assert first in formulas, first


def test_every_formula_is_still_that_of_a_docstring():
    found = set()
    for path in (ROOT / "bnn").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found |= set(_blocks(ast.get_docstring(node) or ""))
    assert set(_formulas()) <= found


def _formulas():
    tree = ast.parse((DOCS / "formulas.py").read_text())
    (given,) = (n.value for n in tree.body if isinstance(n, ast.Assign))
    return ast.literal_eval(given)


def _blocks(docstring):
    """First lines of what is indented, paragraphs that follow one another being one."""
    told = [line for line in inspect.cleandoc(docstring).splitlines() if line]
    for before, line in pairwise(told):
        if line.startswith("    ") and not before.startswith("    "):
            yield line.strip()


def test_the_decision_table_tells_what_was_measured():
    measured = _scorecards((ROOT / "benchmarks" / "README.md").read_text())
    row = r"^\|[^|]*\| `([^`]+)` \|([^|]*)\|([^|]*)\|([^|]*)\|"
    rows = re.findall(row, PAGES["howto/choose.md"], re.M)
    assert len(rows) >= 10
    for label, *told in rows:
        known = measured[{"NUTS": "NUTS, defaults"}.get(label, label)]
        assert [float(v) for v in told] == known[:3], label  # the fourth is of a transformer


def _scorecards(text):
    """Label -> total variation on each of the problems it is on."""
    found = {}
    text = text.partition("### scorecard")[2]
    for label, tv in re.findall(r"^\| ([^|*]+?) \| (0\.\d+) \|", text, re.M):
        found.setdefault(label, []).append(float(tv))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("section", ["TyXe", "BLiTZ", "Raw Pyro", "NumPyro"])
@pytest.mark.filterwarnings("ignore", "error::bnn.errors.PerformanceWarning")
def test_our_side_of_a_comparison_runs(section):
    """Settings so short do not converge, and that alone is passed over."""
    page = PAGES["howto/switch.md"]
    start = re.search(r"```python\n(import bnn.*?)```", page, re.S)[1]
    part = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.S | re.M)[1]
    (code,) = re.findall(r"\*\*bnn\*\*\n\n```python\n(.*?)```", part, re.S)
    x = torch.linspace(-1, 1, 50)[:, None]
    here = {"x": x, "y": torch.sin(3 * x[:, 0]), "x_new": x[:7] + 0.1}
    exec(start + code, here)
    told = here.get("samples", here.get("draws", here.get("mean")))
    assert told.shape[-1] == 7
    assert torch.isfinite(told).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_readmes_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    found = {}
    exec(code, found)
    found["nuts"].save("posterior.bnn")
    again = bnn.load("posterior.bnn", found["model"])
    assert torch.equal(again.predict(found["grid"]).y, found["prediction"].y)
    inside = (found["grid"][:, 0].abs() > 1.2) & (found["grid"][:, 0].abs() < 2.8)
    gap = found["grid"][:, 0].abs() < 0.5
    doubt = found["prediction"].epistemic
    assert doubt[gap].mean() > 4 * doubt[inside].mean()


def test_pictures_are_small_and_there():
    for page in [(ROOT / "README.md").read_text(), *PAGES.values()]:
        for name in re.findall(r"!\[[^\]]*\]\((?:docs/)?(pictures/[^)]+)\)", page):
            assert (DOCS / name).stat().st_size < 150_000


def test_the_readme_is_a_screen_and_two_folded_tables():
    """GitHub reads a table inside of HTML as one where blank lines stand around it."""
    readme = (ROOT / "README.md").read_text()
    pattern = r"<details>\n<summary>[^<]+</summary>\n\n(.*?)\n\n</details>\n"
    table, measured = re.findall(pattern, readme, re.S)
    assert all(line[0] == "|" for line in table.splitlines()[1:-1])
    assert "\n\n| " in measured
    shown = [line for line in re.sub(pattern, "", readme, flags=re.S).splitlines() if line]
    assert len(shown) <= 45
    for kind in METHODS:
        assert f"`{kind.__name__}`" in "\n".join(shown), kind.__name__
        assert re.search(rf"^\| `{kind.__name__}\b", table, re.M), kind.__name__
    (commands,) = re.findall(r"```sh\n.*?```", readme, re.S)
    assert commands in PAGES["install.md"]


def test_links_and_pictures_of_the_readme_are_there():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!http)([^)]+)\)|(?:href|src)=\"(?!http)([^\"]+)\"", readme)
    assert len(links) > 10
    for path, _, heading in ((a or b).partition("#") for a, b in links):
        assert (ROOT / path).exists(), path
        if heading:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.M)
            assert heading in {title.lower().replace(" ", "-") for title in headings}, heading
