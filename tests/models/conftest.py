"""What the tests of models share: a seed, and the check of a log joint under vmap."""

import pyro
import pytest
import torch

from bnn import arguments, contract
from bnn.inference._energy import Energy


@pytest.fixture(autouse=True)
def _fixed_seed():
    pyro.set_rng_seed(0)
    with pyro.get_param_store().scope():
        yield


@pytest.fixture
def vmapped_gradient():
    def check(model, *data, lanes=3):
        """vmap(grad(log joint)) is finite and equals a loop over the lanes."""
        read, found = contract.check(model, arguments.read(model, data))
        with pyro.validation_enabled(False):
            energy = Energy(model, read, found)

            def log_joint(z):
                return energy.log_joint(z, read.tensors)

            z = 0.5 * torch.randn(lanes, energy.size)
            with pyro.get_param_store().scope():
                model(*read.tensors)
                together = torch.func.vmap(torch.func.grad(log_joint))(z)
                looped = torch.stack([torch.func.grad(log_joint)(one) for one in z])
        assert torch.isfinite(together).all()
        torch.testing.assert_close(together, looped, rtol=1e-4, atol=1e-4)
        return found

    return check
