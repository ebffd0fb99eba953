"""The walls of the design: who imports whom, and what no file of the package does."""

import ast
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest

import bnn

ROOT = Path(__file__).parents[1]
FILES = {str(p.relative_to(ROOT)): p for p in sorted((ROOT / "bnn").rglob("*.py"))}
MODELS = [f for f in FILES if f.startswith("bnn/models/")]
INFERENCE = [f for f in FILES if f.startswith("bnn/inference/")]
METHOD_FILES = [f for f in INFERENCE if not Path(f).name.startswith("_")]
ARRAYS = [f for f in FILES if re.match(r"bnn/(calibration/|(arrays|conformal|selective)\.py)", f)]
CORE = [f for f in FILES if f not in MODELS + INFERENCE]
ROOMS = [bnn, bnn.models, bnn.inference, bnn.calibration, bnn.plots]  # with an __all__ each
# the package's face, its command, and the estimators, which nothing in it imports
DOORS = ("bnn/__init__.py", "bnn/__main__.py", "bnn/sklearn.py")
LAZY = {"arviz", "matplotlib", "sklearn", "pandas", "xarray"}  # slow to import, and not always used


def imports(file, *, top=False):
    """Dotted names that a file imports; with `top`, those it imports when it is imported itself."""
    found = set()

    def visit(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not (top and (inside or typing)):
                visit(child)

    visit(ast.parse(FILES[file].read_text()))
    return found


def outside(names):
    """Top-level packages that belong neither to Python nor to bnn."""
    return {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"bnn"}


def within(name, module):
    return name == module or name.startswith(module + ".")


def test_the_checks_see_the_package():
    assert len(MODELS) > 5
    assert len(ARRAYS) >= 8
    assert {"bnn/inference/svi.py", "bnn/inference/map.py"} < set(METHOD_FILES)
    assert "bnn.inference._optimise.maximise" in imports("bnn/inference/svi.py")
    assert "arviz" in imports("bnn/export.py")
    assert "arviz" not in imports("bnn/export.py", top=True)


@pytest.mark.parametrize("file", MODELS)
def test_models_know_torch_and_pyro_only(file):
    names = imports(file)
    assert outside(names) <= {"torch", "pyro"}
    assert all(within(n, "bnn.models") for n in names if within(n, "bnn"))


@pytest.mark.parametrize("file", INFERENCE)
def test_a_method_knows_the_core_and_shared_machinery(file):
    names = imports(file)
    assert outside(names) <= {"torch", "pyro", "numpy", "tqdm", "numba"}
    assert not any(within(n, "bnn.models") for n in names)
    if file != "bnn/inference/__init__.py":
        for name in imports(file, top=True):
            if within(name, "bnn.inference"):
                assert name.split(".")[2].startswith("_"), f"{file} imports another method: {name}"


@pytest.mark.parametrize("file", [f for f in CORE if f not in DOORS])
def test_the_core_knows_neither_models_nor_methods(file):
    names = imports(file)
    assert not any(within(n, "bnn.models") or within(n, "bnn.inference") for n in names)


@pytest.mark.parametrize("file", ARRAYS)
def test_calibration_sees_arrays_only(file):
    names = imports(file)
    own = "bnn.calibration" if "/calibration/" in file else "bnn.arrays"
    assert outside(names) <= {"torch", "numpy"}
    for name in names:
        if within(name, "bnn"):
            assert any(within(name, n) for n in ("bnn.errors", "bnn.arrays", own)), name


@pytest.mark.parametrize("file", [f for f in FILES if f != "bnn/sklearn.py"])
def test_what_is_slow_to_import_is_imported_where_it_is_used(file):
    assert not outside(imports(file, top=True)) & LAZY
    assert not any(within(n, "bnn.sklearn") for n in imports(file))


def test_one_file_knows_arviz():
    assert [f for f in FILES if "arviz" in outside(imports(f))] == ["bnn/export.py"]


@pytest.mark.parametrize("file", METHOD_FILES)
def test_a_method_fits_on_a_few_screens(file):
    assert len(FILES[file].read_text().splitlines()) <= 200


def test_nothing_branches_on_the_method():
    names = "|".join(sorted(bnn.method.METHODS))
    branch = re.compile(rf"(isinstance|issubclass)\([^)]*\b({names})\b|is (not )?({names})\b")
    for file, path in FILES.items():
        if file not in METHOD_FILES:
            assert not branch.search(path.read_text()), file


@pytest.mark.parametrize("file", FILES)
def test_nothing_that_is_read_is_executed(file):
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        assert call not in ("eval", "exec", "compile", "__import__", "os.system"), call
        assert not re.search(r"(pickle|dill|shelve)\.|param_store\(\)\.load|ParamStore", call), call
        if call == "torch.load":
            assert "weights_only=True" in ast.unparse(node)
        for keyword in node.keywords:
            assert ast.unparse(keyword) not in ("weights_only=False", "allow_pickle=True")
    assert not outside(imports(file)) & {"dill", "cloudpickle", "joblib"}
    assert not {"pickle", "marshal", "shelve"} & {n.split(".")[0] for n in imports(file)}


@pytest.mark.parametrize("name", ["models", "inference"])
def test_the_top_level_shows_the_rooms(name):
    link = ROOT / name
    assert link.is_symlink(), f"git checkout with core.symlinks=true, or: ln -s bnn/{name} {name}"
    assert link.readlink() == Path("bnn") / name


def test_every_file_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["packages"]["find"]["include"] == ["bnn", "bnn.*"]
    data = {ROOT / "bnn" / name for name in settings["package-data"]["bnn"]}
    for path in (ROOT / "bnn").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.suffix == ".py" or path in data, f"{path} is in no wheel"
            assert (path.parent / "__init__.py").exists(), f"{path.parent} is no package"
    assert all(path.is_file() for path in data)


@pytest.mark.parametrize("room", ROOMS, ids=lambda m: m.__name__)
def test_public_names_exist_and_are_documented(room):
    assert sorted(room.__all__) == sorted(set(room.__all__))
    for name in room.__all__:
        thing = getattr(room, name)
        assert (inspect.getdoc(thing) or "").strip(), name
        if inspect.isclass(thing):
            assert "__doc__" in vars(thing), f"{name} has its parent's docstring"
            assert vars(thing)["__doc__"], name


PUBLIC = [*ROOMS, bnn.models.priors, bnn.models.likelihoods, bnn.conformal, bnn.selective]


@pytest.mark.parametrize("room", PUBLIC, ids=lambda m: m.__name__)
def test_public_names_have_an_example_that_runs(room):
    """The doctests of `bnn` are collected with the tests."""
    names = getattr(room, "__all__", None)
    here = [n for n, v in vars(room).items() if getattr(v, "__module__", "") == room.__name__]
    for name in names or [n for n in here if not n.startswith("_")]:
        thing = getattr(room, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__module__.startswith("bnn."), name
            assert ">>> " in (thing.__doc__ or ""), f"{room.__name__}.{name} has no example"


def test_the_methods_are_public():
    for name, kind in bnn.method.METHODS.items():
        if kind.__module__.startswith("bnn."):
            assert getattr(bnn, name) is kind
            assert name in bnn.__all__
