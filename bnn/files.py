"""Files of tensors and JSON: whole or not at all, and reading one executes nothing.

A file is safetensors; its header's metadata holds a manifest (JSON) and a SHA-256 over manifest and
tensors, so that a damaged file is an error and not another answer. The SHA-256 tells damage, not
forgery: sizes are looked at before anything is allocated, and whoever reads a manifest checks every
field before it is used.
"""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bnn.errors import CheckpointError

_HEADER, _MANIFEST = 2**23, 2**21  # bytes: names and settings are short, and JSON unfolds
_ATTEMPTS = 100  # to read a file that others replace
_DEPTH = 40  # of nested lists and dictionaries in a tree

Tree = Any
"""Numbers, texts, None, tensors and NumPy arrays, in lists and dictionaries of text keys."""


def write(path: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> str:
    """Writes one file: a reader, at any time and after any crash, finds the old one or the new.

    The bytes are on the disk before the name is, and the name before this returns.

    Returns:
        The SHA-256.

    Raises:
        CheckpointError: the file cannot be written; an old one is as it was.
    """
    stored = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    text = json.dumps(manifest)
    digested = digest(text, stored)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        if len(text) > _MANIFEST:
            raise OSError(f"its manifest has {len(text)} bytes, more than {_MANIFEST}")
        try:
            partial.touch()
            mode = partial.stat().st_mode  # save_file's own is readable by its owner alone
            save_file(stored, partial, {"bnn": text, "sha256": digested})
            partial.chmod(mode)
            with open(partial, "r+b") as written:
                os.fsync(written.fileno())
            os.replace(partial, path)
            _settle(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot write {path}: {error}. Is there room, and a folder?"
        ) from error
    return digested


def _settle(folder: Path) -> None:
    """Puts the names in a folder on the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows has no handles of folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of a file that `write` wrote.

    Raises:
        CheckpointError: there is none, it is damaged, or another program's.
    """
    text, digested, tensors = _opened(path, whole=True)
    if digest(text, tensors) != digested:
        raise CheckpointError(f"{path} is damaged: its contents do not match their SHA-256.")
    return _parsed(path, text), tensors


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest alone, whatever the size of the tensors; its SHA-256 is not checked.

    Raises:
        CheckpointError: see `read`.
    """
    return _parsed(path, _opened(path, whole=False)[0])


def _opened(path: Path, *, whole: bool) -> tuple[str, str, dict[str, Tensor]]:
    """Manifest and SHA-256, as texts, and the tensors: of one file, whoever replaces it meanwhile.

    The header's length is looked at before it is read, and with it the tensors' sizes before they
    are.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    try:
        for _ in range(_ATTEMPTS):
            with open(path, "rb") as start:
                here, header = os.fstat(start.fileno()), int.from_bytes(start.read(8), "little")
                if not 2 <= header <= min(_HEADER, here.st_size - 8):
                    raise ValueError(
                        f"its header would have {header} bytes of the file's {here.st_size}"
                    )
                with safe_open(path, framework="pt") as file:  # opens it twice, by its name
                    metadata = file.metadata() or {}
                    # copies: a view of the file would change, or crash, with the file
                    names = file.keys() if whole else ()
                    tensors = {name: file.get_tensor(name).clone() for name in names}
                if os.path.samestat(here, os.stat(path)):  # held open, it is no other file's yet
                    break
        else:
            raise OSError(f"it was replaced {_ATTEMPTS} times while it was read")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is damaged: {error}."
        ) from error
    if "bnn" not in metadata or "sha256" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file that bnn did not write.")
    return metadata["bnn"], metadata["sha256"], tensors


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        if len(text) > _MANIFEST:
            raise ValueError(f"it has {len(text)} bytes, more than {_MANIFEST}")
        manifest = json.loads(text)
        if not isinstance(manifest, dict):
            raise ValueError("it is no dictionary")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has no manifest that can be read: {error}.") from error
    return manifest


def digest(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of tensors: names, types, shapes and bytes."""
    total = hashlib.sha256(manifest.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        total.update(flat.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return total.hexdigest()


def packed(tree: Tree, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A tree as JSON; its tensors and arrays go into `tensors`, under the path that leads there."""
    if isinstance(tree, np.ndarray):
        tree = torch.from_numpy(np.ascontiguousarray(tree))
    if isinstance(tree, Tensor):
        tensors[name or "/"] = tree
        return {"tensor": name or "/"}
    if isinstance(tree, Mapping):
        return {"tree": {k: packed(v, tensors, f"{name}/{k}") for k, v in tree.items()}}
    if isinstance(tree, list | tuple):
        return [packed(each, tensors, f"{name}/{i}") for i, each in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{name or 'the state'} is a {type(tree).__name__}, which no file holds.")


def unpacked(stored: Any, tensors: Mapping[str, Tensor], depth: int = 0) -> Tree:
    """The tree that `packed` made.

    Raises:
        CheckpointError: no such tree.
    """
    if depth > _DEPTH:
        raise CheckpointError(f"A state is nested more than {_DEPTH} deep.")
    if isinstance(stored, list):
        return [unpacked(each, tensors, depth + 1) for each in stored]
    if isinstance(stored, dict):
        if isinstance(stored.get("tree"), dict):
            return {k: unpacked(v, tensors, depth + 1) for k, v in stored["tree"].items()}
        name = stored.get("tensor")
        if not isinstance(name, str) or name not in tensors:
            raise CheckpointError(f"A state refers to a tensor {str(name)[:60]!r} that is absent.")
        return tensors[name]
    return stored


def conformed(found: Tree, like: Tree, name: str = "state") -> Tree:
    """A tree, refused where it is not of the form of another.

    Keys, lengths, types, shapes and dtypes are those of `like`; what is empty on its first axis
    there may have any length, and a number that is finite there is finite. Keys come back in the
    order of `like`.

    Raises:
        CheckpointError: it differs, and where.
    """
    if isinstance(like, np.ndarray):
        like = torch.from_numpy(like)
    if isinstance(like, Tensor):
        grows = int(like.ndim > 0 and len(like) == 0)
        right = (
            isinstance(found, Tensor)
            and found.dtype == like.dtype
            and found.ndim == like.ndim
            and found.shape[grows:] == like.shape[grows:]
        )
        _require(right, name, found, like)
        return found
    if isinstance(like, Mapping):
        _require(isinstance(found, dict) and found.keys() == like.keys(), name, found, like)
        return {key: conformed(found[key], each, f"{name}.{key}") for key, each in like.items()}
    if isinstance(like, list | tuple):
        _require(isinstance(found, list) and len(found) == len(like), name, found, like)
        pairs = enumerate(zip(found, like, strict=True))
        return [conformed(*pair, f"{name}.{i}") for i, pair in pairs]
    finite = not isinstance(like, float) or not math.isfinite(like)
    _require(type(found) is type(like) and (finite or math.isfinite(found)), name, found, like)
    return found


def _require(right: bool, name: str, found: Tree, like: Tree) -> None:
    if not right:
        raise CheckpointError(f"{name} is {_told(found)} and should be {_told(like)}.")


def _told(tree: Tree) -> str:
    if isinstance(tree, Tensor):
        return f"{tree.dtype} {tuple(tree.shape)}"
    if isinstance(tree, Mapping):
        return f"a dictionary of {', '.join(sorted(map(str, tree)))[:80]}"
    if isinstance(tree, list | tuple):
        return f"a list of {len(tree)}"
    return str(tree)[:60]
