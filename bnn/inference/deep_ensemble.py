"""Deep ensembles: nets trained side by side from their own starts, taken together as a mixture.

Member k = 1..M is an optimum of its own of

    log p(data | values) + log p(values),

reached from its own draw of the prior, over its own order of the rows; with a bootstrap its rows
count w_ki times, weights of mean 1 that stay for the whole fit. p(y | x) is the mixture of the
members with equal weights: their noise is aleatoric, their disagreement epistemic. Likelihood and
prior are the model's: a predicted scale (`likelihoods.Gaussian("predicted")`) gives the paper's
heteroscedastic nets. The paper has no prior: one of 1/sqrt(inputs) comes near to that as rows
come. A vague one does not: members start at its draws, held within +-2 in each coordinate, and a
net whose weights are all so large is hard to train.

Adversarial training replaces the log likelihood by its mean over x and x', each row moved to where
its own density falls fastest,

    x' = x - adversarial * range(x) * sign(d log p(y | x, values) / dx).

The paper adds the two; the mean keeps the balance with the prior.

When not to use it: as a posterior. How far members disagree is a matter of where optimisation ends.
Where the log joint has one mode (linear models, little nets with a strong prior) all members find
it and there is no epistemic uncertainty left, which a warning says: `RandomizedPriors` is exact
there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.func import grad

from bnn.data import Data
from bnn.errors import DataError, ModelError
from bnn.handlers import branch
from bnn.inference._energy import Energy
from bnn.inference._ensemble import Ensemble, bootstrap, require_rows, train
from bnn.method import Model, check_positive
from bnn.posterior import Posterior
from bnn.sites import Sites


@dataclass(frozen=True, kw_only=True)
class DeepEnsemble(Ensemble):
    """An ensemble of independently trained members.

    Attributes:
        members: how many; each is a draw.
        bootstrap: None, "bernoulli", "exponential" or "resample"; see `Ensemble`. It usually does
            deep nets no good (Lakshminarayanan et al., section 2.4).
        adversarial: how far each input is moved, as a fraction of its range over the training
            rows; the paper's is .01. 0 leaves adversarial training out.
        snapshots: copies of all members on their way, for `Posterior.frames`.

    References:
        Lakshminarayanan, Pritzel, Blundell (2017), Simple and scalable predictive uncertainty
        estimation using deep ensembles.

    Example:
        >>> DeepEnsemble(members=5, bootstrap="resample").adversarial
        0.0
    """

    adversarial: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adversarial != 0:
            check_positive("DeepEnsemble", adversarial=self.adversarial)

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
        energy = Energy(model, data, sites)
        if self.bootstrap is not None:
            require_rows(energy, f"A weight of bootstrap={self.bootstrap!r}")
        reach = _reach(data, sites, self.adversarial) if self.adversarial else []

        def one(
            z: Tensor, args: Sequence[Any], weights: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            terms = lambda z, args: energy.terms(z, args, jacobian=False, weights=weights)
            likelihood, prior = terms(z, args)
            if reach:
                at = lambda *moved: terms(z.detach(), moved)[0]
                moved = against(at, args, reach)
                likelihood = 0.5 * (likelihood + terms(z, moved)[0])
            return likelihood, prior

        weights = bootstrap(self.bootstrap, self.members, data.rows, branch(seed, 5))
        return train(self, energy, one, seed=seed, progress=progress, rows=weights)


def _reach(data: Data, sites: Sites, fraction: float) -> list[Tensor | None]:
    """How far adversarial training moves each input, (*) by column; None for what is no number.

    Raises:
        DataError: the data are a loader.
        ModelError: no input is a real number for each row, or the model's own plate draws rows.
    """
    if data.loader is not None:
        raise DataError(
            "Adversarial training moves each input by a share of its range over all rows, and a "
            "DataLoader does not tell that. Pass tensors, and batch_size for minibatches."
        )
    if sites.subsampled:
        raise ModelError(
            f"Adversarial training runs the model on the same rows again, and the plate "
            f'"{sites.plate}" draws others. Leave its subsample_size out, and fit with batch_size.'
        )
    real = [bool(x.ndim) and x.is_floating_point() for x in data.inputs]
    if not any(real):
        raise ModelError(
            f"Adversarial training moves real inputs, and the model takes {data.names[:-1]}, of "
            "which none has a real number for each row. Leave `adversarial` out."
        )
    spans = zip(data.inputs, real, strict=True)
    return [fraction * (x.amax(0) - x.amin(0)) if each else None for x, each in spans]


def against(
    log_likelihood: Callable[..., Tensor], args: Sequence[Any], reach: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """The arguments with every input moved `reach` down the log likelihood's slope."""
    moving = tuple(i for i, each in enumerate(reach) if each is not None)
    slopes = grad(log_likelihood, argnums=moving)(*args)
    moved = list(args)
    for i, slope in zip(moving, slopes, strict=True):
        moved[i] = (args[i] - reach[i] * slope.sign()).detach()
    return tuple(moved)
