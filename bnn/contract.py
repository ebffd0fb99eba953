"""What a model must look like: its sites are found, its shapes and supports checked, its data too.

Every method relies on this check, because what it refuses would otherwise run: an output (N, 1)
against observations (N,) broadcasts to N*N terms, and the answer looks like an answer.
"""

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.utils.data import DataLoader

from bnn.data import Data, column_names, like, shape_of, tensors
from bnn.errors import DataError, DataWarning, ModelError
from bnn.handlers import At, Capture, Score, is_statement, quiet_pyro, seeded, unvalidated
from bnn.method import Model

_FAR = 1e4  # observations this many times beyond what the prior can produce: a unit was forgotten


@dataclass(frozen=True)
class Site:
    """A latent sample statement: its shape, the support of its distribution, where it stands."""

    shape: tuple[int, ...]
    support: Any
    local: bool

    @property
    def discrete(self) -> bool:
        """True where the site takes isolated values."""
        return bool(self.support.is_discrete)


@dataclass(frozen=True)
class Sites:
    """What the contract check found in a model.

    Attributes:
        latent: latent sites by name, in the model's order.
        observed: name of the site that receives the observations.
        plate: name of the data plate, or None where the model states none.
        row_axis: axis of the observed site's log density, counted from the left, that is the row;
            None where the rows are not independent statements.
        rows: number of rows.
        subsampled: True if the model's own plate draws a minibatch.
        params: names of trainable tensors without a prior.
        seams: deterministic sites by name.
        predicts: True if the model runs with its observations set to None.
    """

    latent: dict[str, Site]
    observed: str
    plate: str | None
    row_axis: int | None
    rows: int
    subsampled: bool
    params: tuple[str, ...]
    seams: dict[str, Site]
    predicts: bool
    names: tuple[str, ...] = field(default=())

    @property
    def globals(self) -> tuple[str, ...]:
        """Latent sites outside the data plate: the ones whose draws carry over to new rows."""
        return tuple(name for name, site in self.latent.items() if not site.local)

    @property
    def locals(self) -> tuple[str, ...]:
        """Latent sites inside the data plate: they belong to a row."""
        return tuple(name for name, site in self.latent.items() if site.local)


def argument_names(model: Model, count: int) -> tuple[str, ...]:
    """The model's positional argument names, as far as it tells them."""
    names = _signature(model)[:count]
    return tuple(names + [f"argument {i}" for i in range(len(names), count)])


def _signature(model: Model) -> list[str]:
    try:
        call: Any = model.forward if isinstance(model, torch.nn.Module) else model
        kinds = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _call(model: Model, data: Data) -> str:
    """What to say where the model has another number of arguments than were given."""
    names = _signature(model)
    if not names or len(names) == len(data.names):
        return ""
    return (
        f"The model takes {', '.join(names)}, and {len(data.names)} were given: call "
        f"fit(model, {', '.join(names)})."
    )


def read(model: Model, args: tuple[Any, ...]) -> Data:
    """The user's arrays as `Data`: numeric, finite, and one length.

    Raises:
        ModelError: the model is not a callable that takes this many arguments.
        DataError: see `bnn.data.tensors`; or no rows, or lengths that differ.
    """
    if not callable(model):
        raise ModelError(
            f"The model is a {type(model).__name__}, not a callable. "
            "Pass a Pyro model function model(*inputs, y=None)."
        )
    if not args:
        raise DataError("fit got no data. Call fit(model, *inputs, y).")
    loader = args[0] if len(args) == 1 and isinstance(args[0], DataLoader) else None
    if loader is not None:
        args = _first_batch(loader)
    names = argument_names(model, len(args))
    made = tensors(args, names)
    if made[-1].ndim == 0:
        raise DataError(
            f'The observations "{names[-1]}" are a single number. Pass one for each row, (row,).'
        )
    lengths = {name: len(arg) for name, arg in zip(names, made, strict=True) if arg.ndim}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f'"{name}" has {n}' for name, n in lengths.items())
        raise DataError(
            f"The data have different numbers of rows: {found}. Give every argument the same "
            "rows; what does not belong to a row (a matrix, a constant) the model closes over."
        )
    rows = len(made[-1])
    if rows == 0:
        raise DataError(f'"{names[-1]}" has no rows. A fit needs at least one.')
    if loader is not None:
        rows = len(loader.dataset)  # type: ignore[arg-type]
    columns = {n: column_names(a) for n, a in zip(names, args, strict=True) if column_names(a)}
    return Data(made, names, columns, rows, loader)


def _first_batch(loader: DataLoader) -> tuple[Any, ...]:
    if not hasattr(loader.dataset, "__len__"):
        raise DataError(
            f"The DataLoader's {type(loader.dataset).__name__} does not tell its number of rows, "
            "by which a minibatch is scaled. Give the dataset a __len__."
        )
    with seeded(np.random.SeedSequence(0)):  # a shuffling loader draws from the caller's generator
        batch = next(iter(loader), None)
    if not isinstance(batch, (tuple, list)):
        raise DataError(
            f"The DataLoader yields {'nothing' if batch is None else type(batch).__name__}, not "
            "tuples of the model's arguments. Wrap the data: TensorDataset(x, y)."
        )
    return tuple(batch)


def check(model: Model, data: Data) -> tuple[Data, Sites]:
    """Finds the sites of a model and refuses what would run to a wrong answer.

    Args:
        model: the user's model.
        data: its arguments, from `read`.

    Returns:
        The data in the dtypes that the likelihood takes, and the sites.

    Raises:
        ModelError: no or several observed sites, a shape that broadcasts, a moving support, ...
        DataError: the observations lie outside the support of their distribution.
    """
    with quiet_pyro(), seeded(np.random.SeedSequence(0)):
        data, trace = _first_run(model, data)
        observed = _observed_site(trace, data, _call(model, data))
        site = trace.nodes[observed]
        made = _as_support_takes(data, site["fn"])
        if made is not data:
            data, trace = made, _run(model, made, made.tensors)
            site = trace.nodes[observed]
        plate, frame = _data_plate(site, data)
        _check_shape(site, data, frame)
        if data.loader is not None and _same_for_every_row(site["fn"].support):
            admit = partial(check_support, site["fn"], name=data.names[-1], site=observed)
            data = replace(data, admit=admit)
        subsampled = bool(frame and frame.full_size and frame.full_size != frame.size)
        whole = data.observations if subsampled else site["value"]
        check_support(site["fn"], whole, data.names[-1], observed)
        _warn_of_one_class(site["fn"], data)
        latent = {
            name: Site(
                tuple(node["value"].shape),
                node["fn"].support,
                any(f.name == plate for f in node["cond_indep_stack"]),
            )
            for name, node in _latent(trace).items()
        }
        sites = Sites(
            latent=latent,
            observed=observed,
            plate=plate,
            row_axis=_row_axis(site, frame, data),
            rows=data.rows,
            subsampled=subsampled,
            params=tuple(n for n, node in trace.nodes.items() if node["type"] == "param"),
            seams={
                n: _seam(node, plate, data)
                for n, node in trace.nodes.items()
                if node["type"] == "sample" and node["infer"].get("_deterministic")
            },
            predicts=True,
            names=data.names,
        )
        if not latent and not sites.params:
            raise ModelError(
                f"{_name(model)} has nothing to infer: no latent site and no pyro.param. "
                'Give a weight a prior: pyro.sample("w", dist.Normal(0., 1.)).'
            )
        _check_trace(model, data, sites)
        return data, replace(sites, predicts=_check_prediction(model, data, sites))


def check_inputs(inputs: tuple[Any, ...], data: Data) -> tuple[Tensor, ...]:
    """The inputs of a prediction as tensors, with the training data's columns and dtypes.

    Raises:
        DataError: another number of inputs, other columns, other trailing axes, or bad values.
    """
    names, trained = data.names[:-1], data.inputs
    if len(inputs) != len(trained):
        raise DataError(
            f"predict got {len(inputs)} inputs and the model was fitted with {len(trained)} "
            f"({', '.join(names) or 'none'}). Pass the inputs without the observations."
        )
    for arg, name in zip(inputs, names, strict=True):
        known, new = data.columns.get(name, []), column_names(arg)
        if known and new and known != new:
            lost = [c for c in known if c not in new]
            extra = [c for c in new if c not in known]
            what = f"without {lost}, with unknown {extra}" if lost or extra else "in another order"
            raise DataError(
                f'The columns of "{name}" are {new}, {what}; the fit had {known}. '
                f"Pass {name}[{known}]."
            )
    made = tensors(inputs, names)
    for new, old, name in zip(made, trained, names, strict=True):
        if new.ndim != old.ndim or new.shape[1:] != old.shape[1:]:
            raise DataError(
                f'"{name}" has shape {shape_of(new)} and the fit had {shape_of(old)}. '
                "Everything but the number of rows must be the same."
            )
    lengths = {n: len(a) for n, a in zip(names, made, strict=True) if a.ndim}
    if len(set(lengths.values())) > 1:
        raise DataError(f"The inputs have different numbers of rows: {lengths}.")
    return like(made, trained)


def check_rows(
    program: Model, draw: dict[str, Tensor], args: tuple[Tensor, ...], sites: Sites
) -> None:
    """Refuses new rows that the observed site cannot have produced, by one run at one draw.

    Raises:
        DataError: another shape than the site's, or values outside its support.
    """
    data = Data(args, sites.names, rows=len(args[-1]))
    capture = Capture(sites.observed)
    with told(program, data), capture, At(draw):
        program(*args)
    site = {"name": sites.observed, "fn": capture.fn, "value": capture.value}
    _check_shape(site, data, None)
    check_support(capture.fn, capture.value, data.names[-1], sites.observed)


def require_continuous(sites: Sites, method: str) -> None:
    """Refuses discrete latent sites, for the methods that need a gradient in every site.

    Raises:
        ModelError: names the site.
    """
    for name, site in sites.latent.items():
        if site.discrete:
            raise ModelError(
                f'{method} needs continuous latent sites, and "{name}" is discrete '
                f"({site.support}). Sum it out by hand, for example with a mixture distribution."
            )


def require_all_rows(data: Data, sites: Sites, method: str) -> None:
    """Refuses minibatches, for the methods that need the log density of all rows.

    Raises:
        DataError: the data are a loader.
        ModelError: the model's own plate draws a minibatch.
    """
    if data.loader is not None:
        raise DataError(
            f"{method} needs all rows at once. Pass tensors in place of the DataLoader."
        )
    if sites.subsampled:
        raise ModelError(
            f'{method} needs all rows at once, and the plate "{sites.plate}" draws a minibatch. '
            "Remove subsample_size, or use a method that minibatches, such as bnn.SVI()."
        )


def require_no_parameters(sites: Sites, method: str) -> None:
    """Refuses trainable tensors without a prior, for the methods that cannot optimise them.

    Raises:
        ModelError: names them.
    """
    if sites.params:
        raise ModelError(
            f"{method} draws from a posterior, and these have no prior to be drawn from: "
            f"{', '.join(sites.params[:3])}. Give each a prior (bnn.models.sample_weights, "
            "PyroSample), or use a method that optimises them, such as bnn.SVI()."
        )


def _name(model: Model) -> str:
    return f'model "{getattr(model, "__name__", type(model).__name__)}"'


_DTYPES = re.compile(r"dtype|scalar type|same type|not implemented for|floating point", re.I)


def _first_run(model: Model, data: Data) -> tuple[Data, Any]:
    """Runs the model; where integers do not fit its arithmetic, again with floats."""
    try:
        return data, _run(model, data, data.tensors)
    except ModelError as error:
        whole = [t for t in data.tensors if not t.is_floating_point()]
        if not whole or not _DTYPES.search(str(error)):
            raise
        floats = tuple(t.to(torch.get_default_dtype()) for t in data.tensors)
        for cast in (floats, (*floats[:-1], data.observations), (*data.inputs, floats[-1])):
            try:
                changed = replace(data, tensors=cast)
                return changed, _run(model, changed, cast)
            except ModelError:
                continue
        raise


@contextmanager
def told(model: Model, data: Data) -> Iterator[None]:
    """Re-raises what a model raises with its name, its data and a cure where one is known."""
    shapes = ", ".join(
        f"{n} {shape_of(t)} {str(t.dtype).removeprefix('torch.')}"
        for n, t in zip(data.names, data.tensors, strict=True)
    )
    try:
        yield
    except (ModelError, DataError):
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        cure = (
            isinstance(error, TypeError) and "positional argument" in first and _call(model, data)
        )
        cure = cure or "Run it once by hand on the data to see where."
        if "Multiple sample sites named" in first:
            cure = "Give every site a name of its own, and open the data plate once."
        elif "Shape mismatch inside plate" in first:
            cure = (
                f"Give the plate the number of rows, len({data.names[0]}), and the distribution "
                "the batch shape (row,): drop an axis of f with [:, 0]."
            )
        elif _DTYPES.search(first):
            cure = (
                f"Data come in torch's default dtype, {torch.get_default_dtype()}: build the "
                "model's tensors in it too, or call torch.set_default_dtype before building them."
            )
        raise ModelError(
            f"{_name(model)} raised {type(error).__name__}: {first} It was given {shapes}. {cure}"
        ) from error


def _run(model: Model, data: Data, args: tuple[Any, ...]) -> Any:
    with told(model, data):
        return poutine.trace(model).get_trace(*args)


def _latent(trace: Any) -> dict[str, Any]:
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and is_statement(node) and not node["is_observed"]
    }


def _observed_site(trace: Any, data: Data, call: str) -> str:
    found = [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and is_statement(node) and node["is_observed"]
    ]
    if not found:
        latent = _latent(trace)
        cure = (
            call or f'State the likelihood with obs: pyro.sample("y", ..., obs={data.names[-1]}).'
        )
        raise ModelError(
            f"The model has no observed site (latent sites: {', '.join(latent) or 'none'}). {cure}"
        )
    if len(found) == 1:
        return found[0]
    y = data.observations
    same = [n for n in found if trace.nodes[n]["value"] is y]
    if len(same) != 1:
        raise ModelError(
            f"The model observes several sites: {', '.join(found)}. One of them must receive the "
            f'last argument as it is: pyro.sample("y", ..., obs={data.names[-1]}).'
        )
    return same[0]


def _seam(node: Any, plate: str | None, data: Data) -> Site:
    """A deterministic site; local too where it has a row axis (a net run before the plate)."""
    shape = tuple(node["value"].shape)
    inside = any(f.name == plate for f in node["cond_indep_stack"])
    return Site(shape, node["fn"].support, inside or shape[:1] == (len(data.observations),))


def _data_plate(site: Any, data: Data) -> tuple[str | None, Any]:
    """The plate around the observed site that has a row for each datum."""
    rows = {data.rows, len(data.observations)}
    frames = [f for f in site["cond_indep_stack"] if f.size in rows or f.full_size in rows]
    if not frames:
        return None, None
    outermost = min(frames, key=lambda f: f.dim if f.dim is not None else 0)
    return outermost.name, outermost


def _row_axis(site: Any, frame: Any, data: Data) -> int | None:
    """Axis of the observed log density that is the row."""
    batch = len(site["fn"].batch_shape)
    if frame is not None and frame.dim is not None:
        return batch + frame.dim
    if batch and site["fn"].batch_shape[0] == len(data.observations):
        return 0
    return None


def _check_shape(site: Any, data: Data, frame: Any) -> None:
    name, fn, value = site["name"], site["fn"], site["value"]
    stated, found = tuple(fn.shape()), tuple(value.shape)
    if frame is not None and frame.full_size and frame.full_size != frame.size:
        return _check_subsampled(site, data, frame)
    y = f'"{data.names[-1]}"'
    if stated == found and (len(data.observations) == found[0] if found else False):
        return None
    if stated == found:
        raise ModelError(
            f'The observed site "{name}" has shape {_sizes(fn, stated)} and {y} has '
            f"{shape_of(data.observations)}: the row must be "
            f"its first axis. Observe it as it is, obs={data.names[-1]}."
        )
    for other in site.get("cond_indep_stack", ()) if frame is None else ():
        if stated[:1] == (other.size,):
            raise ModelError(
                f'The plate "{other.name}" around "{name}" has size {other.size} and the data '
                f"have {len(data.observations)} rows. Give it their number: "
                f'pyro.plate("{other.name}", len({data.names[0]})).'
            )
    cure = "Make the two shapes equal: broadcasting would count rows many times over."
    if not stated:
        cure = f'Put it in a plate: with pyro.plate("data", len({data.names[0]})).'
    elif len(found) == 2 and found[1] == 1:
        cure = f"Pass {data.names[-1]}[:, 0], or keep the last axis of f and use .to_event(1)."
    elif isinstance(_base(fn), dist.Categorical) and len(found) == len(stated) + 1:
        cure = f"Pass class indices in place of one-hot rows: {data.names[-1]}.argmax(-1)."
    elif len(stated) == 2 and len(found) == 1 and stated[0] == found[0]:
        cure = "Drop the last axis of the network's output: f = net(x)[:, 0] or .squeeze(-1)."
    elif found[:1] == (1,) and stated[:1] != (1,):
        cure = f"Pass one observation for each of the {stated[0]} rows."
    raise DataError(
        f'The observed site "{name}" has shape {_sizes(fn, stated)} and its observations {y} have '
        f"{shape_of(value)}. {cure}"
    )


def _sizes(fn: Any, shape: tuple[int, ...]) -> str:
    batch = len(fn.batch_shape)
    axes = [f"batch={s}" for s in shape[:batch]] + [f"event={s}" for s in shape[batch:]]
    return "(" + ", ".join(axes) + ")"


def _check_subsampled(site: Any, data: Data, frame: Any) -> None:
    stated, found = tuple(site["fn"].shape()), tuple(site["value"].shape)
    if stated != found:
        raise ModelError(
            f'The observed site "{site["name"]}" has shape {_sizes(site["fn"], stated)} in the '
            f'minibatch of {frame.size} that the plate "{frame.name}" draws, and its observations '
            f"have {shape_of(site['value'])}. Index them with the plate: "
            f"obs={data.names[-1]}[index]."
        )
    if frame.full_size != data.rows:
        raise ModelError(
            f'The plate "{frame.name}" has size {frame.full_size} and the data have {data.rows} '
            "rows. Give the plate the number of rows."
        )


def _base(fn: Any) -> Any:
    while isinstance(fn, td.Independent) or hasattr(fn, "base_dist"):
        if isinstance(fn, td.TransformedDistribution):
            return fn
        fn = fn.base_dist
    return fn


def is_categorical(fn: Any) -> bool:
    """True for a distribution over labels 0..K-1, whose expectation is a probability vector."""
    return isinstance(_base(fn), td.Categorical)


def _as_support_takes(data: Data, fn: Any) -> Data:
    """The observations in the dtype that the likelihood's `log_prob` takes."""
    y = data.observations
    dtype = torch.long if is_categorical(fn) else torch.get_default_dtype()
    if y.dtype == dtype or (
        dtype == torch.long and y.is_floating_point() and (y != y.round()).any()
    ):
        return data
    return replace(data, tensors=(*data.inputs, y.to(dtype)))


def check_support(fn: Any, y: Tensor, name: str, site: str) -> None:
    """Refuses observations `y`, an argument's `name`, outside the support of their distribution.

    Raises:
        DataError: names the support, the count and the first offender.
    """
    support = fn.support
    if is_categorical(fn) and y.is_floating_point() and (y != y.round()).any():
        inside = y == y.round()
    else:
        inside = support.check(y)
    if inside.shape != y.shape:
        inside = inside.reshape(inside.shape + (1,) * (y.ndim - inside.ndim)).expand(y.shape)
    if not inside.all():
        where = (~inside).nonzero()[0].tolist()
        raise DataError(
            f'"{name}" has {int((~inside).sum())} values that "{site}" cannot produce, the first '
            f"is {y[tuple(where)].item():g} at row {where[0]}: {_told_support(fn, support)}"
        )


def _same_for_every_row(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return not any(isinstance(v, Tensor) and v.numel() > 1 for v in vars(support).values())


def _warn_of_one_class(fn: Any, data: Data) -> None:
    y = data.observations
    labels = is_categorical(fn) or isinstance(_base(fn), td.Bernoulli)
    if labels and len(y) > 1 and data.loader is None and (y == y.flatten()[0]).all():
        warnings.warn(
            f'"{data.names[-1]}" holds one class only, {y.flatten()[0].item():g}: the fit can '
            "learn nothing about the others.",
            DataWarning,
            stacklevel=4,  # the caller of fit
        )


def _told_support(fn: Any, support: Any) -> str:
    base = _base(fn)
    if isinstance(base, td.Categorical):
        classes = base.logits.shape[-1]
        return f"labels are whole numbers in 0..{classes - 1}. Encode them so."
    if isinstance(base, td.Bernoulli):
        return "a Bernoulli observation is 0 or 1. Encode the labels so."
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, type(constraints.nonnegative_integer)) and support.is_discrete:
        return "a count is a whole number of at least 0. Pass counts, not rates or logs."
    return f"the support of {type(base).__name__} is {support}. Transform them, or change it."


def _check_trace(model: Model, data: Data, sites: Sites) -> None:
    """Scores the model at its prior, with gradients: finds lost parameters and moving supports."""
    with told(model, data), torch.enable_grad():
        with Score() as score:
            again = poutine.trace(model).get_trace(*data.tensors)
    log_joint = torch.as_tensor(score.likelihood + score.prior)
    if hidden := _hidden_parameters(log_joint):
        raise ModelError(
            f"{_name(model)} uses trainable tensors that Pyro cannot see, of shapes "
            f"{', '.join(hidden[:3])}: no prior, no pyro.param. Give them a prior with "
            "bnn.models.sample_weights(net), or freeze them with net.requires_grad_(False)."
        )
    _check_finite_density(log_joint, again, model)
    _check_same_sites(sites, _latent(again))
    _check_same_sites(sites, _at_mirror(model, data, _latent(again)))


def _at_mirror(model: Model, data: Data, drawn: dict[str, Any]) -> dict[str, Any]:
    """The latent sites of a run at -z: a model that branches on the sign of a site shows it."""
    values = {}
    try:
        for name, node in drawn.items():
            if not node["fn"].support.is_discrete:
                to_support = biject_to(node["fn"].support)
                values[name] = to_support(-to_support.inv(node["value"].detach()))
        with At(values):
            return _latent(poutine.trace(model).get_trace(*data.tensors))
    except Exception:  # -z may be further out than any draw, and the model need not bear that
        return drawn


def _check_same_sites(sites: Sites, run: dict[str, Any]) -> None:
    """Refuses sites that another run lacks, adds, or gives another shape or support."""
    for name in sites.latent | run:
        site, node = sites.latent.get(name), run.get(name)
        if not site or not node or tuple(node["value"].shape) != site.shape:
            raise ModelError(
                f'The latent site "{name}" comes and goes, or changes shape, from run to run. '
                "Every run must pass the same sites; mix outcomes with a mixture distribution."
            )
        if not site.discrete and _moves(name, site, node["fn"].support):
            raise ModelError(
                f'The support of "{name}" depends on other sites ({site.support}). '
                "Sample a site of fixed support and transform it: u ~ Uniform(0, 1), u * bound."
            )


def _hidden_parameters(log_joint: Tensor) -> list[str]:
    """Shapes of the leaves that the log joint has a gradient in, save those in Pyro's store."""
    seen = {leaf.data_ptr() for _, leaf in pyro.get_param_store().named_parameters()}
    hidden, ahead, met = [], [log_joint.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in met:
            continue
        met.add(node)
        ahead += [before for before, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf.data_ptr() not in seen:
            hidden.append(str(tuple(leaf.shape)))
    return hidden


def _check_finite_density(log_joint: Tensor, trace: Any, model: Model) -> None:
    if torch.isnan(log_joint):
        trace.compute_log_prob()
        lost = [
            n
            for n, node in trace.nodes.items()
            if node["type"] == "sample" and torch.isnan(node["log_prob_sum"]).any()
        ]
        raise ModelError(
            f"The log density of {_name(model)} is NaN at a draw of its prior (site "
            f"{', '.join(lost)}). Use logits in place of probabilities, keep scales above 0, and "
            "rescale inputs that are very large."
        )


def _moves(name: str, site: Site, after: Any) -> bool:
    """True if the support differs between two runs."""
    before = site.support
    if type(before) is not type(after):
        return True
    try:
        first, second = biject_to(before), biject_to(after)
        point = torch.zeros(tuple(first.inverse_shape(torch.Size(site.shape)))) + 0.3
        return not torch.equal(first(point), second(point))
    except NotImplementedError as error:
        raise ModelError(
            f'There is no map from the real line to the support of "{name}", {before}. '
            "Write the site as a transform of one that has: positive, an interval, a simplex."
        ) from error


def _check_prediction(model: Model, data: Data, sites: Sites) -> bool:
    """Runs the model with its observations set to None, as a prediction does."""
    try:
        with torch.no_grad():
            trace = poutine.trace(model).get_trace(*data.inputs, None)
    except Exception:
        return False  # the fit does not need it; `Posterior.predict` says what is missing
    node: Any = trace.nodes.get(sites.observed)
    if node is not None and node["is_observed"]:
        raise ModelError(
            f'The site "{sites.observed}" is observed even when {data.names[-1]} is None: the '
            f"model does not use its last argument. Write obs={data.names[-1]}."
        )
    if node is None:
        return False
    y, prior = data.observations, node["value"]
    if y.is_floating_point() and not unvalidated(node["fn"]).support.is_discrete:
        far = float(y.abs().max()) / max(float(prior.abs().max()), 1e-30)
        if far > _FAR:
            warnings.warn(
                f'"{data.names[-1]}" reaches {float(y.abs().max()):.3g}, {far:.0e} times what the '
                f'model\'s prior produces at "{sites.observed}". Standardise the data, or widen '
                "the priors: as it is, the fit fights the units.",
                DataWarning,
                stacklevel=4,  # the caller of fit
            )
    return True
