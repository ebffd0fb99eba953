"""Attention: the handler that puts a law of weights where a program announces scores.

In a run the scores s of a layer are read as they pass, and its weights drawn from q(a | s) in place
of what the program would have gone on with. The laws are those of `_attention_laws`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributions as td
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bnn.diagnostics import Finding
from bnn.errors import ModelError
from bnn.handlers import At, parameters, quiet_pyro, seeded
from bnn.inference._attention_laws import FLOOR, LAWS, STARTS, Law, softmax
from bnn.inference._energy import Energy
from bnn.inference._rowwise import Ask
from bnn.inference._step import Objective
from bnn.method import Model, Tensors
from bnn.observations import innermost
from bnn.posterior import Posterior

_SHARPNESS = (0.1, 1e4)  # below, S overflows; above, draws are softmax(s) to 1 %
_COLLAPSED = 0.01  # nats a query
_FOLLOWS = ", which follows the scores."
_EQUALS = (
    f". Below {_COLLAPSED} it is the prior, within 7 % of probability (Pinsker's inequality): what "
    "the scores say has no part."
)
_CERTAIN = 0.01  # standard deviation of a weight
_DRAWS = 64  # that it is told from
_HIDDEN = 10  # units of the net that reads a prior off the keys
_SEAM = re.compile(r"((?:.+\.)?attention\.\d+)\.(keys|scores|weights)")


@dataclass(frozen=True)
class Met:
    """A layer of attention as a run of the model shows it.

    Attributes:
        event: shape of its scores without the row, (*lead, query, key).
        keys: shape of its keys without the row, (*lead, key, dim); None where none are announced.
        stated: True if the model states its weights as a Dirichlet site.
    """

    event: tuple[int, ...]
    keys: tuple[int, ...] | None
    stated: bool


def layers(model: Model, args: tuple[Any, ...], plate: str | None, who: str) -> dict[str, Met]:
    """The layers of attention that a model announces, by the start of their names.

    Raises:
        ModelError: none; or one without scores, of other shapes, or outside the data plate.
    """
    with torch.no_grad():
        trace: Any = poutine.trace(model).get_trace(*args)
    nodes = {n: node for n, node in trace.nodes.items() if node["type"] == "sample"}
    found = {}
    for name, node in nodes.items():
        match = _SEAM.fullmatch(name)
        if match is None or match[2] != "weights":
            continue
        scores, keys = (nodes.get(f"{match[1]}.{part}") for part in ("scores", "keys"))
        shape, stated = tuple(node["value"].shape), not node["infer"].get("_deterministic")
        if scores is None or tuple(scores["value"].shape) != shape or len(shape) < 2:
            raise ModelError(
                f'"{name}" has shape {shape}, and "{match[1]}.scores" '
                f"{'is missing' if scores is None else tuple(scores['value'].shape)}. Announce the "
                "scores before the weights, in the same shape, (row, head, query, key), with "
                "pyro.deterministic."
            )
        frames = [f for f in node["cond_indep_stack"] if f.dim is not None]
        if [f.name for f in frames] != [plate] or (stated and not _is_dirichlet(node["fn"])):
            raise ModelError(
                f'{who} states "{name}" anew for each row. State it inside the data plate and no '
                "other, as deterministic or as a Dirichlet site."
            )
        found[match[1]] = Met(shape[1:], keys and tuple(keys["value"].shape[1:]), stated)
    if not found:
        raise ModelError(
            f"{who} puts a law on attention weights, and the model announces none. Announce them: "
            'pyro.deterministic("attention.0.scores", scores, event_dim=3), -inf where masked, and '
            '"attention.0.weights" the same way, inside the data plate; or use bnn.models.vit, '
            "transformer_classification, transformer_tagging."
        )
    return found


def _is_dirichlet(fn: Any) -> bool:
    return isinstance(innermost(fn), td.Dirichlet)


@dataclass(frozen=True)
class Rule:
    """What makes the laws of a program's attention weights, from settings and fitted tensors.

    Attributes:
        law: of `LAWS`.
        sharpness: fixed, or None to learn one for each head.
        prior: "scores", "uniform", "contextual", or None for the model's own where it states one
            and "scores" where not.
        prior_concentration: total of the prior, or None to learn one for each layer.
    """

    law: str
    sharpness: float | None
    prior: str | None
    prior_concentration: float | None

    def leaves(self, found: Mapping[str, Met]) -> Tensors:
        """Where learned tensors start, by name."""
        made: Tensors = {}
        for stem, met in found.items():
            lead = met.event[:-2]
            if self.sharpness is None and self.law != "evidence":
                start = torch.full((*lead, 1, 1)[-len(met.event) :], STARTS[self.law])
                made[f"{stem}.log_sharpness"] = start.log()
            own = self.prior is None and met.stated
            if self.prior_concentration is None and not own:
                made[f"{stem}.log_prior_concentration"] = torch.tensor(STARTS["dirichlet"]).log()
            if self.prior == "contextual":
                if met.keys is None or met.keys[:-1] != (*lead, met.event[-1]):
                    raise ModelError(
                        f'prior="contextual" reads "{stem}.keys", (row, head, key, dim), found '
                        f'{met.keys or "none"}. Announce them, or pass prior="uniform".'
                    )
                inputs = met.keys[-1]
                made[f"{stem}.context.first"] = torch.randn(*lead, inputs, _HIDDEN) / inputs**0.5
                made[f"{stem}.context.offset"] = torch.zeros(*lead, 1, _HIDDEN)
                made[f"{stem}.context.second"] = torch.zeros(*lead, _HIDDEN, 1)
        return made

    def __call__(
        self, tensors: Mapping[str, Tensor], stem: str, scores: Tensor, keys: Any, fn: Any
    ) -> Law:
        """The law of one layer's weights; `fn` is what the program states for them."""
        log_sharpness = tensors.get(f"{stem}.log_sharpness")
        if log_sharpness is None:
            sharpness = scores.new_tensor(
                STARTS[self.law] if self.sharpness is None else self.sharpness
            )
        else:
            sharpness = _held(log_sharpness)
        pi = softmax(scores, scores == -math.inf)
        own = self.prior is None and _is_dirichlet(fn)
        prior = innermost(fn).concentration if own else self._prior(tensors, stem, pi, scores, keys)
        law = LAWS[self.law](scores, sharpness, prior, pi)
        law.tied = not own and self.prior in ("scores", None)
        return law

    def _prior(
        self, tensors: Mapping[str, Tensor], stem: str, pi: Tensor, scores: Tensor, keys: Any
    ) -> Tensor:
        log_total = tensors.get(f"{stem}.log_prior_concentration")
        total: Any = self.prior_concentration
        if log_total is not None:
            total = _held(log_total)
        if self.prior in ("scores", None):
            return total * pi + FLOOR
        hidden = scores == -math.inf
        share = 1 / (~hidden).sum(-1, keepdim=True).clamp(min=1).to(scores)
        if self.prior == "contextual":
            first, offset, second = (
                tensors[f"{stem}.context.{part}"] for part in ("first", "offset", "second")
            )
            rows = keys.movedim(0, -3)  # (*lead, row, key, dim): a product a head
            units = torch.relu(rows.flatten(-3, -2) @ first + offset)
            each = (units @ second).unflatten(-2, rows.shape[-3:-1])[..., 0]  # (*lead, row, key)
            share = softmax(each.movedim(-2, 0)[..., None, :].expand_as(scores), hidden)
        return (total * share).clamp(min=FLOOR)


def _held(log: Tensor) -> Tensor:
    """What a learned log says, within range; beyond, its slope is what it would be without end."""
    return (log + (log.clamp(*map(math.log, _SHARPNESS)) - log).detach()).exp()


class Attending(Messenger):
    """States attention weights as latent sites of a rule's laws, and draws them.

    Attributes:
        met: laws in the last run, by the start of their names.

    Args:
        rule: makes the laws.
        tensors: what it has learned.
        ask: gives the noise, by name, shape and law; None draws it.
    """

    def __init__(self, rule: Rule, tensors: Mapping[str, Tensor], ask: Ask | None = None):
        super().__init__()
        self.rule, self.tensors, self.ask = rule, tensors, ask
        self.met: dict[str, Law] = {}
        self._passed: dict[str, Tensor] = {}

    def __enter__(self) -> "Attending":
        self.met, self._passed = {}, {}
        return super().__enter__()

    def _pyro_sample(self, message: Any) -> None:
        match = _SEAM.fullmatch(message["name"])
        if match is None or match[2] != "weights":
            return
        stem, name = match[1], message["name"]
        scores, keys = (self._passed.get(f"{stem}.{part}") for part in ("scores", "keys"))
        if scores is None:
            raise ModelError(f'"{name}" came before "{stem}.scores". Announce the scores first.')
        law = self.rule(self.tensors, stem, scores, keys, message["fn"])
        ask = None if self.ask is None else lambda what, *rest: self.ask(f"{name} {what}", *rest)  # type: ignore[misc]
        self.met[stem] = law
        message["fn"], message["value"] = law, law.rsample(ask=ask)
        message["is_observed"], message["infer"] = False, {}

    def _pyro_post_sample(self, message: Any) -> None:
        match = _SEAM.fullmatch(message["name"])
        if match is not None and match[2] != "weights":
            self._passed[message["name"]] = message["value"]


@dataclass
class Attended:
    """A model whose attention weights follow a rule's laws, while the rule is learned.

    Attributes:
        tensors: present values of what the rule learns.
    """

    model: Model
    rule: Rule
    tensors: Mapping[str, Tensor]
    _ask: Ask | None = field(default=None, repr=False)

    def __call__(self, *args: Any) -> Any:
        with Attending(self.rule, self.tensors, self._ask):
            return self.model(*args)

    @contextmanager
    def rewired(self, moments: Any, ask: Ask) -> Iterator[None]:
        """Runs inside take their noise from `ask`; see `bnn.inference._elbo.Bound`."""
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None

    def learning(self, objective: Objective) -> Objective:
        """An objective of this model's runs as a function of the rule's tensors too."""

        def at(tensors: Mapping[str, Tensor], *rest: Any) -> Tensor:
            before, self.tensors = self.tensors, {name: tensors[name] for name in self.tensors}
            try:
                return objective(tensors, *rest)
            finally:
                self.tensors = before

        return at


def of_attention(posterior: Posterior, rule: Rule) -> list[Finding]:
    """Collapse to the prior, and concentrations that ran away, by layer."""
    model, data = posterior.model, posterior.data
    energy = Energy(model, data, replace(posterior.sites, latent={}))
    first = At({k: v[0, 0] for k, v in posterior.draws.items()})
    fitted = parameters(model, data.tensors, posterior.params)
    with quiet_pyro(), seeded(np.random.SeedSequence(0)), fitted, first:
        return told(Attended(model, rule, posterior.params), energy.few)


def told(attended: Attended, args: tuple[Any, ...]) -> list[Finding]:
    """What the laws of a run say of themselves: near the prior, or near a point."""
    with torch.no_grad(), Attending(attended.rule, attended.tensors) as run:
        attended.model(*args)
    found = []
    for stem, law in run.met.items():
        chooses = (~law.hidden).sum(-1) > 1  # queries with a choice, (row, *lead, query)
        if not chooses.any():
            continue
        mean = law.mean
        first = mean.argmax(-1, keepdim=True)
        draws = [law.rsample().gather(-1, first)[..., 0] for _ in range(_DRAWS)]
        spread = float(torch.stack(draws).std(0)[chooses].mean())
        kl = float(law.kl()[chooses].mean())
        keys = float(torch.special.entr(mean).sum(-1)[chooses].mean().exp())
        found += [
            Finding(
                name=f"KL of {stem}.weights from its prior",
                value=kl,
                threshold=None if law.tied else _COLLAPSED,
                unlimited="its prior has the mean of the scores" if law.tied else "",
                doubtful=not law.tied and kl < _COLLAPSED,
                meaning=f"A query's attention is {kl:.2g} nats from its prior, on average"
                + (_FOLLOWS if law.tied else _EQUALS),
                advice="Read the spread instead: a KL of 0 is no collapse here."
                if law.tied
                else 'Pass prior="scores"; or fewer layers, heads and queries, whose KL adds up.',
            ),
            Finding(
                name=f"spread of {stem}.weights",
                value=spread,
                threshold=_CERTAIN,
                doubtful=spread < _CERTAIN,
                meaning=f"A query's largest weight has a standard deviation of {spread:.2g}, on "
                f"average. Below {_CERTAIN} attention is deterministic: its sharpness ran away.",
                advice="Fix sharpness, or prior_concentration if it is learned.",
            ),
            Finding(
                name=f"keys that a query of {stem} looks at",
                value=keys,
                threshold=None,
                unlimited="one key, and all, can be right",
                doubtful=False,
                meaning=f"The mean weights of a query are worth {keys:.2g} equal ones.",
                advice="See which keys in bnn.plots.attention.",
            ),
        ]
    return found
