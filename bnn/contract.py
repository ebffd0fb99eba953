"""What a model must look like: its sites are found, its shapes and supports checked, its data too.

Every method relies on this check, because what it refuses would otherwise run: an output (N, 1)
against observations (N,) broadcasts to N*N terms, and the answer looks like an answer.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor

from bnn.arguments import call_of
from bnn.data import Data, shape_of, take, take_filled
from bnn.errors import DataError, DataWarning, ModelError, outside
from bnn.handlers import (
    At,
    Capture,
    Score,
    at_another_draw,
    is_statement,
    quiet_pyro,
    seeded,
    singular,
    unvalidated,
)
from bnn.method import Method, Model, name_of
from bnn.observations import (
    as_support_takes,
    check_shape,
    check_support,
    impossible_parameter,
    innermost,
    same_for_every_row,
    warn_of_one_class,
)
from bnn.sites import Site, Sites, to_support

_OFF = 30  # standard deviations from 0: from there on SVI and MAP ended short of a slope, unseen
_SHOWN, _RUNS = 5, 20  # f at prior draws: sd of its mean over rows, in sds over rows, by such runs
_RARE = 10.0  # nats of the prior: what is rarer by more than that need not be right
_FAR = 1e4  # observations this many times beyond what the prior can produce: a unit was forgotten


def check(model: Model, data: Data, *, adds_sites: bool = False) -> tuple[Data, Sites]:
    """Finds the sites of a model and refuses what would run to a wrong answer.

    Args:
        model: the user's model.
        data: its arguments, from `read`.
        adds_sites: True if the method has something to infer in a model without latent sites.

    Returns:
        The data in the dtypes that the likelihood takes, and the sites.

    Raises:
        ModelError: no or several observed sites, a shape that broadcasts, a moving support, ...
        DataError: the observations lie outside the support of their distribution.
    """
    for attempt in range(_RUNS):
        try:
            return _checked(model, data, adds_sites, np.random.SeedSequence(attempt))
        except ModelError as error:  # at a draw of the prior at which a matrix has no factors
            if not singular(error.__cause__) or attempt == _RUNS - 1:
                raise
    raise AssertionError


def _checked(
    model: Model, data: Data, adds_sites: bool, seed: np.random.SeedSequence
) -> tuple[Data, Sites]:
    with quiet_pyro(), seeded(seed):
        data, trace = _first_run(model, data)
        observed = _observed_site(trace, data, call_of(model, data))
        site = trace.nodes[observed]
        made = as_support_takes(data, site["fn"])
        if made is not data:
            data, trace = made, _run(model, made, made.tensors)
            site = trace.nodes[observed]
        plate, frame = _data_plate(site, data)
        check_shape(site, data, frame)
        if data.loader is not None and same_for_every_row(site["fn"].support):
            admit = partial(check_support, site["fn"], name=data.names[-1], site=observed)
            data = replace(data, admit=admit)
        subsampled = bool(frame and frame.full_size and frame.full_size != frame.size)
        whole = site["value"]
        if subsampled and same_for_every_row(site["fn"].support):
            whole = data.observations
        check_support(site["fn"], whole, data.names[-1], observed)
        warn_of_one_class(site["fn"], data)
        _check_free(trace)
        latent = {name: _site(node, plate) for name, node in _latent(trace).items()}
        sites = Sites(
            latent=latent,
            observed=observed,
            plate=plate,
            row_axis=_row_axis(site, frame, data),
            rows=data.rows,
            subsample_size=frame.size if subsampled else None,
            every_row=not subsampled or _takes_all(model, data.tensors, frame),
            params=tuple(n for n, node in trace.nodes.items() if node["type"] == "param"),
            seams={
                n: _seam(node, plate, data)
                for n, node in trace.nodes.items()
                if node["type"] == "sample" and node["infer"].get("_deterministic")
            },
            predicts=True,
            names=data.names,
        )
        if not latent and not sites.params and not adds_sites:
            raise ModelError(
                f"{_name(model)} has nothing to infer: no latent site and no pyro.param. "
                'Give a weight a prior: pyro.sample("w", dist.Normal(0., 1.)).'
            )
        _check_masks(trace)
        _check_parameters(trace)
        _check_trace(model, data, sites)
        _warn_of_offset(model, data)
        return data, replace(sites, predicts=_check_prediction(model, data, sites))


def check_batch(
    model: Model, data: Data, sites: Sites, method: Method, size: int | None = None
) -> None:
    """Refuses minibatches on which the model cannot be run, or is another model.

    Args:
        model: the user's model.
        data: its arguments.
        sites: what it states.
        method: whose minibatches.
        size: rows in one, where the method has chosen it; None takes its `batch_size`.

    Raises:
        ModelError: names the plate or site, and the rows that it is shown and needs.
    """
    size, whole = size or getattr(method, "batch_size", None), len(data.observations)
    if size is None or size >= whole or data.loader is not None:  # a loader's first was run
        return
    shows = f"{type(method).__name__}(batch_size={size}) shows the model {size} rows at a time, and"
    with quiet_pyro(), seeded(np.random.SeedSequence(0)), torch.no_grad():
        some = take(data.tensors, slice(size))
        try:
            trace: Any = at_another_draw(lambda: poutine.trace(model).get_trace(*some))
            cause = None
        except Exception as error:
            trace, cause = poutine.Trace(), error
    for name, node in _latent(trace).items():
        site = sites.latent.get(name)
        if site and not site.local and tuple(node["value"].shape) != site.shape:
            raise ModelError(
                f'{shows} of these "{name}" has shape {tuple(node["value"].shape)}, of all {whole} '
                f"it has {site.shape}: the model counts something in the rows. Count it in all of "
                "them before the fit; or leave batch_size out."
            )
    frames = [f for node in trace.nodes.values() for f in node.get("cond_indep_stack", ())]
    if not sites.subsampled:
        if cause is None and all(f.name != sites.plate or f.size == size for f in frames):
            return
        plate = "the model" if sites.plate is None else f'its plate "{sites.plate}"'
        raise ModelError(
            f"{shows} {plate} takes all {whole}"
            + (f" ({type(cause).__name__}: {str(cause).partition(chr(10))[0]})" if cause else "")
            + ". Give the plate the rows that it is shown, len(y); or leave batch_size out."
        ) from cause
    if any(f.name == sites.plate and f.full_size == size for f in frames):
        return
    drawn = f"{sites.subsample_size} of {'them' if sites.every_row else f'all {whole}'}"
    cure = "pass a larger one" if sites.every_row else "give the plate the rows it has, len(x)"
    raise ModelError(
        f'{shows} its plate "{sites.plate}" draws {drawn}. Leave subsample_size out, batch_size '
        f"scales by N/B too; or {cure}."
    ) from cause


def check_prior(model: Model, inputs: tuple[Tensor, ...], names: tuple[str, ...]) -> Sites:
    """The sites of a model without observations: the last one stated is what it would observe.

    Raises:
        ModelError: the model raises without observations, or states no site.
    """
    rows = next((len(x) for x in inputs if x.ndim), 0)
    data = Data(inputs, names, rows=rows)
    with quiet_pyro(), seeded(np.random.SeedSequence(0)):
        *latent, (observed, last) = _latent(_run(model, data, (*inputs, None))).items() or [
            ("", None)
        ]
    if last is None:
        raise ModelError(
            f"{_name(model)} states no site when its observations are None. "
            "Keep pyro.sample outside of any `if y is not None`."
        )
    frame = next((f for f in last["cond_indep_stack"] if rows in (f.size, f.full_size)), None)
    plate = frame.name if frame else None
    part = frame.size if frame and frame.size != frame.full_size else None
    found = {name: _site(node, plate) for name, node in latent}
    with quiet_pyro(), seeded(np.random.SeedSequence(0)):
        every = part is None or _takes_all(model, (*inputs, None), frame)
    return Sites(found, observed, plate, 0, rows, part, every, (), {}, True, names)


def latent_sites(program: Model, data: Data, sites: Sites) -> dict[str, Site]:
    """The latent sites of a method's program: the model's, then those that the method added."""
    with quiet_pyro(), seeded(np.random.SeedSequence(0)):
        stated = _latent(_run(program, data, data.tensors))
    added = {k: _site(node, sites.plate) for k, node in stated.items() if k not in sites.latent}
    return sites.latent | added


def check_rows(
    program: Model, draw: dict[str, Tensor], args: tuple[Tensor, ...], sites: Sites
) -> None:
    """Refuses new rows that the observed site cannot have produced, by one run at one draw.

    Raises:
        DataError: another shape than the site's, or values outside its support.
    """
    whole = args[-1]
    if sites.subsample_size is not None:
        args = take_filled(args, 0, sites.subsample_size)
    data = Data(args, sites.names, rows=len(args[-1]))
    capture = Capture(sites.observed)
    with told(program, data), capture, At(draw):
        program(*args)
    site = {"name": sites.observed, "fn": capture.fn, "value": capture.value}
    check_shape(site, data, None)
    check_support(capture.fn, capture.value, data.names[-1], sites.observed)
    if sites.subsampled and same_for_every_row(capture.fn.support):
        check_support(capture.fn, whole, data.names[-1], sites.observed)


def _name(model: Model) -> str:
    return f'model "{name_of(model)}"'


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
    shapes = shapes or "nothing"
    try:
        yield
    except (ModelError, DataError):
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        cure = (
            isinstance(error, TypeError) and "positional argument" in first and call_of(model, data)
        )
        if cure and isinstance(model, torch.nn.Module):
            cure = (
                "A net is no model yet: bnn.models.supervised(net, "
                "bnn.models.likelihoods.Gaussian()) makes one of it."
            )
        cure = cure or "Run it once by hand on the data to see where."
        if "Multiple sample sites named" in first:
            cure = "Give every site a name of its own, and open the data plate once."
        elif "Shape mismatch inside plate" in first:
            cure = (
                f"Give the plate the number of rows, len({data.names[0]}), and the distribution "
                "the batch shape (row,): drop an axis of f with [:, 0]."
            )
        elif "subsample_size does not match" in first:
            cure = "Leave subsample_size out: a minibatch scales by N/B too; or make it larger."
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


def _site(node: Any, plate: str | None) -> Site:
    inside = any(frame.name == plate for frame in node["cond_indep_stack"])
    return Site(tuple(node["value"].shape), node["fn"].support, inside)


def _seam(node: Any, plate: str | None, data: Data) -> Site:
    """A deterministic site; local too where it has a row axis (a net run before the plate)."""
    site = _site(node, plate)
    return replace(site, local=site.local or site.shape[:1] == (len(data.observations),))


def _data_plate(site: Any, data: Data) -> tuple[str | None, Any]:
    """The plate around the observed site that has a row for each datum."""
    rows = {data.rows, len(data.observations)}
    frames = [f for f in site["cond_indep_stack"] if f.size in rows or f.full_size in rows]
    if not frames:
        return None, None
    outermost = min(frames, key=lambda f: f.dim if f.dim is not None else 0)
    return outermost.name, outermost


def _takes_all(model: Model, args: tuple[Any, ...], frame: Any) -> bool:
    """True if a plate that draws so many rows takes all where it is given so many."""
    try:
        trace: Any = poutine.trace(model).get_trace(*take_filled(args, 0, frame.size))
    except Exception:  # it states the rows of the fit, and indexes beyond those given
        return False
    plates = [f for node in trace.nodes.values() for f in node.get("cond_indep_stack", ())]
    return all(f.size == f.full_size for f in plates if f.name == frame.name)


def _row_axis(site: Any, frame: Any, data: Data) -> int | None:
    """Axis of the observed log density that is the row."""
    batch = len(site["fn"].batch_shape)
    if frame is not None and frame.dim is not None:
        return batch + frame.dim
    if batch and site["fn"].batch_shape[0] == len(data.observations):
        return 0
    return None


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
    _check_parameters(again)
    _check_finite_density(log_joint, again, model)
    _check_same_sites(sites, _latent(again))
    mirror = _at_mirror(model, data, again)
    _check_same_sites(sites, _latent(mirror))
    if _log_prior(mirror) > _log_prior(again) - _RARE:
        _check_parameters(mirror)


def _check_free(trace: Any) -> None:
    for name, node in _latent(trace).items():
        if isinstance(innermost(node["fn"]), Delta):
            raise ModelError(
                f'The latent site "{name}" is a Delta: there is nothing to infer. State what is '
                f'known by pyro.deterministic("{name}", ...), and what is learned without a prior '
                f'by pyro.param("{name}", ...).'
            )


def _check_masks(trace: Any) -> None:
    for name, node in _latent(trace).items():
        mask = node["mask"]
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise ModelError(
                f'The latent site "{name}" is masked: where the mask is False it has no density, '
                "and its posterior is not proper. Leave those rows out, or give them a prior."
            )


def _log_prior(trace: Any) -> float:
    nodes = _latent(trace).values()
    return sum(float(node["fn"].log_prob(node["value"]).sum().detach()) for node in nodes)


def _check_parameters(trace: Any) -> None:
    """Refuses distributions that the model gives parameters they cannot have.

    With checks off many have a log density there all the same: of a Bernoulli's probability 1.7,
    of a negative concentration. What is off by a rounding error, or not finite, is let through.
    """
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or not is_statement(node):
            continue
        if (found := impossible_parameter(node["fn"])) is None:
            continue
        law, parameter, value, needs = found
        cure = "Map it there, for example by exp or softplus, or give it a prior that stays there."
        if parameter == "probs":
            cure = "Pass logits= in place of probs=, or a sigmoid or softmax of it."
        raise ModelError(
            f'"{name}" is a {law} with {parameter}={value:.3g} at weights that the prior allows, '
            f"and {parameter} has to be {needs}. {cure}"
        )


def _at_mirror(model: Model, data: Data, trace: Any) -> Any:
    """A run at -z: a model that branches on the sign of a site shows it."""
    values = {}
    try:
        for name, node in _latent(trace).items():
            if not node["fn"].support.is_discrete:
                reach = to_support(node["fn"].support)
                values[name] = reach(-reach.inv(node["value"].detach()))
        with At(values):
            return poutine.trace(model).get_trace(*data.tensors)
    except Exception:  # -z may be further out than any draw, and the model need not bear that
        return trace


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
        first, second = to_support(before), to_support(after)
        point = torch.zeros(tuple(first.inverse_shape(torch.Size(site.shape)))) + 0.3
        return not torch.equal(first(point), second(point))
    except NotImplementedError as error:
        raise ModelError(
            f'There is no map from the real line to the support of "{name}", {before}. '
            "Write the site as a transform of one that has: positive, an interval, a simplex."
        ) from error


def _warn_of_offset(model: Model, data: Data) -> None:
    """Tells of a column that is far from 0 and hardly varies: 2013 after 2012.

    A model that centres its inputs itself does not show it in f.
    """
    for name, arg in zip(data.names, data.inputs, strict=False):
        if not arg.is_floating_point() or arg.ndim not in (1, 2) or len(arg) < 3:
            continue
        columns = arg.reshape(len(arg), -1).double()
        spread = columns.std(0)
        off = torch.where(spread > 0, columns.mean(0).abs() / spread, 0.0)
        worst = int(off.argmax()) if off.numel() else 0
        if off.numel() and off[worst] > _OFF and _reaches(model, data):
            labels = data.columns.get(name) or range(len(off))
            column = f', column "{labels[worst]}",' if arg.ndim == 2 else ""
            warnings.warn(
                f'"{name}"{column} lies {float(off[worst]):.0f} of its standard deviations from 0. '
                "A slope in it and an intercept then all but cancel: methods that optimise (SVI, "
                f"MAP) stop short of the posterior, and samplers are slow. Subtract its mean.",
                DataWarning,
                stacklevel=outside(),
            )


def _reaches(model: Model, data: Data) -> bool:
    """True if f at the prior is as a whole far more uncertain than its changes from row to row."""
    rows = torch.linspace(0, len(data.observations) - 1, min(len(data.observations), 100)).long()
    runs = []
    try:
        for _ in range(_RUNS):
            with torch.no_grad():
                trace: Any = poutine.trace(model).get_trace(*take(data.tensors, rows))
            runs.append(trace.nodes["f"]["value"].reshape(len(rows), -1).double())
        f = torch.stack(runs)  # (run, row, output)
    except Exception:  # it announces no f, or states its number of rows
        return True
    return bool((f.mean(1).std(0) > _SHOWN * f.std(1).mean(0)).any())


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
                f'model\'s prior produces at "{sites.observed}". Standardise the data '
                "(bnn.standardize), or widen the priors: as it is, the fit fights the units.",
                DataWarning,
                stacklevel=outside(),
            )
    return True
