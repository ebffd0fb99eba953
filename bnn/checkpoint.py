"""Files: a posterior as one safetensors file of tensors and JSON. Reading executes nothing.

Layout: tensors `draws/<site>`, `params/<name>`, `stats/<name>`, `history`, `data/<i>`; the header's
metadata holds the manifest (settings, shapes of the fit, versions) and a SHA-256 over manifest and
tensors, so that a damaged file is an error and not another posterior.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bnn import contract
from bnn.data import Data
from bnn.errors import CheckpointError
from bnn.method import METHODS, Method, Model

if TYPE_CHECKING:
    from bnn.posterior import Posterior

_SCHEMA = 1
_AUTOGUIDE = "pyro.infer.autoguide."


def write(posterior: "Posterior", path: "str | os.PathLike[str]") -> None:
    """Writes a posterior to one file, atomically: a reader sees the old file or the new one.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors = {f"draws/{k}": v for k, v in posterior.draws.items()}
    tensors |= {f"params/{k}": v for k, v in posterior.params.items()}
    tensors |= {f"stats/{k}": v for k, v in posterior.stats.items()}
    if posterior.history is not None:
        tensors["history"] = posterior.history
    if posterior.data.loader is None:
        tensors |= {f"data/{i}": v for i, v in enumerate(posterior.data.tensors)}
    else:  # one batch: enough to find the model's sites again
        tensors |= {f"batch/{i}": v for i, v in enumerate(posterior.data.tensors)}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    manifest = json.dumps(_manifest(posterior), sort_keys=True)
    metadata = {"bnn": manifest, "sha256": _digest(manifest, tensors)}
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        try:
            save_file(tensors, name, metadata)
            with open(name, "rb") as written:
                os.fsync(written.fileno())
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot write {target}: {error}. Is there room, and a folder?"
        ) from error


def load(path: "str | os.PathLike[str]", model: Model) -> "Posterior":
    """Reads a posterior that `Posterior.save` wrote. Nothing in the file is executed.

    Args:
        path: the file.
        model: the model that was fitted; its sites must be those in the file.

    Raises:
        CheckpointError: not such a file, damaged, of a newer schema, or of another model.
        ModelError: the model does not pass the contract check on the stored data.
    """
    from bnn.posterior import Posterior

    manifest, tensors = _read(Path(path))

    def group(name: str) -> dict[str, Tensor]:
        return {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(name + "/")}

    stored = group("data") or group("batch")
    args = tuple(stored[str(i)] for i in range(len(stored)))
    loader = None if group("data") else torch.utils.data.DataLoader([])  # type: ignore[arg-type]
    data = Data(args, tuple(manifest["names"]), manifest["columns"], manifest["rows"], loader)
    data, sites = contract.check(model, data)
    draws = group("draws")
    shapes = {k: tuple(v.shape[2:]) for k, v in draws.items()}
    wanted = {k: v.shape for k, v in sites.latent.items() if k in draws or not v.local}
    if shapes != wanted:
        differ = sorted(k for k in shapes.keys() | wanted.keys() if shapes.get(k) != wanted.get(k))
        told = "; ".join(
            f'"{k}" is {shapes.get(k, "absent")} in the file and {wanted.get(k, "absent")} in the model'
            for k in differ[:5]
        )
        raise CheckpointError(f"{path} holds the posterior of another model: {told}.")
    return Posterior(
        model=model,
        method=_method(manifest["method"]),
        data=data,
        sites=sites,
        draws={name: draws[name] for name in sites.latent if name in draws},
        params=group("params"),
        stats=group("stats"),
        history=tensors.get("history"),
        elbo=manifest["elbo"],
        log_evidence=manifest["log_evidence"],
        seed=manifest["seed"],
        seconds=manifest["seconds"],
    )


def _manifest(posterior: "Posterior") -> dict[str, Any]:
    import bnn

    settings = {
        f.name: _plain(getattr(posterior.method, f.name))
        for f in dataclasses.fields(posterior.method)
    }
    return {
        "schema": _SCHEMA,
        "versions": {"bnn": bnn.__version__, "torch": torch.__version__, "pyro": pyro.__version__},
        "method": {"name": type(posterior.method).__name__, "settings": settings},
        "names": list(posterior.data.names),
        "columns": posterior.data.columns,
        "rows": posterior.data.rows,
        "elbo": posterior.elbo,
        "log_evidence": posterior.log_evidence,
        "seed": posterior.seed,
        "seconds": posterior.seconds,
    }


def _plain(value: Any) -> Any:
    """A setting as JSON; code, which is never stored, by its name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", None)
    return {"code": f"{module}.{name}" if name else repr(value)}


def _method(stored: dict[str, Any]) -> Method:
    kind = METHODS.get(stored["name"])
    if kind is None:
        raise CheckpointError(
            f"The file was written by the method {stored['name']!r}, unknown here. "
            f"Known are {', '.join(sorted(METHODS))}; import the module that defines it."
        )
    settings, lost = {}, []
    known = {f.name for f in dataclasses.fields(kind)}
    for name, value in stored["settings"].items():
        if isinstance(value, dict):
            guide = _autoguide(value.get("code", ""))
            if guide is None:
                lost.append(f"{name} ({value.get('code')})")
                continue
            value = guide
        if name in known:
            settings[name] = tuple(value) if isinstance(value, list) else value
    if lost:
        warnings.warn(
            f"Settings that are code are not stored, and have their defaults here: "
            f"{', '.join(lost)}. The draws do not depend on it.",
            UserWarning,
            stacklevel=3,
        )
    return kind(**settings)


def _autoguide(name: str) -> Any:
    """One of Pyro's own autoguides by name; no other name is looked up."""
    from pyro.infer import autoguide

    last = name.rsplit(".", 1)[-1]
    found = getattr(autoguide, last, None) if name.startswith(_AUTOGUIDE) else None
    return found if isinstance(found, type) and issubclass(found, autoguide.AutoGuide) else None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is damaged: {error}."
        ) from error
    if "bnn" not in metadata or "sha256" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file that Posterior.save did not write.")
    if _digest(metadata["bnn"], tensors) != metadata["sha256"]:
        raise CheckpointError(f"{path} is damaged: its contents do not match their SHA-256.")
    try:
        manifest = json.loads(metadata["bnn"])
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} has no readable manifest: {error}.") from error
    if schema != _SCHEMA:
        raise CheckpointError(f"{path} has schema {schema}; this version reads {_SCHEMA}.")
    return manifest, tensors


def _digest(manifest: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()
