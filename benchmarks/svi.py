"""Steps of variational inference per second: bnn against Pyro and NumPyro, mean-field Normal."""

from collections.abc import Callable

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
    per_step,
    pyro_model,
    torch_data,
)

RATE = 1e-3
ELBOS = ("Trace_ELBO", "TraceMeanField_ELBO")
ANCHORS = ("Pyro Trace_ELBO", "NumPyro Trace_ELBO")
Timed = Callable[[], float]


def bnn_svi(problem: Problem, particles: int, seconds: float) -> Timed:
    """`bnn.fit` at a constant learning rate, so that no step is spared."""
    from torch.utils.data import DataLoader, TensorDataset

    import bnn

    model, data = pyro_model(problem), torch_data(problem)
    if problem.labels:  # large: from a loader a fit does not evaluate the final ELBO for a minute
        data = (DataLoader(TensorDataset(*data), batch_size=None, sampler=[slice(None)]),)

    def fit(steps: int) -> None:
        method = bnn.SVI(
            steps=steps, particles=particles, learning_rate=RATE, schedule="constant", draws=1
        )
        bnn.fit(model, *data, method=method, progress=False)

    few = 20 if seconds < 1 else 1_000 if problem.labels else 20_000
    return per_step(fit, seconds, few)


def pyro_svi(
    problem: Problem,
    particles: int,
    seconds: float,
    elbo: str,
    *,
    together: bool = False,
    validate: bool = False,
) -> Timed:
    """`SVI.step` with AutoNormal and Pyro's Adam; `together` vectorises the particles."""
    import pyro
    from pyro.infer import SVI
    from pyro.infer.autoguide import AutoNormal

    model, data = pyro_model(problem), torch_data(problem)
    loss = getattr(pyro.infer, elbo)(
        num_particles=particles, vectorize_particles=together, max_plate_nesting=1
    )

    def timed() -> float:
        with pyro.get_param_store().scope(), pyro.validation_enabled(validate):
            svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": RATE}), loss)
            return per_call(lambda: svi.step(*data), seconds)

    return timed


def numpyro_svi(problem: Problem, particles: int, seconds: float, elbo: str) -> Timed:
    """Updates with AutoNormal inside one compiled loop."""
    import jax
    import numpyro
    from numpyro.infer import SVI
    from numpyro.infer.autoguide import AutoNormal

    model, data = numpyro_model(problem), jax_data(problem)
    loss = getattr(numpyro.infer, elbo)(num_particles=particles)
    svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(RATE), loss)
    state = svi.init(jax.random.PRNGKey(0), *data)
    steps = 50 if seconds > 1 else 2

    @jax.jit
    def loop(state):
        return jax.lax.fori_loop(0, steps, lambda _, s: svi.update(s, *data)[0], state)

    return lambda: per_call(lambda: jax.block_until_ready(loop(state)), seconds) / steps


def contenders(problem: Problem, particles: int, seconds: float) -> dict[str, Timed]:
    """Everyone who can do this problem with so many particles."""
    given = (problem, particles, seconds)
    timed = {
        "bnn": bnn_svi(*given),
        "Pyro Trace_ELBO, validation on": pyro_svi(*given, "Trace_ELBO", validate=True),
    }
    for elbo in ELBOS:
        timed[f"Pyro {elbo}"] = pyro_svi(*given, elbo)
        if particles > 1:
            timed[f"Pyro {elbo}, vectorized"] = pyro_svi(*given, elbo, together=True)
    return timed | {f"NumPyro {elbo}": numpyro_svi(*given, elbo) for elbo in ELBOS}


def main() -> None:
    parser = arguments(__doc__, ("M", "XL"))
    parser.add_argument("--particles", nargs="+", type=int, default=[1, 8])
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.particles, args.repeats = ["M"], [8], 2
    begin("Steps of SVI", args.cores)
    for size in args.sizes:
        for particles in args.particles:
            timed = contenders(PROBLEMS[size], particles, 0.1 if args.quick else 3.0)
            title = f"{size}: {PROBLEMS[size]}; {count(particles, 'particle')}"
            times = alternate(timed, args.repeats)
            compare(title, "steps / s", times, ANCHORS, value=lambda s: 1 / max(s, 1e-9))


if __name__ == "__main__":
    main()
