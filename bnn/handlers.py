"""The few Pyro effects we need: run at a draw, score a run, capture it, keep parameters apart."""

import copy
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Distribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import transform_to
from torch.func import vmap
from torch.utils._pytree import tree_map

from bnn.errors import ModelError
from bnn.turns import ALONE, PYRO_CHECKS


def is_statement(message: Mapping[str, Any]) -> bool:
    """True at a `pyro.sample` that carries probability: no plate index, factor or deterministic."""
    return (
        message["type"] == "sample"
        and not isinstance(message["fn"], _Subsample)
        and not message["infer"].get("_deterministic")
        and not message["infer"].get("is_auxiliary")
    )


def unvalidated(fn: Any) -> Any:
    """A copy of a distribution, and of the ones inside it, that does not check its arguments.

    Checks branch on values, which `torch.func.vmap` refuses; a distribution built before the fit
    (every `PyroSample` prior) carries its own flag, so the global switch does not reach it.
    """
    if not isinstance(fn, torch.distributions.Distribution):
        return fn
    fn = copy.copy(fn)
    fn._validate_args = False
    for key, inner in vars(fn).items():
        if isinstance(inner, torch.distributions.Distribution):
            setattr(fn, key, unvalidated(inner))
    return fn


class At(Messenger):
    """Runs a program at a draw: the named latent sites take the given values."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values = values
        self.missed = ""  # a latent site that has no value in the draw, and was sampled

    def _pyro_sample(self, message: Any) -> None:
        if message["is_observed"] or not is_statement(message):
            return
        if message["name"] in self.values:
            message["value"] = self.values[message["name"]]
        elif message["value"] is None:  # the program may draw sites of its own
            self.missed = message["name"]


class AtMeans(Messenger):
    """Runs a program with its latent sites at the means of their distributions.

    Args:
        spared: names of sites that are left alone.
    """

    def __init__(self, spared: Collection[str]):
        super().__init__()
        self.spared = spared

    def _pyro_sample(self, message: Any) -> None:
        name = message["name"]
        if message["is_observed"] or not is_statement(message) or name in self.spared:
            return
        try:
            message["value"] = message["fn"].mean
        except NotImplementedError:
            raise ModelError(
                f'The site "{name}" has no mean in closed form ({message["fn"]}), so it cannot '
                'take its mean\'s place. Predict with mode="draws".'
            ) from None


class Rewrite(Messenger):
    """Rewrites seams: deterministic sites take another value, which the program goes on with.

    Attributes:
        met: names of the seams that were rewritten in the last run.
    """

    def __init__(self, seams: Mapping[str, Callable[[Tensor], Tensor]]):
        super().__init__()
        self.seams = seams
        self.met: set[str] = set()

    def __enter__(self) -> "Rewrite":
        self.met = set()
        return super().__enter__()

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self.seams and message["infer"].get("_deterministic"):
            message["value"] = self.seams[message["name"]](message["value"])
            self.met.add(message["name"])


class Score(Messenger):
    """Adds up log densities: `likelihood` over observed sites and factors, `prior` over latents.

    Everything inside the data plate is scaled by rows / size of the plate as the model states it:
    N/B when the model is given a minibatch of B of N rows, and 1 when its own plate subsamples
    (Pyro has scaled by N/B then). `elsewhere` replaces the log density of the latent sites that
    it names: a callable of the site's distribution. `weights`, (row,), counts each row of the data
    plate so many times (a bootstrap). With `by_row` what is observed inside the data plate is kept
    by row too: `rowwise`, (row,), scaled like `likelihood`.
    """

    def __init__(
        self,
        plate: str | None = None,
        rows: int | None = None,
        elsewhere: Mapping[str, Callable[[Distribution], Tensor]] | None = None,
        weights: Tensor | None = None,
        *,
        by_row: bool = False,
    ):
        super().__init__()
        self.plate, self.rows, self.elsewhere = plate, rows, elsewhere or {}
        self.weights, self.by_row = weights, by_row
        self.likelihood: Any = 0.0
        self.rowwise: Any = 0.0
        self.prior: Any = 0.0

    def _pyro_post_sample(self, message: Any) -> None:
        fn = message["fn"]
        if isinstance(fn, _Subsample) or message["infer"].get("_deterministic"):
            return
        if message["name"] in self.elsewhere:
            log_prob = self.elsewhere[message["name"]](fn)
        else:
            log_prob = unvalidated(fn).log_prob(message["value"])
        scale = message["scale"]
        for frame in message["cond_indep_stack"]:
            if frame.name == self.plate and self.rows is not None:
                scale = scale * (self.rows / (frame.full_size or frame.size))
            if frame.name == self.plate and self.weights is not None:
                scale = scale * self.weights.reshape(-1, *[1] * (-1 - frame.dim))
        each = scale_and_mask(log_prob, scale, message["mask"])
        total = each.sum()
        if message["is_observed"]:
            self.likelihood = self.likelihood + total
            for frame in message["cond_indep_stack"] if self.by_row else ():
                if frame.name == self.plate:
                    rows = each.movedim(frame.dim, 0)
                    self.rowwise = self.rowwise + rows.reshape(len(rows), -1).sum(1)
        else:
            self.prior = self.prior + total


class NotFinite(Messenger):
    """Notes the first site whose log density is not finite in a run, as `site`."""

    site: str | None = None

    def _pyro_post_sample(self, message: Any) -> None:
        if self.site is None and is_statement(message):
            log_prob = unvalidated(message["fn"]).log_prob(message["value"])
            if not torch.isfinite(log_prob).all():
                self.site = message["name"]


class Capture(Messenger):
    """Keeps what a run passed through: values of sites, and the distribution of one of them.

    With `sampling=False` the observed site, where it has no value, is not sampled either: a run
    under vmap cannot draw from every distribution, and its caller draws outside.
    """

    def __init__(self, observed: str, *, sampling: bool = True, plate: str | None = None):
        super().__init__()
        self.observed, self.sampling, self.plate = observed, sampling, plate
        self.values: dict[str, Tensor] = {}
        self.local: set[str] = set()  # latent sites met inside the plate
        self.fn: Any = None
        self.value: Any = None
        self.mask: Any = None

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] == self.observed and not self.sampling and message["value"] is None:
            like = next((v for v in vars(message["fn"]).values() if isinstance(v, Tensor)), None)
            device = None if like is None else like.device
            message["value"] = torch.zeros(message["fn"].shape(), device=device)

    def _pyro_post_sample(self, message: Any) -> None:
        if isinstance(message["fn"], _Subsample):
            return
        if message["name"] == self.observed:
            self.fn, self.value, self.mask = message["fn"], message["value"], message["mask"]
            return
        self.values[message["name"]] = message["value"]
        inside = any(frame.name == self.plate for frame in message["cond_indep_stack"])
        if inside and is_statement(message) and not message["is_observed"]:
            self.local.add(message["name"])


@contextmanager
def quiet_pyro() -> Iterator[None]:
    """Pyro for this thread alone, without argument checks (ours come first) or its global store."""
    distribution: Any = torch.distributions.Distribution
    unchecked = dict.fromkeys(PYRO_CHECKS, False)
    with ALONE, pyro.settings.context(**unchecked), pyro.get_param_store().scope():
        before = vars(distribution)["_validate_args"]
        if not isinstance(before, _ChecksElsewhere):
            distribution._validate_args = _ChecksElsewhere(before)
        try:
            yield
        finally:
            distribution._validate_args = before


class _ChecksElsewhere:
    """In place of torch's switch: off in the thread that made it, in others as it was."""

    def __init__(self, checks: bool):
        self.checks, self.thread = checks, get_ident()

    def __get__(self, instance: Any, owner: Any = None) -> bool:
        return self.checks and get_ident() != self.thread


def branch(seed: np.random.SeedSequence, *key: int) -> np.random.SeedSequence:
    """A child in the tree of seeds: the same for the same key, whatever was spawned before."""
    return np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, *key))


def generator(seed: np.random.SeedSequence) -> torch.Generator:
    """A torch generator seeded from the tree."""
    return torch.Generator(torch.get_default_device()).manual_seed(_number(seed))


def _number(seed: np.random.SeedSequence) -> int:
    """64 hashed bits (63 are used): neighbouring seeds and children share no stream."""
    return int(seed.generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def seeded(seed: np.random.SeedSequence) -> Iterator[None]:
    """Seeds every generator a model may draw from; the caller's are as before afterwards."""
    with ALONE, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        python, numpy = random.getstate(), np.random.get_state()
        if torch.accelerator.is_available():
            torch.manual_seed(_number(seed))
        else:  # without one, a note for each kind takes longer than a small prediction
            torch.default_generator.manual_seed(_number(seed))
        entropy = seed.generate_state(4)
        random.seed(entropy.tobytes())
        np.random.seed(entropy)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def generators() -> dict[str, Any]:
    """The state of every generator that a model may draw from, as tensors and numbers."""
    legacy: Any = np.random.get_state()
    kind, keys, place, has, normal = legacy
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(place), int(has), normal],
        "python": [version, torch.tensor(words), gauss is not None, gauss or 0.0],
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_generators(state: Mapping[str, Any]) -> None:
    """Sets them back to what `generators` gave."""
    kind, keys, place, has, normal = state["numpy"]
    version, words, told, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has, normal))
    random.setstate((version, tuple(words.tolist()), gauss if told else None))
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


_SMALL = 2_000_000  # multiplications: below, waking a second thread costs more than it saves


@contextmanager
def threads(work: int) -> Iterator[None]:
    """One torch thread for small work, else the caller's number; that number afterwards.

    On a busy machine two threads that wait for each other at every small operation are tens of
    times slower than one.

    Args:
        work: multiplications in one call, about rows x weights x runs computed together.
    """
    before = torch.get_num_threads()
    try:
        if work < _SMALL:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def singular(error: BaseException | None) -> bool:
    """True where a run ended at a matrix that has no factors: the density there is 0 or rounded."""
    return isinstance(error, RuntimeError) and "linalg." in str(error)


def at_another_draw(run: Callable[[], Any], attempts: int = 100) -> Any:
    """Runs a model at draws of its prior until each matrix of it has factors."""
    for _ in range(attempts - 1):
        try:
            return run()
        except RuntimeError as error:
            if not singular(error):
                raise
    return run()


@contextmanager
def parameters(
    model: Callable[..., Any], args: tuple[Any, ...], values: Mapping[str, Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Gives the trainable tensors of a model (`pyro.param`, `nn.Parameter`) a life of their own.

    Args:
        model: the program that owns them; it is run once on `args` to find them.
        args: its positional arguments.
        values: constrained values to set, by name as in Pyro's parameter store.

    Yields:
        The unconstrained leaf tensors by name, free to be optimised in place. On exit every
        tensor that belongs to the caller holds what it held before.
    """
    store, given = pyro.get_param_store(), values or {}
    with store.scope():
        with poutine.block():
            at_another_draw(lambda: model(*args))
        leaves = dict(store.named_parameters())
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        constraints = store.get_state()["constraints"]
        try:
            with torch.no_grad():
                for name in leaves.keys() & given.keys():
                    free: Any = transform_to(constraints[name]).inv(given[name])
                    leaves[name].copy_(free)
            yield leaves
        finally:
            with torch.no_grad():
                for name, leaf in leaves.items():
                    leaf.copy_(before[name])


def constrained_parameters() -> dict[str, Tensor]:
    """Present values in Pyro's parameter store, detached, in the space the user named."""
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def over_draws(
    function: Callable[[dict[str, Tensor]], Any], draws: Mapping[str, Tensor], count: int
) -> Any:
    """A function of one draw at many: lifted by vmap where the program allows it, else looped.

    Args:
        function: of the values of the sites at one draw; returns a tensor or a dict of tensors.
        draws: (draw, *site) each; empty for a program without sites.
        count: number of draws.

    Returns:
        What the function returns, with the draw axis in front.
    """
    try:
        # the numbers give vmap an axis where there are no draws
        lifted = vmap(lambda draw, number: function(draw), randomness="different")
        return lifted(dict(draws), torch.arange(count))
    except Exception:  # not every program can be lifted; the loop tells what else is wrong
        pass
    runs = [function({k: v[i] for k, v in draws.items()}) for i in range(count)]
    return tree_map(lambda *each: torch.stack(each), *runs)
