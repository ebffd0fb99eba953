"""Attention: laws of its weights, and the handler that puts them where a program announces scores.

Weights are a_j = S_j / sum S over the keys that the query may see, S_j positive. In a run the
scores s of a layer are read as they pass, and its weights drawn from q(a | s) in place of what the
program would have gone on with. pi = softmax(s).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributions as td
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from bnn.diagnostics import Finding
from bnn.errors import ModelError
from bnn.inference._rowwise import Ask
from bnn.inference._step import Objective
from bnn.method import Model, Tensors
from bnn.observations import innermost

FLOOR = 1e-2  # of a concentration: the KL has the slope prior / concentration^2
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


def softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    """Over the last axis; exactly 0 where hidden, and wherever all of them are."""
    return torch.softmax(scores.masked_fill(hidden, _lowest(scores)), -1) * ~hidden


def _lowest(like: Tensor) -> float:
    return torch.finfo(like.dtype).min


class Law(TorchDistribution):
    """q of a layer's weights, (row, *lead, query, key), exactly 0 at hidden keys.

    Its log density at a draw is stated as E_q[log p(a) - log q(a)], that is -KL(q || prior) in
    closed form, summed over everything but the row: what the site adds to an ELBO, without noise.

    Args:
        scores: -inf at hidden keys.
        sharpness: positive, of shape (*lead, 1, 1).
        prior: concentrations b of the prior, a ~ Dirichlet(b), in a shape that broadcasts to that
            of the scores; positive. At hidden keys they have no effect.
        pi: softmax(scores), where it is known.
    """

    has_rsample = True
    arg_constraints: ClassVar[dict[str, Any]] = {}  # pyright: ignore
    tied = False  # True where the prior follows the scores: then a KL of 0 is no collapse

    def __init__(self, scores: Tensor, sharpness: Tensor, prior: Tensor, pi: Tensor | None = None):
        self.hidden, self.scores = scores == -math.inf, scores
        self.pi = softmax(scores, self.hidden) if pi is None else pi
        self.sharpness, self.prior = sharpness, prior
        super().__init__(scores.shape[:1], scores.shape[1:], validate_args=False)

    @property
    def support(self) -> Any:
        """Simplices, save for queries that see no key."""
        return constraints.independent(constraints.simplex, len(self.event_shape) - 1)

    @property
    def mean(self) -> Tensor:
        """E[S] / sum E[S], which is pi."""
        return self.pi

    @property
    def log_pi(self) -> Tensor:
        """Log softmax(s), 0 at hidden keys."""
        lowest = self.scores.masked_fill(self.hidden, _lowest(self.scores))
        return torch.log_softmax(lowest, -1).masked_fill(self.hidden, 0.0)

    def rsample(self, sample_shape: Any = (), *, ask: Ask | None = None) -> Tensor:
        """Weights, (row, *lead, query, key), pathwise in everything."""
        return softmax(self._log_s(ask), self.hidden)

    def kl(self) -> Tensor:
        """KL(q || prior) of each query, nats, (row, *lead, query); 0 where it has no choice."""
        return torch.where((~self.hidden).sum(-1) > 1, self._divergence(), 0.0)

    def log_prob(self, value: Tensor) -> Tensor:
        """-KL(q || prior), (row,), whatever the value."""
        return -self.kl()[..., None].flatten(1).sum(1)

    def _log_s(self, ask: Ask | None) -> Tensor:
        raise NotImplementedError

    def _divergence(self) -> Tensor:
        raise NotImplementedError

    def _over_keys(self, each: Tensor) -> Tensor:
        """Sum over the keys that are seen, of what broadcasts to the shape of the scores."""
        if each.shape[-1:] == (1,):
            return each[..., 0] * (~self.hidden).sum(-1)
        return torch.where(self.hidden, 0.0, each).sum(-1)


class Dirichlet(Law):
    """a ~ Dirichlet(sharpness pi + FLOOR)."""

    def __init__(self, scores: Tensor, sharpness: Tensor, prior: Tensor, pi: Tensor | None = None):
        super().__init__(scores, sharpness, prior, pi)
        self.concentration = self._concentration()

    @property
    def mean(self) -> Tensor:
        """E[a] = concentration / total."""
        each = self.concentration * ~self.hidden
        return each / each.sum(-1, keepdim=True).clamp(min=FLOOR)

    def _concentration(self) -> Tensor:
        return torch.addcmul(self.pi.new_tensor(FLOOR), self.sharpness, self.pi)

    def _log_s(self, ask: Ask | None) -> Tensor:
        u = torch.rand(self.concentration.shape).to(self.concentration)  # a draw each under vmap
        return _LogGamma.apply(self.concentration, u)[0]  # type: ignore[index]

    def _divergence(self) -> Tensor:
        a, b = self.concentration, self.prior
        a0, b0 = (self._over_keys(each).clamp(min=FLOOR) for each in (a, b))
        each: Any = _Excess.apply(a, b)
        return (
            torch.lgamma(a0) - torch.lgamma(b0) - (a0 - b0) * torch.digamma(a0)
            + self._over_keys(each[0])
        )  # fmt: skip


class Evidence(Dirichlet):
    """a ~ Dirichlet(softplus(s) + FLOOR): each query has a total of its own."""

    def _concentration(self) -> Tensor:
        return softplus(self.scores.masked_fill(self.hidden, 0.0)) + FLOOR


class Weibull(Law):
    """S_j ~ Weibull(shape k, mean pi_j), against S_j ~ Gamma(b_j, rate sum b): a ~ Dirichlet(b)."""

    def _log_s(self, ask: Ask | None) -> Tensor:
        k, log_pi = self.sharpness, self.log_pi
        noise = _noise(ask, log_pi, _log_exponential)
        return log_pi - torch.lgamma(1 + 1 / k) + noise / k

    def _divergence(self) -> Tensor:
        log_scale = self.log_pi - torch.lgamma(1 + 1 / self.sharpness)
        rate = self._over_keys(self.prior)[..., None].clamp(min=FLOOR)
        return self._over_keys(weibull_gamma(self.sharpness, log_scale, self.prior, rate))


class LogNormal(Law):
    """log S_j ~ N(log pi_j - sd^2 / 2, sd^2), sd = 1 / sharpness; E[S_j] = pi_j.

    The prior of log S_j is the Normal with the mean and variance that it has under
    S_j ~ Gamma(b_j, rate sum b).
    """

    def _log_s(self, ask: Ask | None) -> Tensor:
        sd, log_pi = 1 / self.sharpness, self.log_pi
        return log_pi - 0.5 * sd.square() + sd * _noise(ask, log_pi, torch.randn)

    def _divergence(self) -> Tensor:
        variance, b = self.sharpness**-2, self.prior
        total = self._over_keys(b)[..., None].clamp(min=FLOOR)
        loc, spread = torch.digamma(b) - total.log(), torch.polygamma(1, b)
        shift = self.log_pi - 0.5 * variance - loc
        ratio = variance / spread
        return self._over_keys(0.5 * (ratio + shift.square() / spread - 1 - ratio.log()))


LAWS: dict[str, type[Law]] = {
    "dirichlet": Dirichlet,
    "evidence": Evidence,
    "weibull": Weibull,
    "lognormal": LogNormal,
}
_STARTS = {"dirichlet": 10.0, "evidence": 1.0, "weibull": 2.0, "lognormal": 1.0}


def weibull_gamma(k: Tensor, log_scale: Tensor, a: Tensor, rate: Tensor) -> Tensor:
    """KL(Weibull(k, scale) || Gamma(a, rate)), nats (Bauckhage 2014)."""
    euler = 0.5772156649015329
    return (
        euler * a / k - a * log_scale + k.log() + rate * (log_scale + torch.lgamma(1 + 1 / k)).exp()
        - euler - 1 - a * rate.log() + torch.lgamma(a)
    )  # fmt: skip


def _noise(ask: Ask | None, like: Tensor, draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
    return (draw(like.shape) if ask is None else ask("weights", like.shape, draw)).to(like)


def _log_exponential(shape: Sequence[int]) -> Tensor:
    u = torch.rand(shape)
    return (-u.clamp(min=torch.finfo(u.dtype).tiny).log()).log()


class _Excess(torch.autograd.Function):
    """(a - b) digamma(a) - log Gamma(a) + log Gamma(b), whose slope in a is (a - b) trigamma(a)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        known = _digamma(a)
        return (a - b) * known - torch.lgamma(a) + torch.lgamma(b), known

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Any) -> tuple[Any, Any]:  # type: ignore[override]
        a, b, known = ctx.saved_tensors
        of_b = None
        if ctx.needs_input_grad[1]:
            of_b = (slope * (_digamma(b) - known)).sum_to_size(b.shape)
        return slope * (a - b) * torch.polygamma(1, a), of_b


def _digamma(x: Tensor) -> Tensor:
    """Of positive numbers, to 1e-8: a series at x + 4. Torch's goes entry by entry, slower."""
    below = 1 / x
    for step in (1, 2, 3):
        below = below + 1 / (x + step)
    r = 1 / (x + 4)
    s = r * r
    series = s * (1 / 12 - s * (1 / 120 - s * (1 / 252 - s / 240)))
    return -r.log() - 0.5 * r - series - below


class _LogGamma(torch.autograd.Function):
    """Log of a Gamma(a, 1) draw: Gamma(a + 1) u^(1/a), which does not underflow at small a.

    The derivative in a is implicit (Figurnov, Mohamed, Mnih 2018), in both factors.
    """

    @staticmethod
    def forward(a: Tensor, u: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        g = _gamma(a + 1)
        boost = u.clamp(min=torch.finfo(u.dtype).tiny).log_().div_(a)
        return g.log().add_(boost), g, boost

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        a, g, boost = ctx.saved_tensors
        implicit: Any = torch._standard_gamma_grad(a + 1, g)  # pyright: ignore
        return slope * (implicit / g - boost / a), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        """All lanes in one call: it works entry by entry."""
        pairs = zip(args, in_dims, strict=True)
        a, u = (x[None] if axis is None else x.movedim(axis, 0) for x, axis in pairs)
        return _LogGamma.apply(*torch.broadcast_tensors(a, u)), (0, 0, 0)


def _gamma(a: Tensor) -> Tensor:
    """Draws of Gamma(a, 1) for a of at least 1 (Marsaglia, Tsang 2000); torch's take twice as long.

    One proposal in twenty is refused at most, and drawn again.
    """
    d = a - 1 / 3
    x = torch.randn_like(a)
    root = (9 * d).rsqrt_().mul_(x).add_(1)
    v = (root * root).mul_(root)
    above = v.log().sub_(v).add_(1).mul_(d).addcmul_(x, x, value=0.5)  # NaN where v < 0: refused
    refused = ~(torch.rand_like(a).log_() < above)
    g = d.mul_(v)
    if bool(refused.any()):
        g[refused] = _gamma(a[refused])
    return g


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
                start = torch.full((*lead, 1, 1)[-len(met.event) :], _STARTS[self.law])
                made[f"{stem}.log_sharpness"] = start.log()
            own = self.prior is None and met.stated
            if self.prior_concentration is None and not own:
                made[f"{stem}.log_prior_concentration"] = torch.tensor(_STARTS["dirichlet"]).log()
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
                _STARTS[self.law] if self.sharpness is None else self.sharpness
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
                doubtful=not law.tied and kl < _COLLAPSED,
                meaning=f"A query's attention is {kl:.2g} nats from its prior, on average"
                + (_FOLLOWS if law.tied else _EQUALS),
                advice='Pass prior="scores"; or fewer layers, heads and queries, whose KL adds up.',
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
                doubtful=False,
                meaning=f"The mean weights of a query are worth {keys:.2g} equal ones.",
            ),
        ]
    return found
