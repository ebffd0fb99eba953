"""Dirichlet attention: attention weights of each row as latent variables, told by its scores.

For head h, query i, keys j that i may see, scores s_i and pi_i = softmax(s_i):

    q(a_i | s) = Dirichlet(c_h pi_i),    E[a] = pi,    Var[a] = pi (1 - pi) / (c + 1)
    maximise   E_q[log p(y | a, w)] - sum over layers, h, i of KL(q(a_i) || p(a_i)) + log p(w)

    p(a_i) = Dirichlet(k pi_i), "scores"; Dirichlet(k / n), "uniform"; or, for all queries alike,
    Dirichlet(k softmax_j g(key_j)), "contextual"

over the weights w, the sharpness c and g; c -> infinity is the attention that it was. A layer's
scores depend on what the layers before drew, so that one run of the model draws them all. The KL is
exact and inside the data plate: on a minibatch of B of N rows it counts N/B times, like the
likelihood. It is summed over layers, heads and queries (Fan et al. average it: another objective),
and annealed. New rows have no y: their attention is drawn from q, which looks at x alone.

Cinquin et al. do not publish their map from scores to concentrations; ours is theirs in spirit. To
c pi and k pi .01 is added: without it KL and slope have no bound at keys far from attended to.
A draw is a ratio of gammas, and these are a fitted function of normal and uniform noise, to 4e-6 of
their logarithm, about what float32 rounds: so steps are compiled as `MAP`'s are.

When not to use it: to know how sure a net is of its weights. The authors found it no better than
its baselines; so it is on the benchmarks' digits, and not on their words. A label tells of a row a
few nats, and the KL of all its queries is soon more: under "uniform" and "contextual" attention
falls back to the prior (collapse). Under "scores" k, which is a setting, says how uncertain
attention is; learned, it may run away. `diagnose()` tells of both.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from bnn.data import Data, take
from bnn.diagnostics import Finding
from bnn.handlers import branch, constrained_parameters, generator, parameters, seeded
from bnn.inference._attention import Attended, Rule, layers, of_attention
from bnn.inference._elbo import Bound
from bnn.inference._energy import Energy
from bnn.inference._guide import FAMILIES
from bnn.inference._optimise import Optimised, maximise
from bnn.method import Model, Tensors, check_count, check_positive
from bnn.posterior import Posterior
from bnn.sites import Sites, require_continuous, require_minibatches


@dataclass(frozen=True, kw_only=True)
class DirichletAttention(Optimised):
    """An amortised posterior over attention weights: `prediction.local["attention.0.weights"]`.

    The model announces "attention.0.scores", -inf where a query may not see a key, and then
    "attention.0.weights" of the same shape, (row, head, query, key), deterministic or a Dirichlet
    site; keys that are not seen get exactly 0. `bnn.models.vit` and its kin do.

    With weights="point", `elbo` is None where weights have a prior.

    Attributes:
        family: of a, as S / sum S: "dirichlet"; "weibull" and "lognormal" with E[S] = pi, whose KL
            is of S, and no less than that of a.
        concentration: of a Dirichlet: "scaled_softmax", c pi; "evidence", softplus(s), by which
            each query has a total of its own.
        sharpness: c, or k of the Weibull, or 1 / sd of the log-normal; None learns one for each
            head, within .1 to 10,000.
        prior: "scores"; "uniform"; "contextual", by a net of each head with 10 ReLU units; None
            takes the Dirichlet that the model states, and "scores" where it states none.
        prior_concentration: k, the total over keys; None learns one for each layer.
        weights: q of the other sites: "point", the mode, or "normal", as in `bnn.SVI`.
        draws: that the posterior keeps.

    References:
        Cinquin, Immer, Horn, Fortuin (2021), Pathologies in priors and inference for Bayesian
        transformers. Fan et al. (2020), Bayesian attention modules (Weibull, log-normal, contextual
        priors). Figurnov, Mohamed, Mnih (2018), Implicit reparameterization gradients.

    Example:
        >>> DirichletAttention(family="weibull") == DirichletAttention()
        False
    """

    family: str = "dirichlet"
    concentration: str = "scaled_softmax"
    sharpness: float | None = None
    prior: str | None = None
    prior_concentration: float | None = 10.0
    annealing: float = 0.3
    weights: str = "point"
    draws: int = 100
    adds_sites = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("DirichletAttention", draws=self.draws)
        known = {
            "family": ("dirichlet", "weibull", "lognormal"),
            "concentration": ("scaled_softmax", "evidence"),
            "prior": (None, "scores", "uniform", "contextual"),
            "weights": ("point", "normal"),
        }
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                these = ", ".join(map(repr, values))
                raise ValueError(f"DirichletAttention({name}={value!r}): known are {these}.")
        sharp = self.family != "dirichlet" or self.sharpness is not None
        if self.concentration == "evidence" and sharp:
            raise ValueError(
                f'DirichletAttention(concentration="evidence", family="{self.family}", sharpness='
                f'{self.sharpness}): "evidence" is of a Dirichlet, and has no sharpness.'
            )
        given = {k: getattr(self, k) for k in ("sharpness", "prior_concentration")}
        check_positive("DirichletAttention", **{k: v for k, v in given.items() if v is not None})

    @property
    def _rule(self) -> Rule:
        law = "evidence" if self.concentration == "evidence" else self.family
        return Rule(law, self.sharpness, self.prior, self.prior_concentration)

    def fit(
        self,
        model: Model,
        data: Data,
        sites: Sites,
        *,
        seed: np.random.SeedSequence,
        progress: bool,
    ) -> Posterior:
        """See `Method.fit`."""
        who = "DirichletAttention"
        found = layers(model, take(data.tensors, slice(0, self.batch_size)), sites.plate, who)
        drawn = {f"{stem}.weights" for stem in found}
        rest = replace(sites, latent={k: v for k, v in sites.latent.items() if k not in drawn})
        require_continuous(rest, who)
        if data.loader is not None or sites.subsampled or self.batch_size is not None:
            require_minibatches(rest, who)
        with seeded(branch(seed, 0)):
            leaves = self._rule.leaves(found)
        attended = Attended(model, self._rule, leaves)
        energy = Energy(attended, data, rest)
        loc = energy.starts(1, branch(seed, 1))[0]  # it draws attention anew: no fault
        family = FAMILIES[self.weights](loc, 0.1 * energy.prior_scale(branch(seed, 2)))
        bound = Bound(energy, family, rest, rowwise=attended)

        with seeded(branch(seed, 3)), parameters(model, data.tensors) as leftovers:
            (history,) = maximise(
                attended.learning(bound.at),
                {f"guide.{k}": v for k, v in family.tensors.items()} | leaves | leftovers,
                data.batches(self.batch_size, generator(branch(seed, 4))),
                self,
                what=who,
                label="ELBO",
                progress=progress,
                noise=bound.noise,
                epoch=None if sites.subsampled else data.epoch(self.batch_size),
                seed=None if leftovers or sites.subsampled else branch(seed, 5),
            )
            with torch.no_grad():
                z = family.sample(torch.randn, 1 if self.weights == "point" else self.draws)[0]
                mode = self.weights == "point" and energy.slots  # then there is no bound
                elbo = None if mode else bound.value(data, rest)
            params = constrained_parameters() | {k: v.detach() for k, v in leaves.items()}
        sites_at = energy.unflatten(z).items()
        posterior = Posterior(
            model=model,
            method=self,
            data=data,
            sites=sites,
            draws={k: v[None].expand(1, self.draws, *v.shape[1:]) for k, v in sites_at},
            params=params,
            history=history,
            elbo=elbo,
            count=(1, self.draws),
        )
        return posterior

    def program(self, model: Model, params: Tensors) -> Model:
        """The model, with attention weights drawn from q."""
        return Attended(model, self._rule, params)

    def findings(self, posterior: Posterior) -> list[Finding]:
        """See `Method.findings`."""
        return [*super().findings(posterior), *of_attention(posterior, self._rule)]

    def at_fit(self, posterior: Posterior) -> list[Finding]:
        """See `Method.at_fit`."""
        return [*super().at_fit(posterior), *of_attention(posterior, self._rule)]
