"""Microseconds for one gradient of the log joint, per chain, by the route that computes it."""

from collections.abc import Callable
from itertools import product

import numpy as np

from benchmarks.common import (
    PROBLEMS,
    Problem,
    alternate,
    arguments,
    begin,
    compare,
    count,
    jax_data,
    numpyro_model,
    per_call,
    pyro_model,
    skipped,
    torch_data,
)

ROUTES = ("looped", "vmapped", "traced", "compiled")
LANES = (1, 16)
ANCHORS = ("Pyro, validation on", "NumPyro, 1 chain")
Timed = Callable[[], float]


def pyro_gradient(problem: Problem, seconds: float, *, validate: bool) -> Timed:
    """Pyro's own leapfrog gradient, as its NUTS calls it."""
    import pyro
    from pyro.infer.mcmc.util import initialize_model
    from pyro.ops.integrator import potential_grad

    point, potential, *_ = initialize_model(pyro_model(problem), torch_data(problem), {})

    def timed() -> float:
        with pyro.validation_enabled(validate):
            return per_call(lambda: potential_grad(potential, point), seconds)

    return timed


def bnn_gradient(problem: Problem, seconds: float, *, lanes: int, route: str) -> Timed | None:
    """A route of bnn; None where it does not take this model on this machine."""
    import torch

    from bnn import arguments, contract
    from bnn.handlers import quiet_pyro
    from bnn.inference._energy import Energy
    from bnn.inference._gradient import Gradient

    model = pyro_model(problem)
    name, seed = f"bnn, {route}, {count(lanes, 'chain')}", np.random.SeedSequence(0)
    with quiet_pyro():
        try:
            read, sites = contract.check(model, arguments.read(model, torch_data(problem)))
            energy = Energy(model, read, sites)
            gradient = Gradient(energy, lanes, seed, route=route)
        except Exception as error:
            return skipped(name, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if gradient.route != route:
        return skipped(name, f'bnn took the route "{gradient.route}"')
    z = energy.starts(lanes, seed)

    def timed() -> float:
        with quiet_pyro(), torch.no_grad():
            return per_call(lambda: gradient(z), seconds) / lanes

    return timed


def numpyro_gradient(problem: Problem, seconds: float, *, chains: int) -> Timed:
    """NumPyro inside a compiled loop, vmapped over chains; each step moves along the gradient."""
    import jax
    from jax.flatten_util import ravel_pytree
    from numpyro.infer.util import initialize_model

    steps = 1_000 if seconds > 0.1 else 10
    info = initialize_model(
        jax.random.PRNGKey(0), numpyro_model(problem), model_args=jax_data(problem)
    )
    point, unravel = ravel_pytree(info.param_info.z)
    gradient = jax.vmap(jax.grad(lambda z: info.potential_fn(unravel(z))))

    @jax.jit
    def loop(z):
        return jax.lax.fori_loop(0, steps, lambda _, z: z - 1e-9 * gradient(z), z)

    z = jax.numpy.tile(point, (chains, 1))
    return lambda: per_call(lambda: loop(z).block_until_ready(), seconds) / (steps * chains)


def main() -> None:
    parser = arguments(__doc__, ("S", "M", "L"))
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.repeats = ["S"], 2
    seconds = 0.01 if args.quick else 1.0
    begin("One gradient", args.cores)
    for size in args.sizes:
        problem = PROBLEMS[size]
        contenders: dict[str, Timed | None] = {
            "Pyro, validation on": pyro_gradient(problem, seconds, validate=True),
            "Pyro, validation off": pyro_gradient(problem, seconds, validate=False),
        }
        for lanes, route in product(LANES, ROUTES):
            name = f"bnn, {route}, {count(lanes, 'chain')}"
            contenders[name] = bnn_gradient(problem, seconds, lanes=lanes, route=route)
        for lanes in LANES:
            name = f"NumPyro, {count(lanes, 'chain')}"
            contenders[name] = numpyro_gradient(problem, seconds, chains=lanes)
        times = alternate({k: v for k, v in contenders.items() if v}, args.repeats)
        compare(
            f"{size}: {problem}", "us / gradient / chain", times, ANCHORS, value=lambda s: 1e6 * s
        )


if __name__ == "__main__":
    main()
