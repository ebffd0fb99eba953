"""Devices: where the tensors of a fit lie, and with them all that its model makes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bnn.errors import DataError


def checked(device: Any) -> torch.device | None:
    """A device that can be computed on; None where none is named.

    Raises:
        DataError: it is unknown or not there, or cannot hold the default dtype.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"device is {device!r}, which torch does not know. Try 'cuda:0'."
        ) from error
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found.type == "meta":
        raise DataError("The device 'meta' holds shapes and no numbers. Fit on 'cpu'.")
    if found.type != "cpu" and (there is None or there.type != found.type):
        known = "cpu" if there is None else f"cpu, {there.type}"
        raise DataError(f"There is no device {str(found)!r} here (there is {known}). Leave it out.")
    if found.type != "cpu" and (found.index or 0) >= torch.accelerator.device_count():
        raise DataError(
            f"There is no device {str(found)!r}: there are {torch.accelerator.device_count()} of "
            "its kind, counted from 0."
        )
    if found.type == "mps" and torch.get_default_dtype() == torch.float64:
        raise DataError(
            "The device 'mps' has no float64, the default dtype here. Call "
            "torch.set_default_dtype(torch.float32), or fit on 'cpu'."
        )
    return found


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """What is made within lies on a device, unless it says where."""
    if device.type == "cpu":  # the mode would cost each operation something
        yield
        return
    with torch.device(device):
        yield
