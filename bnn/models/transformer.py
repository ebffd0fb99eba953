"""Transformers: tokens or patches that attend to each other, with seams for their attention."""

from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bnn.models._attention import (
    Attention,
    AttentionPrior,
    ContextualAttention,
    UniformAttention,
)
from bnn.models.likelihoods import Categorical
from bnn.models.nets import Supervised, supervised
from bnn.models.priors import Prior
from bnn.models.weights import sample_weights

Positions = Literal["learned", "sinusoidal"]


class Transformer(nn.Module):
    """An encoder of tokens: pre-norm blocks of attention and a two-layer net, then a linear head.

    It announces, beside the seams of its attention ("attention.0.scores", ...; see `Attention`),
    what each block gives: "hidden.0", "hidden.1", ..., (row, token, width). Outside a Pyro model
    they are not announced to anyone, and the net is an ordinary module.

    Args:
        tokens: places in a row; shorter rows are padded.
        outputs: of the head.
        vocabulary: number of token ids 0, 1, ..., where x holds ids, (row, token).
        features: numbers that a token has, where x holds those, (row, token, feature).
        width: of a token inside the net, a multiple of `heads`.
        heads: of each attention.
        layers: blocks.
        causal: True lets a token see itself and the tokens before it only.
        padding: id of the tokens that only fill a row up, or the value that all their features
            have. None: every token counts.
        positions: "learned" for each place, or "sinusoidal".
        dropout: rate of `nn.Dropout` after each attention and each two-layer net; attention weights
            themselves are not dropped.
        attention: "softmax", or a prior over attention weights.
        pooled: True gives an output for the row, from the mean of its tokens; False one for each
            token.

    References:
        Vaswani et al. (2017), Attention is all you need. Xiong et al. (2020), On layer
        normalization in the transformer architecture (pre-norm).

    Example:
        >>> net = Transformer(6, 2, vocabulary=10, layers=1)
        >>> net(torch.zeros(3, 6, dtype=torch.long)).shape
        torch.Size([3, 2])
    """

    past: Tensor
    waves: Tensor

    def __init__(
        self,
        tokens: int,
        outputs: int,
        *,
        vocabulary: int | None = None,
        features: int | None = None,
        width: int = 32,
        heads: int = 4,
        layers: int = 2,
        causal: bool = False,
        padding: float | None = None,
        positions: Positions = "learned",
        dropout: float = 0.0,
        attention: AttentionPrior = "softmax",
        pooled: bool = True,
    ):
        super().__init__()
        _check(tokens, outputs, vocabulary, features, width, heads, layers)
        _check_choices(positions, dropout, attention)
        self.ids, self.padding, self.pooled = vocabulary is not None, padding, pooled
        if vocabulary is not None:
            self.embedding: nn.Module = nn.Embedding(vocabulary, width)
        else:
            self.embedding = nn.Linear(features or 0, width)
        self.place = nn.Embedding(tokens, width) if positions == "learned" else None
        if self.place is None:
            self.register_buffer("waves", _waves(tokens, width), persistent=False)
        past = torch.ones(tokens, tokens, dtype=torch.bool)
        self.register_buffer("past", past.tril() if causal else past, persistent=False)
        self.blocks = nn.ModuleList(
            Block(width, heads, number, dropout, attention) for number in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Ids (row, token) or features (row, token, feature) to (row, output).

        Or to (row, token, output), where the net is not pooled.

        Raises:
            ValueError: x has other axes, or another number of tokens.
        """
        self._check_places(x)
        real = self.real(x)  # (row, token)
        h = self.embedding(x.long() if self.ids else x)  # (row, token, width)
        h = h + (self.waves if self.place is None else self.place.weight)
        both = real[:, None, :, None] & real[:, None, None, :]  # padding neither sees nor is seen
        seen = self.past & both  # (row, 1, query, key)
        for number, block in enumerate(self.blocks):
            h = block(h, seen)
            h = pyro.deterministic(f"hidden.{number}", h, event_dim=max(h.ndim - 1, 1))
        h = self.norm(h)
        if self.pooled:
            share = real / real.sum(-1, keepdim=True).clamp(min=1)
            h = (h * share[..., None].to(h)).sum(-2)  # (row, width)
        return self.head(h)

    def _check_places(self, x: Tensor) -> None:
        axes, tokens = "token" if self.ids else "token, feature", len(self.past)
        if x.ndim != (2 if self.ids else 3) or x.shape[1] != tokens:
            raise ValueError(
                f"A transformer of {tokens} tokens takes x (row, {axes}), found shape "
                f"{tuple(x.shape)}. Pad rows to {tokens} tokens, or build it with tokens=."
            )

    def real(self, x: Tensor) -> Tensor:
        """True for tokens that are no padding, (row, token)."""
        if self.padding is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return x != self.padding if self.ids else (x != self.padding).any(-1)


class Block(nn.Module):
    """h + attention(norm h), then h + net(norm h)."""

    def __init__(
        self, width: int, heads: int, number: int, dropout: float, attention: AttentionPrior
    ):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = Attention(width, heads, number, attention)
        self.net = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, h: Tensor, seen: Tensor) -> Tensor:
        """Tokens (row, token, width) to the same shape."""
        h = h + self.drop(self.attention(self.norms[0](h), seen))
        return h + self.drop(self.net(self.norms[1](h)))


class Patches(nn.Module):
    """A transformer of the patches of an image, read in rows from the top left."""

    def __init__(self, image: tuple[int, int], patch: int, transformer: Transformer):
        super().__init__()
        self.image, self.patch, self.transformer = tuple(image), patch, transformer

    def forward(self, x: Tensor) -> Tensor:
        """Images (row, height, width) or (row, channel, height, width) to (row, output).

        Raises:
            ValueError: they are of another height or width.
        """
        if x.shape[-2:] != self.image:
            raise ValueError(
                f"The patches are of images (height={self.image[0]}, width={self.image[1]}), and x "
                f"has shape {tuple(x.shape)}. Resize the images, or build the model for theirs."
            )
        x = x if x.ndim > 3 else x[..., None, :, :]
        x = x.unflatten(-1, (-1, self.patch)).unflatten(-3, (-1, self.patch))
        x = x.permute(0, 2, 4, 1, 3, 5)  # (row, down, across, channel, patch, patch)
        return self.transformer(x.flatten(3).flatten(1, 2))


@dataclass(frozen=True, eq=False)
class Tagging:
    """The Pyro model of labels of tokens; built by `transformer_tagging`.

    Sites: one for each parameter tensor, and in the plate "data" the seams of the net, "f" (row,
    token, class), the logits, and "y" (row, token), in which padding does not count.
    """

    net: Transformer
    prior: Prior | None = None

    def __call__(self, x: Tensor, y: Tensor | None = None) -> None:
        """States the model of y (row, token) given x (row, token) or (row, token, feature)."""
        net = sample_weights(self.net, self.prior)
        with pyro.plate("data", len(x), device=str(x.device)):
            f = pyro.deterministic("f", net(x), event_dim=2)
            fn = dist.Categorical(logits=f).mask(self.net.real(x))
            pyro.sample("y", fn.to_event(1), obs=y)


def transformer_classification(
    tokens: int, classes: int, *, prior: Prior | None = None, **settings: Any
) -> Supervised:
    """A transformer that predicts a label of a row of tokens, from the mean of its tokens.

    Args:
        tokens: places in a row; shorter rows are padded.
        classes: number of labels 0..classes-1.
        prior: of the weights; default `priors.Normal()`.
        **settings: of `Transformer`: `vocabulary=` or `features=`, and width, heads, layers,
            causal, padding, positions, dropout, attention.

    Returns:
        The model `model(x, y=None)`, y (row,).

    Example:
        >>> model = transformer_classification(6, 2, vocabulary=10, padding=0, layers=1)
        >>> model.net.head
        Linear(in_features=32, out_features=2, bias=True)
    """
    return supervised(Transformer(tokens, classes, **settings), Categorical(classes), prior)


def transformer_tagging(
    tokens: int, classes: int, *, prior: Prior | None = None, **settings: Any
) -> Tagging:
    """A transformer that predicts a label of each token; labels of padding do not count.

    Args:
        tokens: places in a row; shorter rows are padded, their labels with any class.
        classes: number of labels 0..classes-1.
        prior: of the weights; default `priors.Normal()`.
        **settings: as in `transformer_classification`.

    Returns:
        The model `model(x, y=None)`, y (row, token).

    Example:
        >>> model = transformer_tagging(6, 3, vocabulary=10, padding=0, layers=1)
        >>> model.net(torch.ones(2, 6, dtype=torch.long)).shape  # row, token, label
        torch.Size([2, 6, 3])
    """
    Categorical(classes)  # its check
    return Tagging(Transformer(tokens, classes, pooled=False, **settings), prior)


def vit(
    image: tuple[int, int],
    classes: int,
    *,
    patch: int = 2,
    channels: int = 1,
    prior: Prior | None = None,
    **settings: Any,
) -> Supervised:
    """A vision transformer: an image is cut into patches, and each patch is a token.

    Args:
        image: (height, width), multiples of the patch.
        classes: number of labels 0..classes-1.
        patch: pixels along each side of a patch.
        channels: of x, (row, channel, height, width); with 1 channel x may be (row, height, width).
        prior: of the weights; default `priors.Normal()`.
        **settings: of `Transformer`: width, heads, layers, positions, dropout, attention.

    Returns:
        The model `model(x, y=None)`, y (row,).

    Raises:
        ValueError: patches do not tile the image.

    References:
        Dosovitskiy et al. (2021), An image is worth 16x16 words; the label is read off the mean of
        the patches here, not off a token of its own.

    Example:
        >>> model = vit((8, 8), 10, patch=4, layers=1)
        >>> model.net(torch.zeros(2, 8, 8)).shape
        torch.Size([2, 10])
    """
    height, width = image
    if patch < 1 or height % patch or width % patch or not height or not width:
        raise ValueError(
            f"vit(image={image!r}, patch={patch!r}): patches of {patch} pixels a side do not tile "
            "the image. Pass a divisor of its height and width."
        )
    tokens = (height // patch) * (width // patch)
    inner = Transformer(tokens, classes, features=channels * patch**2, **settings)
    return supervised(Patches(image, patch, inner), Categorical(classes), prior)


def _waves(tokens: int, width: int) -> Tensor:
    """Sines and cosines of the place at falling frequencies, (token, width)."""
    frequency = 10_000 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(tokens)[:, None] * frequency  # (token, half)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


def _check(
    tokens: int,
    outputs: int,
    vocabulary: int | None,
    features: int | None,
    width: int,
    heads: int,
    layers: int,
) -> None:
    if (vocabulary is None) == (features is None):
        raise ValueError(
            f"Transformer(vocabulary={vocabulary!r}, features={features!r}): pass one of them: "
            "vocabulary for token ids, features for tokens that are numbers."
        )
    counts = {
        "tokens": tokens, "outputs": outputs, "width": width, "heads": heads, "layers": layers,
        "vocabulary": 1 if vocabulary is None else vocabulary,
        "features": 1 if features is None else features,
    }  # fmt: skip
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"Transformer({name}={count!r}): pass a whole number of at least 1.")
    if width % heads:
        raise ValueError(
            f"Transformer(width={width}, heads={heads}): every head takes width / heads of a "
            "token's numbers. Pass a width that is a multiple of heads."
        )


def _check_choices(positions: Any, dropout: Any, attention: Any) -> None:
    if positions not in ("learned", "sinusoidal"):
        raise ValueError(f'positions is {positions!r}. Pass "learned" or "sinusoidal".')
    if isinstance(dropout, bool) or not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise ValueError(f"dropout is {dropout!r}. Pass a probability of dropping, in [0, 1).")
    if attention != "softmax" and not isinstance(attention, UniformAttention | ContextualAttention):
        raise ValueError(
            f'attention is {attention!r}. Pass "softmax", priors.UniformAttention(), or '
            "priors.ContextualAttention()."
        )
