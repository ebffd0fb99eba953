"""Notebooks as they are stored: run through, tidy, and on public names alone. None is run here."""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

import bnn

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
LARGEST = 700_000  # bytes: what GitHub still shows at once
PLACES = re.compile(r"/(home|root|tmp|work|Users|opt|usr)/|[A-Z]:\\\\|site-packages| at 0x[0-9a-f]")


@pytest.fixture(params=NOTEBOOKS)
def path(request):
    return NOTEBOOKS[request.param]


@pytest.fixture
def notebook(path):
    return json.loads(path.read_text())


def source(cell):
    return "".join(cell["source"])


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def trees(notebook):
    return [ast.parse(source(cell)) for cell in code(notebook)]


def nodes(notebook, kind):
    return [n for tree in trees(notebook) for n in ast.walk(tree) if isinstance(n, kind)]


def told(cell):
    """All text that a cell's outputs hold, pictures left out."""
    parts = []
    for output in cell["outputs"]:
        parts += [output.get("text", "")]
        parts += [v for k, v in output.get("data", {}).items() if not k.startswith("image/")]
    return "\n".join("".join(part) for part in parts)


def test_the_folder_is_read():
    assert NOTEBOOKS
    listed = (FOLDER / "README.md").read_text()
    assert all(f"{name}.ipynb" in listed for name in NOTEBOOKS)


def test_the_title_asks_a_question(notebook):
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \d\d · \S", source(first))
    assert "?" in source(first)


def test_it_was_run_through_in_order(notebook):
    cells = code(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds
    assert {"display_data", "execute_result"} & set(kinds)


def test_nothing_is_stored_of_where_and_when_it_ran(notebook):
    assert all(not cell["metadata"] for cell in notebook["cells"])
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    for cell in code(notebook):
        found = PLACES.search(told(cell))
        assert not found, found
        assert "%|" not in told(cell), "a progress bar"


def test_warnings_are_shown_where_the_text_speaks_of_them(notebook):
    texts = [source(c).lower() for c in notebook["cells"] if c["cell_type"] == "markdown"]
    for cell in code(notebook):
        if any(output.get("name") == "stderr" for output in cell["outputs"]):
            assert any("warn" in text for text in texts)


def test_the_file_is_small(path):
    assert path.stat().st_size < LARGEST


def test_the_first_cell_sets_the_seed(notebook):
    assert re.search(r"manual_seed\(|default_rng\(|random\.seed\(", source(code(notebook)[0]))


def test_the_last_cell_asserts_what_the_text_claims(notebook):
    last = ast.parse(source(code(notebook)[-1]))
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(last)) >= 3


def test_no_function_is_longer_than_ten_lines(notebook):
    for function in nodes(notebook, ast.FunctionDef | ast.ClassDef):
        assert function.end_lineno - function.lineno < 10, function.name


def dotted(node):
    """bnn.plots.band as ["bnn", "plots", "band"]; of anything else the end alone."""
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else [""]


def public(module):
    return getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"])


def test_only_public_names_are_used(notebook):
    for node in nodes(notebook, ast.Attribute):
        assert not node.attr.startswith("_"), ast.unparse(node)
        head, *rest = dotted(node)
        found = {"bnn": bnn}.get(head)
        for name in rest:
            if inspect.ismodule(found):
                assert name in public(found), ast.unparse(node)
                found = getattr(found, name)
    for node in nodes(notebook, ast.ImportFrom):
        if node.module.partition(".")[0] == "bnn":
            assert "._" not in node.module
            names = {alias.name for alias in node.names}
            assert names <= set(public(importlib.import_module(node.module))), ast.unparse(node)
    for node in nodes(notebook, ast.Import):
        of_bnn = {alias.name for alias in node.names if alias.name.partition(".")[0] == "bnn"}
        assert of_bnn <= {"bnn", "bnn.sklearn"}
