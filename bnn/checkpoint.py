"""Files: a posterior as one safetensors file of tensors and JSON. Reading executes nothing.

Layout: tensors `draws/<site>`, `params/<name>`, `stats/<name>`, `history`, `snapshots/<site>`,
`snapshot_steps`, `data/<i>` (of a loader its first batch, `batch/<i>`); the header's metadata holds
the manifest (settings, seed, versions). See `bnn.files` for how they are written and read.
"""

import dataclasses
import os
import platform
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from bnn import contract, files
from bnn.data import Data, some_rows
from bnn.devices import checked
from bnn.errors import CheckpointError, DataError, ModelError
from bnn.fingerprint import fingerprint
from bnn.handlers import parameters, quiet_pyro, seeded
from bnn.method import METHODS, Method, Model
from bnn.run import FIT, POSTERIOR, Interrupted, Run, no_link
from bnn.sites import Site, Sites
from bnn.turns import alone

if TYPE_CHECKING:
    from bnn.posterior import Posterior

_SCHEMA = 2
_AUTOGUIDE = "pyro.infer.autoguide."


def write(posterior: "Posterior", path: "str | os.PathLike[str]") -> None:
    """Writes a posterior to one file, atomically: a reader sees the old file or the new one.

    Raises:
        CheckpointError: the file cannot be written.
    """
    once = lambda v: v[:, :1] if is_repeated(v) else v
    tensors = {f"draws/{k}": once(v) for k, v in posterior.draws.items()}
    tensors |= {f"params/{k}": v for k, v in posterior.params.items()}
    tensors |= {f"stats/{k}": v for k, v in posterior.stats.items()}
    tensors |= {f"snapshots/{k}": v for k, v in posterior.snapshots.items()}
    for name in ("history", "snapshot_steps"):
        if (tensor := getattr(posterior, name)) is not None:
            tensors[name] = tensor
    files.write(Path(path), tensors | _stored(posterior.data), _manifest(posterior))


def _stored(data: Data) -> dict[str, Tensor]:
    """The training data; of a loader one batch, enough to find the model's sites again."""
    group = "data" if data.loader is None else "batch"
    return {f"{group}/{i}": v for i, v in enumerate(data.tensors)}


def _known_again(loader: Any) -> str | None:
    """The fingerprint of some rows of a loader; None where it has none, or gives them at random."""
    seen = []
    for number in range(2):
        try:
            with seeded(np.random.SeedSequence(number)):
                seen.append([fingerprint(row) for row in some_rows(loader) if _numbers(row)])
        except Exception:  # a dataset may have no such rows, and raise what it likes
            return None
    return fingerprint(seen[0]) if seen[0] and seen[0] == seen[1] else None


def _numbers(row: Any) -> bool:
    """True of what is made of arrays, numbers and texts alone: it is the same in every process."""
    known = Tensor, np.ndarray, np.generic, bool, int, float, str
    return all(isinstance(leaf, known) for leaf in tree_leaves(row))


def _batches(data: Data) -> dict[str, Any]:
    """What a loader says of its batches: how large, how many in a pass, and in which order."""
    given, told = data.loader, {"batches": data.epoch(None)}
    if isinstance(given, DataLoader):
        order = [type(each).__name__ for each in (given.batch_sampler, given.sampler)]
        told |= {"batch size": given.batch_size, "order": " of ".join(order)}
    return told


def files_of_fit(
    model: Model, data: Data, method: Method, seed: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a fit is, before it runs: a manifest and the data. See `bnn.run.Folder.check`."""
    tensors = _stored(data)
    settings = _settings(method)
    code = [k for k, v in settings.items() if isinstance(v, dict) and "code" in v]
    known = {k: {"code": fingerprint(getattr(method, k))} for k in code}
    if data.loader is None:
        told: dict[str, Any] = {"contents": files.digest("", tensors)}
    else:  # its first batch has its rows in any order
        shapes = [str(tuple(v.shape[1:])) for v in data.tensors]
        told = {"shapes": shapes, **_batches(data), "some rows": _known_again(data.loader)}
    identity = {
        "data": {"names": list(data.names), "rows": data.rows, **told},
        "model": fingerprint(model),
        "settings": {"method": type(method).__name__, **settings, **known},
        "seed": int(seed),
        "dtype": str(torch.get_default_dtype()),
    }
    return {
        "is": identity,
        "versions": _versions(),
        "method": {"name": type(method).__name__, "settings": settings},
        "names": list(data.names),
        "columns": data.columns,
        "rows": data.rows,
        "seed": int(seed),
    }, tensors


@alone
def load(
    path: "str | os.PathLike[str]",
    model: Model,
    *,
    device: "str | torch.device | None" = None,
    **code: Any,
) -> "Posterior":
    """Reads a posterior that `Posterior.save` wrote. Nothing in the file is executed.

    Args:
        path: the file; or the folder of `fit(..., checkpoint=folder)`, of which this is the
            posterior at its end, or as far as it has come (`complete` is False then).
        model: the model that was fitted; its sites must be those in the file.
        device: where the posterior is to lie, and to predict; None takes the CPU.
        **code: settings of the method that are code, as they were: a guide, a schedule, a prior
            function. What is not passed has its default, with a warning.

    Raises:
        CheckpointError: not such a file, damaged, of a newer schema, or of another model; or it
            predicts with a setting that is code and was not passed; or a fit that is not yet so far
            that there is a posterior.
        TypeError: `code` names what is not a setting that the file lacks.

    Example:
        >>> import bnn, tempfile
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> model = bnn.models.linear(1, likelihood=bnn.models.likelihoods.Gaussian(0.1))
        >>> posterior = bnn.fit(model, x, x[:, 0], method=bnn.Laplace(steps=200, draws=50))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     posterior.save(f"{folder}/line.bnn")
        ...     again = bnn.load(f"{folder}/line.bnn", model)
        >>> torch.equal(again.predict(x).y, posterior.predict(x).y)
        True
    """
    where = checked(device)
    if where is not None:
        return load(path, model, **code).to(where)
    path = Path(path)
    if path.is_dir():
        finished = no_link(path / POSTERIOR)
        return load(finished, model, **code) if finished.exists() else _meanwhile(path, model, code)
    manifest, tensors = _read(path)
    return _posterior(path, manifest, tensors, model, _method(manifest["method"], code, path))


def read_finished(path: Path, model: Model, data: Data, method: Method) -> "Posterior":
    """The posterior of a finished fit that is called again with the same data and settings."""
    manifest, tensors = _read(path)
    if manifest["method"]["name"] != type(method).__name__:
        raise CheckpointError(f"{path} is by another method: {manifest['method']['name'][:60]}.")
    found = _posterior(path, manifest, tensors, model, method)
    return dataclasses.replace(found, data=data)


def _meanwhile(folder: Path, model: Model, code: dict[str, Any]) -> "Posterior":
    """The posterior of a fit on its way: the fit itself, set back and ended at once."""
    from bnn.fitting import approximate

    path = no_link(folder / FIT)
    manifest, tensors = files.read(path)
    try:
        _check_fields(manifest, ("method", "names", "columns", "rows", "seed"))
    except ValueError as error:
        raise CheckpointError(f"{path} has no manifest that can be read: {error}.") from error
    data = _data(manifest, _group(tensors, "data"), _group(tensors, "batch"), path)
    method = _method(manifest["method"], code, path)
    data, sites = _checked(model, data, method, path)
    run = Run(folder, frozen=True)
    try:
        return approximate(model, data, sites, method, manifest["seed"], False, run)
    except Interrupted as error:
        raise CheckpointError(
            f"{folder} has no draws yet: {error} Call the same fit again to go on."
        ) from error


def _group(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(name + "/")}


def _checked(model: Model, data: Data, method: Method, path: Path) -> tuple[Data, Sites]:
    try:
        return contract.check(model, data, adds_sites=method.adds_sites)
    except (ModelError, DataError) as error:
        raise CheckpointError(
            f"The model does not run on the data stored in {path}: {error} "
            "Pass the model that was fitted."
        ) from error


def _posterior(
    path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor], model: Model, method: Method
) -> "Posterior":
    """What a file holds, checked against the model."""
    from bnn.posterior import Posterior

    repeated, stats = manifest["repeated"], _group(tensors, "stats")
    draws = {k: _repeat(v, repeated) for k, v in _group(tensors, "draws").items()}
    params, snapshots = _group(tensors, "params"), _group(tensors, "snapshots")
    data = _data(manifest, _group(tensors, "data"), _group(tensors, "batch"), path)
    data, sites = _checked(model, data, method, path)
    _check_draws(draws, stats, tensors.get("history"), path)
    _check_snapshots(draws, snapshots, tensors.get("snapshot_steps"), path)
    try:
        latent = contract.latent_sites(method.program(model, params), data, sites)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} lacks what {type(method).__name__} predicts by: {error}. "
            "Pass the model that was fitted."
        ) from error
    _check_same_model(model, data, sites, latent, draws, params, path)
    return Posterior(
        model=model,
        method=method,
        data=data,
        sites=sites,
        draws={name: draws[name] for name in latent if name in draws},
        params=params,
        stats=stats,
        history=tensors.get("history"),
        elbo=manifest["elbo"],
        log_evidence=manifest["log_evidence"],
        snapshots=snapshots,
        snapshot_steps=tensors.get("snapshot_steps"),
        count=tuple(manifest["count"]),
        seed=manifest["seed"],
        seconds=manifest["seconds"],
        complete=manifest["complete"],
    )


def _data(
    manifest: dict[str, Any], kept: dict[str, Tensor], batch: dict[str, Tensor], path: Path
) -> Data:
    """The training data; of a loader its first batch and its number of rows."""
    stored, names, columns = kept or batch, manifest["names"], manifest["columns"]
    args = tuple(stored[str(i)] for i in range(len(names)) if str(i) in stored)
    rows = len(args[-1]) if args and args[-1].ndim else 0
    right = (
        len(args) == len(names) == len(stored)
        and not (kept and batch)
        and 1 <= rows <= manifest["rows"]
        and (rows == manifest["rows"] or not kept)
        and all(len(a) == rows for a in args if a.ndim)
        and columns.keys() <= set(names)
        and all(args[names.index(k)].shape[1:] == (len(v),) for k, v in columns.items())
    )
    if not right:
        raise CheckpointError(f"{path} contradicts itself: its data are not those it lists.")
    loader = None if kept else DataLoader([])  # type: ignore[arg-type]
    return Data(args, tuple(names), columns, manifest["rows"], loader)


def _check_draws(
    draws: dict[str, Tensor], stats: dict[str, Tensor], history: Tensor | None, path: Path
) -> None:
    shapes = {tuple(v.shape[:2]) for v in (draws | stats).values()}
    right = (
        len(shapes) <= 1
        and all(len(shape) == 2 and 0 not in shape for shape in shapes)
        and all(v.ndim == 2 for v in stats.values())
        and (history is None or history.ndim == 1)
    )
    if not right:
        raise CheckpointError(
            f"{path} contradicts itself: its draws have (chain, draw) {sorted(shapes)}."
        )


def _check_snapshots(
    draws: dict[str, Tensor], snapshots: dict[str, Tensor], steps: Tensor | None, path: Path
) -> None:
    count = 0 if steps is None else steps.numel()
    right = (
        (steps is None or (steps.ndim == 1 and not steps.is_floating_point()))
        and bool(snapshots) == bool(count)
        and all(
            k in draws and tuple(v.shape) == (count, *draws[k].shape) for k, v in snapshots.items()
        )
    )
    if not right:
        raise CheckpointError(f"{path} contradicts itself: its snapshots are not of its draws.")


def _check_same_model(
    model: Model,
    data: Data,
    sites: Sites,
    latent: dict[str, Site],
    draws: dict[str, Tensor],
    params: dict[str, Tensor],
    path: Path,
) -> None:
    shapes = {k: tuple(v.shape[2:]) for k, v in draws.items()}
    wanted = {k: v.shape for k, v in latent.items() if k in draws or not v.local}
    absent = {k: "absent" for k in sites.params if k not in params}
    if shapes != wanted or absent:
        differ = sorted(k for k in shapes.keys() | wanted.keys() if shapes.get(k) != wanted.get(k))
        told = "; ".join(
            f'"{k}" is {shapes.get(k, "absent")} in the file and '
            f"{wanted.get(k, 'trainable' if k in absent else 'absent')} in the model"
            for k in [*differ, *absent][:5]
        )
        raise CheckpointError(f"{path} holds the posterior of another model: {told}.")
    if not sites.params:
        return
    try:
        with quiet_pyro(), seeded(np.random.SeedSequence(0)):
            with parameters(model, data.tensors, params):
                pass
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} holds trainable tensors of other shapes than the model's: {error}"
        ) from error


def _versions() -> dict[str, Any]:
    """What the bits of a result depend on besides model, data, settings and seed."""
    import bnn

    return {
        "bnn": bnn.__version__,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _settings(method: Method) -> dict[str, Any]:
    return {f.name: _plain(getattr(method, f.name)) for f in dataclasses.fields(method)}


def _manifest(posterior: "Posterior") -> dict[str, Any]:
    return {
        "schema": _SCHEMA,
        "versions": _versions(),
        "method": {
            "name": type(posterior.method).__name__,
            "settings": _settings(posterior.method),
        },
        "names": list(posterior.data.names),
        "columns": posterior.data.columns,
        "rows": posterior.data.rows,
        "count": list(posterior.shape),
        "repeated": posterior.shape[1] if any(map(is_repeated, posterior.draws.values())) else 1,
        "elbo": _plain(posterior.elbo),
        "log_evidence": _plain(posterior.log_evidence),
        "seed": _plain(posterior.seed),
        "seconds": _plain(posterior.seconds),
        "complete": posterior.complete,
    }


def is_repeated(draws: Tensor) -> bool:
    """True if one draw stands for all of a chain without taking memory: a mode, repeated."""
    return draws.shape[1] > 1 and draws.stride(1) == 0


def _repeat(draws: Tensor, count: int) -> Tensor:
    return draws.expand(-1, count, *draws.shape[2:]) if count > 1 and draws.ndim > 1 else draws


def _check_fields(manifest: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Raises ValueError for a field that is not of the kind that `_manifest` writes."""
    texts = lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v)
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**64
    kinds = {
        "names": texts,
        "columns": lambda v: isinstance(v, dict) and all(texts(c) for c in v.values()),
        "rows": whole,
        "count": lambda v: (
            isinstance(v, list) and len(v) == 2 and all(whole(n) and 1 <= n < 2**31 for n in v)
        ),
        "repeated": lambda v: whole(v) and 1 <= v < 2**31,
        "elbo": lambda v: v is None or number(v),
        "log_evidence": lambda v: v is None or number(v),
        "seed": whole,
        "seconds": number,
        "complete": lambda v: isinstance(v, bool),
        "method": lambda v: (
            isinstance(v, dict)
            and isinstance(v.get("name"), str)
            and isinstance(v.get("settings"), dict)
        ),
    }
    for name in kinds if names is None else names:
        if name not in manifest:
            raise ValueError(f'it has no "{name}"')
        if not kinds[name](manifest[name]):
            raise ValueError(f'its "{name}" is {str(manifest[name])[:60]}')


def _plain(value: Any) -> Any:
    """A value as JSON; code, which is never stored, by its name."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {"named": {str(k): _plain(v) for k, v in value.items()}}
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", None)
    return {"code": f"{module}.{name}" if name else repr(value)}


def _method(stored: dict[str, Any], code: dict[str, Any], path: Path) -> Method:
    kind = METHODS.get(stored["name"])
    if kind is None:
        raise CheckpointError(
            f"{path} was written by the method {stored['name']!r}, unknown here. "
            f"Known are {', '.join(sorted(METHODS))}; import the module that defines it."
        )
    settings, lost, given = {}, {}, dict(code)
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in stored["settings"].items():
        if name not in known:
            raise CheckpointError(f"{path} has a setting {name!r}, which {kind.__name__} has not.")
        if isinstance(value, dict) and isinstance(value.get("named"), dict):
            value = value["named"]
        elif isinstance(value, dict):
            guide = given.pop(name, None) or _autoguide(value.get("code"))
            if guide is None:
                lost[name] = value.get("code")
                continue
            value = guide
        settings[name] = tuple(value) if isinstance(value, list) else value
    if given:
        raise TypeError(
            f"load got {', '.join(given)}, and the settings of {kind.__name__} that are code in "
            f"{path} are {', '.join(lost) or 'none'} besides those passed."
        )
    if needed := [name for name in lost if known[name].metadata.get("predicts")]:
        raise CheckpointError(
            f"{path} predicts with {needed[0]} ({lost[needed[0]]}), which is code and not stored. "
            f"Pass it again: bnn.load(path, model, {needed[0]}=...)."
        )
    try:
        method = kind(**settings)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} has settings that are none: {error}") from error
    if lost:
        warnings.warn(
            f"Settings that are code are not stored, and have their defaults here: "
            f"{', '.join(f'{name} ({value})' for name, value in lost.items())}. The draws do not "
            "depend on it.",
            UserWarning,
            stacklevel=3,
        )
    return method


def _autoguide(name: Any) -> Any:
    """One of Pyro's own autoguides by name; no other name is looked up."""
    from pyro.infer import autoguide

    if not isinstance(name, str) or not name.startswith(_AUTOGUIDE):
        return None
    found = vars(autoguide).get(name.rsplit(".", 1)[-1])
    return found if isinstance(found, type) and issubclass(found, autoguide.AutoGuide) else None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    manifest, tensors = files.read(path)
    try:
        if not isinstance(manifest.get("schema"), int):
            raise ValueError("it has no schema")
        if manifest["schema"] != _SCHEMA:
            raise CheckpointError(
                f"{path} has schema {manifest['schema']} and this version reads {_SCHEMA}. "
                "Install the bnn that wrote it, or a newer one."
            )
        _check_fields(manifest)
    except ValueError as error:
        raise CheckpointError(f"{path} has no manifest that can be read: {error}.") from error
    return manifest, tensors
