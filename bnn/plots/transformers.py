"""Attention and saliency of one row, with their uncertainty."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bnn import arguments
from bnn.errors import DataError, ModelError
from bnn.fitting import seed_sequence
from bnn.handlers import At, Capture, branch, parameters, quiet_pyro, seeded
from bnn.observations import innermost
from bnn.plots._style import EPISTEMIC
from bnn.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNCLEAR = "#999999"


def attention(
    posterior: Posterior,
    x: Any,
    *,
    tokens: Sequence[str] | None = None,
    row: int = 0,
    site: str = "attention.0.weights",
    draws: int | None = None,
    seed: int = 0,
) -> "np.ndarray[Any, Any]":
    """Mean attention of each head in one row, and its standard deviation over draws.

    Of any method: where attention is deterministic given the weights, it spreads as they do.

    Args:
        posterior: of a model that announces its attention.
        x: the model's input, (row, *), or a tuple where it takes several.
        tokens: what to call the places; default their numbers.
        row: which to draw.
        site: name of the weights, (row, head, query, key) or (row, query, key).
        draws: of each chain, evenly spread; None uses all.
        seed: of the draws of attention.

    Returns:
        The axes, (2, head): means above, standard deviations below.

    Raises:
        ModelError: there is no such site.
        DataError: no such row; another number of tokens.

    Example:
        >>> import bnn, warnings
        >>> model = bnn.models.transformer_classification(4, 2, vocabulary=5, width=8, heads=2)
        >>> x = torch.randint(5, (20, 4), generator=torch.Generator().manual_seed(0))
        >>> with warnings.catch_warnings(action="ignore"):  # so few steps do not suffice
        ...     fitted = bnn.fit(model, x, x[:, 0] % 2, method=bnn.SVI(steps=10, draws=5))
        >>> attention(fitted, x).shape  # mean and deviation of each head
        (2, 2)
    """
    from matplotlib import pyplot

    inputs = _row(x, row)
    scores = site.removesuffix("weights") + "scores"
    seams = [name for name in (site, scores) if name in posterior.sites.seams]
    local = posterior.predict(*inputs, draws=draws, seed=seed, seams=seams).local
    if site not in local:
        raise ModelError(
            f'The model announces no attention "{site}"; a row has '
            f"{', '.join(sorted(local)) or 'no site'}. Announce it inside the data plate."
        )
    a = local[site][:, :, 0].flatten(0, 1)  # (draw, head, query, key)
    if scores in local:  # a site of the model is stated over hidden keys too
        a = a * (local[scores][:, :, 0].flatten(0, 1) > -torch.inf)
        a = a / a.sum(-1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
    a = a[:, None] if a.ndim == 3 else a
    if a.ndim != 4:
        raise DataError(f'"{site}" has axes {tuple(a.shape[1:])} a row, not (head, query, key).')
    mean, sd = a.mean(0).cpu().numpy(), a.std(0, correction=0).cpu().numpy()
    names = _names(tokens, a.shape[-1])
    heads = a.shape[1]
    side = max(2.1, 0.19 * len(names))  # inches: a name at each place
    size = (1.2 + side * heads, 0.4 + 2 * side)
    figure, grid = pyplot.subplots(2, heads, figsize=size, layout="constrained", squeeze=False)
    shown = ((mean, "mean weight", 1.0), (sd, "sd over draws", max(float(sd.max()), 1e-3)))
    for axes, (values, told, top) in zip(grid, shown, strict=True):
        images = [
            ax.imshow(v, vmin=0, vmax=top, cmap="cividis")
            for ax, v in zip(axes, values, strict=True)
        ]
        for head, ax in enumerate(axes):
            ax.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
            ax.set_yticks(range(values.shape[1]))
            ax.set_yticklabels(names if len(names) == values.shape[1] and not head else [])
            ax.set_xlabel("key")
        axes[0].set_ylabel("query")
        figure.colorbar(images[0], ax=list(axes), label=told)
    for head, ax in enumerate(grid[0]):
        ax.set_title(f"head {head}", fontsize="medium")
    return grid


def saliency(
    posterior: Posterior,
    x: Any,
    *,
    tokens: Sequence[str] | None = None,
    row: int = 0,
    level: float = 0.9,
    draws: int | None = 100,
    seed: int = 0,
    ax: "Axes | None" = None,
) -> "Axes":
    """Input times gradient of the predicted class's log odds, with its interval over draws.

    To first order, what each token adds to log P / (1 - P), which does not flatten where P is near
    1 as P does. The gradient is at the input; of token ids, at what their embedding gives. The
    features of a token are summed. For images see `saliency_map`.

    Args:
        posterior: of a model of labels, one a row.
        x: the model's input, (row, token), (row, token, feature) or (row, column), or a tuple
            where it takes several: the first is looked at.
        tokens: what to call the places; default their numbers.
        row: which to draw.
        level: of the central credible interval.
        draws: of each chain, evenly spread; None uses all.
        seed: of the draws of sites that belong to the row.
        ax: where to draw; default a new figure.

    Raises:
        DataError: y is no label, or one a token; no such row; another number of tokens.
        ModelError: the output does not depend on the input by a gradient.

    Example:
        >>> import bnn, warnings
        >>> model, x = bnn.models.mlp_classification(3, 2, hidden=(4,)), torch.randn(20, 3)
        >>> with warnings.catch_warnings(action="ignore"):  # so few steps do not suffice
        ...     fitted = bnn.fit(model, x, (x[:, 0] > 0).long(), method=bnn.SVI(steps=10, draws=5))
        >>> ax = saliency(fitted, x, tokens=["age", "weight", "height"])
    """
    from matplotlib import pyplot

    ends = _ends(level)
    values, label = salience(posterior, x, row=row, draws=draws, seed=seed)
    names = _names(tokens, values.shape[1])
    lower, upper = np.quantile(values, ends, axis=0)
    mean, place = values.mean(0), np.arange(len(names))
    clear = (lower > 0) | (upper < 0)
    if ax is None:
        size = (5.0, 1.2 + 0.28 * len(names))
        ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    ax.axvline(0, color="#444444", lw=0.8)
    for told, some, colour in ((f"{100 * level:.4g}% interval leaves out 0", clear, EPISTEMIC),
                               ("holds 0", ~clear, _UNCLEAR)):  # fmt: skip
        ax.hlines(place[some], lower[some], upper[some], color=colour, lw=2, label=told)
        ax.scatter(mean[some], place[some], color=colour, s=22, zorder=3)
    ax.set_yticks(place, names)
    ax.set(xlabel=f"input x gradient of the log odds of y = {label}", ylim=(len(names) - 0.5, -0.5))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.75 / len(names) - 0.1), "ncols": 2}
    ax.legend(frameon=False, fontsize="small", **below)
    return ax


def saliency_map(
    posterior: Posterior,
    x: Any,
    *,
    patch: int = 1,
    row: int = 0,
    level: float = 0.9,
    draws: int | None = 100,
    seed: int = 0,
) -> "np.ndarray[Any, Any]":
    """Saliency of an image: what each patch adds to the log odds of the predicted class.

    As `saliency`, with a patch for a token: products of pixel and gradient, summed over a patch and
    its channels. A pixel of 0 adds nothing, whatever its gradient. A cross marks patches whose
    interval holds 0. Of several channels the picture shows the mean.

    Args:
        posterior: of a model of labels, one a row.
        x: images (row, height, width) or (row, channel, height, width), or a tuple where the model
            takes several inputs: the first is looked at.
        patch: pixels along each side of a patch, as in `bnn.models.vit`; 1 for single pixels.
        row: which to draw.
        level: of the central credible interval of each patch.
        draws: of each chain, evenly spread; None uses all.
        seed: of the draws of sites that belong to the row.

    Returns:
        The axes, (4,): the image, the interval's lower end, the mean, the upper end.

    Raises:
        DataError: x is no image; patches do not tile it; what `saliency` refuses.
        ModelError: the output does not depend on the input by a gradient.

    Example:
        >>> import bnn, warnings
        >>> model, x = bnn.models.vit((4, 4), 2, width=8, heads=1, layers=1), torch.randn(20, 4, 4)
        >>> with warnings.catch_warnings(action="ignore"):  # so few steps do not suffice
        ...     fitted = bnn.fit(model, x, (x[:, 0, 0] > 0).long(), method=bnn.MAP(steps=5))
        >>> saliency_map(fitted, x, patch=2).shape  # image, lower end, mean, upper end
        (4,)
    """
    from matplotlib import pyplot

    ends = _ends(level)
    values, label, image = patches(posterior, x, patch=patch, row=row, draws=draws, seed=seed)
    lower, upper = np.quantile(values, ends, axis=0)
    unclear = (lower <= 0) & (upper >= 0)
    top = max(float(np.abs([lower, upper]).max()), 1e-9)
    high, wide = image.shape
    side = min(2.0, 5.0 * wide / high)  # inches, of what may be 9.6 wide and some 6 high
    size = (9.6, 0.9 + max(side * high / wide, 1.2))
    figure, axes = pyplot.subplots(1, 4, figsize=size, layout="constrained")
    axes[0].imshow(image, cmap="gray")
    maps = ((f"{ends[0]:.3g} quantile", lower), ("mean", values.mean(0)),
            (f"{ends[1]:.3g} quantile", upper))  # fmt: skip
    extent = (-0.5, wide - 0.5, high - 0.5, -0.5)
    like = {"vmin": -top, "vmax": top, "cmap": "PuOr", "extent": extent}
    shown = [ax.imshow(each, **like) for ax, (_, each) in zip(axes[1:], maps, strict=True)]
    for ax, (told, _) in zip(axes[1:], maps, strict=True):
        ax.set_title(told, fontsize="medium")
        ax.set(xticks=[], yticks=[])
    axes[0].set_title("image", fontsize="medium")
    axes[0].set(xlabel="pixel", ylabel="pixel")
    down, across = ((np.nonzero(unclear)[i] + 0.5) * patch - 0.5 for i in range(2))
    told, points = f"{100 * level:.4g}% interval holds 0", 72 * side * patch / wide
    cross = {"marker": "x", "color": "#444444", "s": min(18.0, (0.4 * points) ** 2)}
    axes[2].scatter(across, down, **cross, lw=min(1.0, 0.1 * points), label=told)
    axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False, fontsize="small")
    figure.colorbar(
        shown[0], ax=list(axes), label=f"input x gradient of the\nlog odds of y = {label}"
    )
    return axes


def patches(
    posterior: Posterior,
    x: Any,
    *,
    patch: int = 1,
    row: int = 0,
    draws: int | None = 100,
    seed: int = 0,
) -> "tuple[np.ndarray[Any, Any], int, np.ndarray[Any, Any]]":
    """What `saliency_map` draws: (draw, down, across), the predicted class, the image."""
    first = arguments.check_inputs(_row(x, row), posterior.data)[0]
    if first.ndim not in (3, 4):
        raise DataError(
            "plots.saliency_map is of images, (row, height, width) or (row, channel, height, "
            f"width), and a row of x has shape {tuple(first.shape[1:])}. For tokens and columns "
            "use plots.saliency."
        )
    if not first.is_floating_point():
        raise DataError(
            f"The pixels of x are whole numbers ({first.dtype}), as they were in the fit, and have "
            "no gradient. Fit the model to x as floats."
        )
    high, wide = first.shape[-2:]
    if not isinstance(patch, int | np.integer) or patch < 1 or high % patch or wide % patch:
        raise DataError(
            f"patch is {patch!r}, and patches of that many pixels a side do not tile an image of "
            f"(height={high}, width={wide}). Pass a divisor of both."
        )
    each, label = _products(posterior, x, row, draws, seed)
    each = each.reshape(len(each), -1, high // patch, patch, wide // patch, patch)
    image = first[0].reshape(-1, high, wide).mean(0)
    return each.sum((1, 3, 5)).cpu().numpy(), label, image.cpu().numpy()


def salience(
    posterior: Posterior, x: Any, *, row: int = 0, draws: int | None = 100, seed: int = 0
) -> "tuple[np.ndarray[Any, Any], int]":
    """What `saliency` draws: (draw, token), and the predicted class."""
    each, label = _products(posterior, x, row, draws, seed)
    return (each.flatten(2).sum(2) if each.ndim > 2 else each).cpu().numpy(), label


def _products(
    posterior: Posterior, x: Any, row: int, draws: int | None, seed: int
) -> tuple[Tensor, int]:
    """Input times gradient of one row, (draw, *), and the predicted class."""
    inputs = arguments.check_inputs(_row(x, row), posterior.data)
    have = posterior.shape[1]
    count = have if draws is None else min(draws, have)
    probs = posterior.predict(*inputs, draws=count, seed=seed).probs
    if probs is None or probs.ndim != 2:
        raise DataError("Saliency is of a label, one a row. Pass the posterior of such a model.")
    label = int(probs[0].argmax())
    keep = torch.linspace(0, have - 1, count).round().long()
    globals_ = set(posterior.draws) - set(posterior.sites.locals)
    pooled = {k: v[:, keep].flatten(0, 1) for k, v in posterior.draws.items() if k in globals_}
    found = []
    fitted = parameters(posterior.model, (*inputs, None), posterior.params)
    with quiet_pyro(), fitted, torch.enable_grad():
        for i in range(count * posterior.shape[0]):
            with seeded(branch(seed_sequence(seed), 3, i)):
                draw = {k: v[i] for k, v in pooled.items()}
                found.append(_one(posterior, draw, inputs, label))
    return torch.stack(found), label


def _one(
    posterior: Posterior, draw: dict[str, Tensor], inputs: tuple[Tensor, ...], label: int
) -> Tensor:
    """Input times gradient at one draw, of one row, (*)."""
    first, *rest = inputs
    embedded = _Embedded(first)
    if first.is_floating_point():
        first = first.clone().requires_grad_()
    with embedded, Capture(posterior.sites.observed, sampling=False) as capture, At(draw):
        posterior.program(first, *rest, None)
    at = first if first.requires_grad else embedded.out
    logits = innermost(capture.fn).logits.reshape(-1)
    if len(logits) == 1:  # a Bernoulli's
        logits = torch.stack([torch.zeros_like(logits[0]), logits[0]])
    others = torch.cat([logits[:label], logits[label + 1 :]])
    odds = logits[label] - torch.logsumexp(others, 0)
    slope = None
    if at is not None and odds.requires_grad:
        (slope,) = torch.autograd.grad(odds, at, allow_unused=True)
    if at is None or slope is None:
        raise ModelError(
            "Saliency finds no gradient of the output in the input: it takes real numbers, "
            "or token ids that go through torch's embedding."
        )
    return (at * slope).detach()[0]


class _Embedded(TorchFunctionMode):
    """Cuts the graph where token ids are embedded, so that a gradient can be taken there."""

    def __init__(self, ids: Tensor):
        super().__init__()
        self.ids = ids
        self.out: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.embedding and self.out is None:
            if args[0].shape == self.ids.shape and bool((args[0] == self.ids).all()):
                self.out = out = out.detach().requires_grad_()
        return out


def _ends(level: float) -> list[float]:
    """Probabilities at the ends of a central interval."""
    if not 0 < level < 1:
        raise DataError(f"level is {level!r}. Pass a probability in (0, 1), such as 0.9.")
    return [(1 - level) / 2, (1 + level) / 2]


def _row(x: Any, row: int) -> tuple[Any, ...]:
    """One row of each input; an input that is a single number belongs to every row."""
    inputs = x if isinstance(x, tuple) else (x,)
    lengths = [len(each) for each in inputs if np.ndim(each)]
    if len(set(lengths)) != 1:
        raise DataError(f"The inputs in x have {lengths} rows. Pass the same rows of each.")
    rows = lengths[0]
    if not -rows <= row < rows:
        raise DataError(f"row is {row}, and x has {rows} rows.")
    first = row % rows
    return tuple(each[first : first + 1] if np.ndim(each) else each for each in inputs)


def _names(tokens: Sequence[str] | None, count: int) -> list[str]:
    if tokens is None:
        return [str(i) for i in range(count)]
    if len(tokens) != count:
        raise DataError(f"tokens has {len(tokens)} names and a row has {count} places.")
    return [str(token) for token in tokens]
