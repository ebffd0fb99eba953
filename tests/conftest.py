import pytest
import torch

from tests.exact import Regression

collect_ignore = ["bnn/over_mpi.py"]  # a program that a test starts under MPI

torch.set_num_threads(1)  # small problems, and several test processes on few cores


@pytest.fixture
def regression() -> Regression:
    return Regression.make()


@pytest.fixture(autouse=True)
def _left_as_found():
    """No test may leave the default dtype or Pyro's store changed for the next."""
    import pyro

    yield
    assert torch.get_default_dtype() == torch.float32
    assert not list(pyro.get_param_store().keys())
