"""Standardize: a model written for unit scales, for data in the user's units."""

import inspect
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent

from bnn.models._units import Units

_LOCATED = dist.Normal | dist.StudentT | dist.Laplace | dist.Cauchy | dist.Gumbel


class Rescaled(TorchDistribution):
    """Law of y = mean + sd * z, where z has a law of its own; log densities are of y.

    Args:
        base: of z.
        mean: of y where z = 0, of the shape of z.
        sd: unit of y, of the same shape.
    """

    def __init__(self, base: Any, mean: Tensor, sd: Tensor):
        self.base, self.centre, self.unit = base, mean, sd
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """Real numbers, where z takes all of them."""
        return self.base.support

    @property
    def has_rsample(self) -> bool:
        """That of z."""
        return self.base.has_rsample

    @property
    def mean(self) -> Tensor:
        """Of y."""
        return self.centre + self.unit * self.base.mean

    @property
    def variance(self) -> Tensor:
        """Of y."""
        return self.unit.square() * self.base.variance

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.centre + self.unit * self.base.sample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.centre + self.unit * self.base.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        jacobian = self.unit.log()
        events = tuple(range(-len(self.event_shape), 0))
        jacobian = jacobian.sum(events) if events else jacobian
        return self.base.log_prob((value - self.centre) / self.unit) - jacobian

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Rescaled":
        shape = torch.Size(batch_shape) + self.event_shape
        expanded = self.base.expand(batch_shape)
        return Rescaled(expanded, self.centre.expand(shape), self.unit.expand(shape))


def rescaled(fn: Any, mean: Tensor, sd: Tensor) -> Any:
    """The law of mean + sd * z; of the same family where that has a location and a scale."""
    if isinstance(fn, Independent):
        inner = rescaled(fn.base_dist, mean, sd)
        return inner.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return rescaled(fn.base_dist, mean, sd).mask(fn._mask)
    if isinstance(fn, _LOCATED):
        loc, scale = mean + sd * fn.loc, sd * fn.scale
        return (
            type(fn)(fn.df, loc, scale) if isinstance(fn, dist.StudentT) else type(fn)(loc, scale)
        )
    shape = fn.batch_shape + fn.event_shape
    return Rescaled(fn, mean.expand(shape), sd.expand(shape))


def _parameter(fn: Any) -> Tensor:
    """A tensor of a distribution, for its dtype and device."""
    for value in vars(fn).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if isinstance(value, torch.distributions.Distribution):
            return _parameter(value)
    return torch.zeros(())


class _Inside(Messenger):
    """Shows the outside y and f in the user's units, and the model within standardised ones."""

    def __init__(self, units: Units, observed: str, given: Tensor | None, y: Tensor | None):
        super().__init__()
        self.units, self.observed, self.given, self.y = units, observed, given, y
        self.apart = False

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, sd = self.units.mean.to(like), self.units.sd.to(like)
        return (mean, sd) if len(mean) > 1 else (mean[0], sd[0])

    def _pyro_sample(self, message: Any) -> None:
        if self.apart:  # the seam in the user's units, on its way out
            return
        if message["name"] == "f" and message["infer"].get("_deterministic"):
            mean, sd = self._constants(message["value"])
            self.apart = True
            try:
                f = pyro.deterministic(
                    "f", mean + sd * message["value"], event_dim=message["fn"].event_dim
                )
            finally:
                self.apart = False
            message["value"], message["stop"] = (f - mean) / sd, True
        elif message["name"] == self.observed:
            self._observe(message)

    def _observe(self, message: Any) -> None:
        fn, value = message["fn"], message["value"]
        mean, sd = self._constants(_parameter(fn) if value is None else value)
        message["fn"] = rescaled(fn, mean, sd)
        if value is not None:
            message["value"] = self.y if value is self.given else mean + sd * value

    def _pyro_post_sample(self, message: Any) -> None:
        if message["name"] == self.observed and not self.apart:
            mean, sd = self._constants(message["value"])
            message["value"] = (message["value"] - mean) / sd  # what the model goes on with


@dataclass(frozen=True, eq=False)
class Standardized:
    """A Pyro model of data in the user's units; built by `standardize`.

    Attributes:
        model: the model of standardised data.
        units: of each argument; None where it stays as it is.
        observed: name of the site that receives the observations.
    """

    model: Any
    units: tuple[Units | None, ...]
    observed: str

    @property
    def __signature__(self) -> inspect.Signature:
        call = self.model.forward if isinstance(self.model, torch.nn.Module) else self.model
        return inspect.signature(call)

    @property
    def __name__(self) -> str:
        return getattr(self.model, "__name__", type(self.model).__name__)

    def __call__(self, *args: Any) -> Any:
        """Runs the model on standardised arguments; y and f are told in the user's units."""
        args = (*args, *[None] * (len(self.units) - len(args)))
        made = tuple(
            arg if units is None or arg is None else units.standardized(arg)
            for units, arg in zip(self.units, args, strict=True)
        )
        units = self.units[-1]
        if units is None:
            return self.model(*made)
        with _Inside(units, self.observed, made[-1], args[-1]):
            return self.model(*made)


def standardize(model: Any, *data: Any) -> Standardized:
    """A model of standardised data becomes one of the same data in the user's units.

    Each column of each argument becomes (column - mean) / sd before the model sees it. What comes
    out keeps the user's units: draws, mean and intervals of f and of y, and log densities, log
    evidence and ELBO, by the Jacobian 1 / sd of each observation. Latent sites are as the model
    states them: slopes and noise scales in units of sd.

    Args:
        model: a Pyro callable `model(*inputs, y=None)` whose priors are made for unit scales. "f",
            where it announces one, has the unit of y.
        *data: its arguments, by whose columns the units are told; an argument of more than two
            axes has one unit. Whole numbers (labels, counts, tokens) stay as they are, and so does
            y where it is None.

    Returns:
        A Pyro model, for `fit(model, *data)` with the same arguments.

    Raises:
        TypeError, ValueError: an argument is not an array of finite numbers; the observations
            cannot be of another unit; or no site receives them as they are.

    Warns:
        UserWarning: a constant column.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(w * x, 0.5), obs=y)
        >>> years, metres = torch.arange(2000.0, 2020.0), torch.linspace(3e8, 4e8, 20)
        >>> standardize(model, years, metres).observed
        'y'
    """
    if not data:
        raise ValueError("standardize got no data. Pass the arguments of the model.")
    call = model.forward if isinstance(model, torch.nn.Module) else model
    names = list(inspect.signature(call).parameters)[: len(data)]
    names += [f"argument {i}" for i in range(len(names), len(data))]
    units = tuple(_units(arg, name) for arg, name in zip(data, names, strict=True))
    observed = "" if units[-1] is None else _observed(model, data, units)
    return Standardized(model, units, observed)


def _units(arg: Any, name: str) -> Units | None:
    if arg is None:
        return None
    table: Any = arg if hasattr(arg, "shape") else torch.as_tensor(arg)
    kinds = list(table.dtypes) if hasattr(table, "columns") else [table.dtype]
    names = [str(kind).rpartition(".")[2].lower() for kind in kinds]
    if all(each.startswith(("int", "uint", "bool")) for each in names):
        return None
    if len(table.shape) > 2:
        table = table.reshape(-1)
    return Units.of(table, name, table.shape[1] if len(table.shape) == 2 else 1)


def _plain(arg: Any) -> Any:
    return arg.to_numpy().copy() if hasattr(arg, "to_numpy") else arg


class _Seen(Messenger):
    """Laws of the sites that observe something, by name, and who observes `given` itself."""

    def __init__(self, given: Tensor):
        super().__init__()
        self.given = given
        self.all: dict[str, Any] = {}
        self.same: list[str] = []

    def _pyro_sample(self, message: Any) -> None:
        if message["is_observed"] and not message["infer"].get("_deterministic"):
            self.all[message["name"]] = message["fn"]
            self.same += [message["name"]] if message["value"] is self.given else []


def _observed(model: Any, data: tuple[Any, ...], units: tuple[Units | None, ...]) -> str:
    """The site that receives the observations, by a run on standardised data."""
    if any(arg is None for arg in data):
        raise ValueError("standardize takes None in place of the observations only. Pass the data.")
    made = []
    for arg, unit in zip(data, units, strict=True):
        table = arg.detach() if isinstance(arg, Tensor) else torch.tensor(_plain(arg))
        table = table.to(torch.get_default_dtype()) if table.is_floating_point() else table
        made.append(table if unit is None else unit.standardized(table))
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]), torch.no_grad():
        with _Seen(made[-1]) as seen:
            model(*made)
    found = seen.same if len(seen.all) != 1 else list(seen.all)
    if len(found) != 1:
        raise ValueError(
            f"The model observes {', '.join(seen.all) or 'nothing'}; one site must receive the "
            'last argument as it is: pyro.sample("y", ..., obs=y).'
        )
    law = seen.all[found[0]]
    if law.support.is_discrete or not law.support.check(made[-1]).all():
        raise ValueError(
            f'The observed site "{found[0]}" ({type(law).__name__}) takes whole or positive '
            "numbers only, and standardised ones are neither. Pass None in place of the "
            "observations: standardize(model, x, None)."
        )
    return found[0]
