"""GFlowOut: masks of hidden units, drawn from their posterior by generator networks.

A mask z multiplies the units of the seams that the model announces (`hidden.0`, ...). The weights W
are a mode, found under the masks; the masks are random. `conditional=False` (ID-GFlowOut) has one
mask for all rows, `conditional=True` one for each row:

    q(z)       near  p(z | data, W)  ~  p(data | z, W)^power p(z),           p(z) of prior_keep
    q(z | x, y) near p(z | x, y, W)  ~  p(y | x, z, W)^power p(z | x),       p(z | x) learned

by a squared balance, whose minimum is 0 and there only, whatever law z is drawn from:

    trajectory_balance   E[(log q(z) + log Z - log reward(z))^2],  log Z learned, of (x, y) a net
    log_variance         Var over masks of log q(z) - log reward(z)

Its first mask is drawn from q, the others from q at `temperature`. At the first the weights ascend
log p(data | z, W) + log p(W), and the learned prior log p(z | x), which ends as the mean of
q(z | x, y) over y. Rewards are in nats: of all rows for a mask that they share (on a minibatch the
likelihood counts N/B), else of the row. `log_evidence` is log E_q[reward / q], by importance
weights, summed over rows where these have masks of their own. It is that of masks at the fitted
W, which has no evidence of its own in it: compare it between fits of this method.

Predictions draw z from q, or from p(z | x): the label is not known then. The published code's log
probability is the same for z = 0 and z = 1, its ID rewards are of one row, or hold no likelihood,
and its evidence is a scalar where it differs by row: none of it is followed.

When not to use it: to beat random masks on accuracy, which the authors' own numbers do not show; on
many rows without `conditional`, where the posterior of one mask is a point that is hard to find;
with few labels an x, where the learned prior may collapse to one mask of each x.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from bnn.data import Data
from bnn.diagnostics import Finding
from bnn.errors import ApproximationWarning, outside
from bnn.handlers import branch, constrained_parameters, generator, parameters, seeded
from bnn.inference._energy import Energy
from bnn.inference._flow import Balance, Flow, assess, findings, program
from bnn.inference._mask_generators import Flat, Labels
from bnn.inference._optimise import Optimised, maximise
from bnn.inference._unit_masks import Masking, check_keep, find_places, require_rows
from bnn.method import Model, Tensors, check_count, check_positive
from bnn.posterior import Posterior
from bnn.sites import Sites, require_continuous


@dataclass(frozen=True, kw_only=True)
class GFlowOut(Optimised):
    """Masks of hidden units from learned generators; the weights are a point.

    Attributes:
        conditional: True gives each row masks of its own, which see its activations; they are in
            `Prediction.local["hidden.0.mask"]`. False: one mask for all rows, a global site.
        objective: "log_variance", or "trajectory_balance", for masks of a fixed net.
        prior_keep: prior probability of keeping a unit, one number or by seam; where the learned
            prior of `conditional` starts. Take .9 for a deep net: from .5 it may never learn.
        seams: what is masked; None takes every "hidden. ..." that the model announces.
        axis: of the units in a seam, one number or by seam; None takes the last of 2 or 3 axes,
            (row, unit) or (row, token, feature), and axis 1 of more, (row, channel, ...).
        rescale: multiply what is kept by units / kept units, as the paper's MLP does.
        power: of the likelihood in the reward. 1 is the posterior of the masks; less is warned of.
        particles: masks a step, the first drawn from q itself. Log variance takes 2 or more.
        temperature: of the sigmoids that the others are drawn from.
        blocks: groups in which a seam's units are drawn, one after the other; within a group they
            are independent given those before. None: each alone up to 8 units, else all in one, as
            in the paper. More groups come nearer to the posterior, and a step costs more.
        width: of the generators' state.
        generator_learning_rate: Adam's for the generators. It falls with `learning_rate`.
        log_z_learning_rate: for the constant in log Z.
        draws: masks that the posterior keeps.

    References:
        Liu et al. (2023), GFlowOut: dropout with generative flow networks. Malkin et al. (2022),
        Trajectory balance. Richter et al. (2020), VarGrad: a low-variance gradient estimator for
        variational inference.

    Example:
        >>> GFlowOut(prior_keep={"hidden.0": 0.8}).objective
        'log_variance'
    """

    adds_sites: ClassVar[bool] = True

    conditional: bool = True
    objective: str = "log_variance"
    prior_keep: float | Mapping[str, float] = 0.5
    seams: Sequence[str] | None = None
    axis: int | Mapping[str, int] | None = None
    rescale: bool = False
    power: float = 1.0
    particles: int = 2
    temperature: float = 2.0
    blocks: int | None = None
    width: int = 32
    generator_learning_rate: float = 0.02
    log_z_learning_rate: float = 0.1
    draws: int = 1_000

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = {} if self.blocks is None else {"blocks": self.blocks}
        check_count("GFlowOut", particles=self.particles, width=self.width, **blocks)
        check_count("GFlowOut", draws=self.draws)
        rates = ("generator_learning_rate", "log_z_learning_rate", "power", "temperature")
        check_positive("GFlowOut", **{name: getattr(self, name) for name in rates})
        check_keep("GFlowOut", self.prior_keep)
        if isinstance(self.seams, str):
            raise TypeError(f"GFlowOut(seams={self.seams!r}): pass a list of names.")
        if self.seams is not None:  # as a file gives them back
            object.__setattr__(self, "seams", tuple(self.seams))
        if self.objective not in ("log_variance", "trajectory_balance"):
            known = '"log_variance" and "trajectory_balance"'
            raise ValueError(f"GFlowOut(objective={self.objective!r}): known are {known}.")
        if self.objective == "log_variance" and self.particles < 2:
            raise ValueError(
                "GFlowOut(particles=1): log variance compares masks of one row. Pass particles=2, "
                'or objective="trajectory_balance".'
            )

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
        require_continuous(sites, "GFlowOut")
        batched = self.batch_size is not None or data.loader is not None
        require_rows(sites, "GFlowOut", self.conditional, batched)
        if self.power != 1:
            told = f"GFlowOut(power={self.power:g}) draws masks from p(z) p(data | z)^power, which "
            told += "is not their posterior. Leave power=1."
            warnings.warn(told, ApproximationWarning, stacklevel=outside())
        energy = Energy(model, data, sites)
        mode = energy.initial(1, branch(seed, 0))[0]
        places = find_places(energy, self._masking, "GFlowOut", branch(seed, 1))
        labels = Labels(energy, branch(seed, 2)) if self.conditional else None
        flow = Flow(energy, places, self._masking, labels)
        balanced = self.objective == "trajectory_balance"
        with seeded(branch(seed, 3)):
            start = flow.start(self.width, mode, self.power if balanced else None)
        rates = dict.fromkeys(start, self.generator_learning_rate)
        flat = Flat(start, rates | {"log_z.bias": self.log_z_learning_rate}, self.learning_rate)
        leaves = {"masks": flat.start} | ({"mode": mode} if len(mode) else {})
        with parameters(model, data.tensors) as leftovers, seeded(branch(seed, 4)):
            (history,) = maximise(
                Balance(flow, flat, mode, self.power, self.temperature, balanced),
                leaves | leftovers,
                data.batches(self.batch_size, generator(branch(seed, 5, 0))),
                self,
                label="objective",
                what="GFlowOut",
                progress=progress,
                noise=lambda batch: flow.noise(self.particles, len(batch[-1])),
                epoch=data.epoch(self.batch_size),
                seed=None if leftovers else branch(seed, 6),
            )
            with torch.no_grad():
                fitted = {name: value.clone() for name, value in flat(leaves["masks"]).items()}
                scores = flow.scores(mode, data.once(self.batch_size), fitted, self.draws)
                values = energy.values(mode).items()
                draws = {k: v.expand(1, self.draws, *v.shape) for k, v in values}
                draws |= flow.draws(fitted, self.draws)
            params = constrained_parameters()
        log_evidence, found = assess(*scores, self.power)
        return Posterior(
            model=model,
            method=self,
            data=data,
            sites=sites,
            draws=draws,
            params=params | fitted | found,
            history=history,
            log_evidence=log_evidence if self.power == 1 else None,
            count=(1, self.draws),
        )

    def program(self, model: Model, params: Tensors) -> Model:
        """The model under masks: global sites, or sites of a row that the learned prior draws."""
        return program(model, params, self._masking)

    @property
    def _masking(self) -> Masking:
        where = self.seams, self.axis, self.blocks
        return Masking(self.conditional, self.prior_keep, self.rescale, *where)

    def findings(self, posterior: Posterior) -> list[Finding]:
        """How far q is from balance, and whether it has collapsed."""
        return findings(posterior.params)

    at_fit = findings
