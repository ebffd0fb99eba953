"""Evidence: prior scales and noise that maximise Laplace's log marginal likelihood.

    log Z = log p(data, s*) + size/2 log 2 pi - 1/2 log det H(s*)

The factor c of a Normal prior's scale, w ~ N(m, (c scale)^2), has its stationary point at

    c^2 = sum (w* - m)^2 / scale^2 / gamma,    gamma = n - sum sd^2 / (c scale)^2,

with gamma the number of weights that the data determine (MacKay 1992, eq. 4.8), and is iterated to
it. The noise takes Newton steps on log Z + log p(noise), the derivatives of log det H by
differences. As there, the dependence of H on the mode is left out: exact for linear models.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bnn.errors import ConvergenceWarning, ModelError, outside
from bnn.handlers import At, Capture, Score, is_statement
from bnn.inference._joint import Joint, slope_of
from bnn.inference._mode import Mode, Shape, polish, upwards
from bnn.inference._precision import NotPositive
from bnn.method import Model, Tensors
from bnn.observations import innermost, own_mask
from bnn.sites import Sites

_ROUNDS = 60
_SETTLED = 1e-3  # change of a logarithm: far below what the data can tell
_APART = 0.02  # step of differences, in the logarithm of a noise scale
_WIDEST = 100.0  # times as wide, or as narrow, as the model states: beyond, nothing is determined
_LONGEST = 1.0  # change of a logarithm in one round


def normal_of(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Location and scale of a Normal prior, (*site) each; None of any other, or of a masked one."""
    base = innermost(fn)
    if not isinstance(base, td.Normal) or own_mask(fn) is not None:
        return None
    return base.loc.expand(fn.shape()), base.scale.expand(fn.shape())


class Scaled(Messenger):
    """Multiplies the scale of the Normal priors that are named; of other sites nothing."""

    def __init__(self, factors: Mapping[str, Any]):
        super().__init__()
        self.factors = factors

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self.factors and is_statement(message):
            fn, normal = message["fn"], normal_of(message["fn"])
            if normal is not None:
                wider: Any = dist.Normal(normal[0], self.factors[message["name"]] * normal[1])
                message["fn"] = wider.to_event(fn.event_dim)


def scaled(model: Model, factors: Mapping[str, Any]) -> Model:
    """The model under those factors, as they are when it runs."""

    def run(*args: Any) -> Any:
        with Scaled(factors):
            return model(*args)

    return run


class Priors(Messenger):
    """Location and scale of the Normal priors of a run, by site."""

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[str, tuple[Tensor, Tensor]] = {}

    def _pyro_post_sample(self, message: Any) -> None:
        if is_statement(message) and not message["is_observed"]:
            normal = normal_of(message["fn"])
            if normal is not None:
                self.met[message["name"]] = normal


def normal_priors(joint: Joint, z: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every free site with a Normal prior its location and scale at z."""
    with torch.no_grad(), Priors() as seen, At(joint.energy.values(z)):
        joint.energy.model(*joint.first)
    return {slot.name: seen.met[slot.name] for slot in joint.slots if slot.name in seen.met}


def tuned(
    joint: Joint, sites: Sites, shape: Shape, what: str | tuple[str, ...], factors: dict[str, float]
) -> tuple[Joint, Tensors]:
    """Maximises the evidence.

    Args:
        joint: the log joint of a `scaled` model that reads `factors`.
        sites: what the contract check found.
        shape: precision at a point.
        what: "global", "site", or names of sites.
        factors: by site, filled in here.

    Returns:
        The log joint with the noise at its value, and the values: factors of priors, noise sites.

    Raises:
        ModelError: nothing to tune, or nothing else to fit.

    Warns:
        ConvergenceWarning: the data do not determine a value.
    """
    groups, noise = _to_tune(joint, sites, what)
    factors |= {name: 1.0 for group in groups for name in group}
    joint = joint.held(joint.start, [name for name in _free(joint) if name not in noise])
    for _ in range(_ROUNDS):
        mode = polish(joint, shape, proof=False)
        joint = joint.held(mode.s, _free(joint))
        moves = [_widen(mode, group, factors) for group in groups]
        moves += [_tune_noise(joint, shape, site) for site in noise]
        if max(map(abs, moves)) < _SETTLED:
            break
    else:
        _warn(f"values had not settled after {_ROUNDS} rounds")
    far = [k for k, v in factors.items() if max(v, 1 / v) > 0.99 * _WIDEST]
    if far:
        _warn(f"prior scale of {', '.join(far)} went to its limit, a factor of {_WIDEST:g}")
    constrained = joint.energy.values(joint.base)
    values = {k: torch.tensor(v) for k, v in factors.items()}
    values |= {k: constrained[k].detach() for k in noise}
    return joint, values


def _warn(what: str) -> None:
    warnings.warn(
        f"Laplace: the {what}: the data do not determine what tune sets. Name sites whose scales "
        'matter, tune=(...), or one factor for all, tune="global".',
        ConvergenceWarning,
        stacklevel=outside(),
    )


def _free(joint: Joint) -> list[str]:
    return [slot.name for slot in joint.slots]


def _span(joint: Joint, name: str) -> slice:
    return next(slot.span for slot in joint.energy.slots if slot.name == name)


def _widen(mode: Mode, group: tuple[str, ...], factors: dict[str, float]) -> float:
    """One step for the factor of a group of sites; its change, as a logarithm."""
    joint, z = mode.joint, mode.z
    priors, sd = normal_priors(joint, z), torch.zeros_like(z)
    sd[joint.index] = mode.precision.sd.to(sd)
    far = determined = 0.0
    for name in group:
        (loc, scale), span = priors[name], _span(joint, name)
        far += float(((z[span] - loc.flatten()) / scale.flatten()).double().square().sum())
        determined += float((1 - (sd[span] / scale.flatten()).double().square()).sum())
    move = 0.5 * math.log(max(far, 1e-12) / max(determined, 1e-12))
    before = factors[group[0]]
    after = before * math.exp(max(-_LONGEST, min(_LONGEST, move)))
    after = max(1 / _WIDEST, min(_WIDEST, after))
    factors.update(dict.fromkeys(group, after))
    return math.log(after / before)


def _tune_noise(joint: Joint, shape: Shape, site: str) -> float:
    """One step for every entry of a noise site, in place in the base; the longest move."""
    span, s, longest = _span(joint, site), joint.start, 0.0
    for place in range(span.start, span.stop):

        def value(away: float, place: int = place) -> float:
            base = joint.base.clone()
            base[place] += away
            near = Joint(joint.energy, joint.data, joint.batch_size, base, _free(joint))
            try:
                return near.gradient(s)[0] - 0.5 * shape(near, s).log_det
            except NotPositive as error:
                raise upwards(near, error) from None

        below, here, above = value(-_APART), value(0.0), value(_APART)
        slope, bend = (above - below) / (2 * _APART), (above - 2 * here + below) / _APART**2
        move = slope / -bend if bend < 0 else math.copysign(_LONGEST, slope)
        move = max(-_LONGEST, min(_LONGEST, move))
        joint.base[place] += move
        longest = max(longest, abs(move))
    return longest


def _to_tune(
    joint: Joint, sites: Sites, what: str | tuple[str, ...]
) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The groups of sites that share a prior factor, and the noise sites.

    Args:
        joint: at a typical point.
        sites: what the contract check found.
        what: "global", "site", or names of sites.

    Raises:
        ModelError: nothing to tune.
    """
    priors = normal_priors(joint, joint.base)
    if not isinstance(what, str):
        if unknown := set(what) - set(_free(joint)):
            raise ModelError(
                f"tune names {', '.join(map(repr, sorted(unknown)))}, and the Gaussian is of "
                f"{', '.join(_free(joint))}. Name some of these."
            )
        noise = tuple(name for name in what if name not in priors)
    else:
        noise = _noise(joint, sites)
    if set(_free(joint)) <= set(noise):
        raise ModelError(
            f"tune={what!r} sets the value of {', '.join(noise)}, and leaves no site for a "
            "Gaussian. Name fewer, or leave tune out."
        )
    if not isinstance(what, str):
        return [(name,) for name in what if name in priors], noise
    names = tuple(name for name in priors if name not in noise)
    if not names and not noise:
        raise ModelError(
            f'tune="{what}" sets the scale of Normal priors and the noise, and the model has '
            f"neither among {', '.join(_free(joint))}. Leave tune out."
        )
    groups = [names] if what == "global" else [(name,) for name in names]
    return [group for group in groups if group], noise


def _noise(joint: Joint, sites: Sites) -> tuple[str, ...]:
    """Sites of bounded support that the likelihood depends on, and f, where announced, not."""
    z = joint.base.clone().requires_grad_()
    score = Score(sites.plate, joint.data.rows)
    with torch.enable_grad(), Capture("") as seen, score, At(joint.energy.values(z)):
        joint.energy.model(*joint.first)
    if "f" not in seen.values:
        return ()
    moves = []
    for value in (torch.as_tensor(score.likelihood), (seen.values["f"] ** 2).sum()):
        moves.append(slope_of(value, z))
    return tuple(
        slot.name
        for slot in joint.slots
        if not slot.real and moves[0][slot.span].any() and not moves[1][slot.span].any()
    )
