"""The scale of activations by statistics that a few huge values do not move."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# A token is massive when its norm exceeds the median by this factor, a dimension when its largest
# size exceeds the median dimension's. Ordinary residual streams stay below 3; the first position
# of SmolLM2's exceeds the median by a factor of 10 to 300 (Sun et al., 2024, "Massive activations
# in large language models", find 100 to 1,000 for single values).
MASSIVE_FACTOR = 10.0
# Where the norms of a sample are cut, as a multiple of their 90% quantile: sparse synthetic
# activations and ordinary residual streams stay below it.
_LIMIT, _LIMIT_QUANTILE = 3.0, 0.9
# Tokens, at most, of whose values the center's medians are taken. Each median's standard error is
# 3% of its dimension's spread, which adds .04% to the distances.
_N_CENTER = 2_048
# Tokens whose distances are taken at a time, in memory that the cache holds.
_PIECE = 256


@dataclass(frozen=True)
class Scale:
    """How large activations are, and how much of that is a few values' doing.

    Attributes
    ----------
    median_norm : float
        Median over tokens of |x|.
    median_centered_norm : float
        Median over tokens of |x - center|, the center each dimension's median.
    scale : float
        median_centered_norm / sqrt(d_in): a robust standard deviation per dimension. Dividing
        centred activations by it brings their typical norm to sqrt(d_in).
    standard_deviation : float
        The ordinary one, over all tokens and dimensions after centring; far above `scale` when
        there are massive activations.
    max_abs : float
        Largest size of any value; float16 ends at 65,504.
    massive_token_share : float
        Share of tokens with a norm above 10 times the median.
    massive_dimensions : list of int
        Dimensions whose largest size is above 10 times the median dimension's, largest first,
        at most 16.
    """

    median_norm: float
    median_centered_norm: float
    scale: float
    standard_deviation: float
    max_abs: float
    massive_token_share: float
    massive_dimensions: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)


def robust_scale(x: Float[Tensor, "token d_in"]) -> Scale:
    """Measure the scale of activations that are in memory.

    Parameters
    ----------
    x : Tensor, shape (token, d_in)
        Activations.

    Returns
    -------
    Scale
        In the units of the activations.

    Examples
    --------
    >>> import torch
    >>> x = torch.randn(4096, 16)
    >>> x[0] = 1e4                     # one massive token
    >>> scale = robust_scale(x)
    >>> round(scale.scale, 1), scale.standard_deviation > 100
    (1.0, True)
    """
    x = x.double()
    return combine(
        norms=x.norm(dim=1),
        mean=x.mean(0),
        variance=x.var(0, correction=0),
        max_abs=x.abs().amax(0),
        sample=x,
    )


def combine(
    *,
    norms: Float[Tensor, " token"],
    mean: Float[Tensor, " d_in"],
    variance: Float[Tensor, " d_in"],
    max_abs: Float[Tensor, " d_in"],
    sample: Float[Tensor, "some d_in"],
) -> Scale:
    """Build a `Scale` from statistics gathered in one pass and a sample of the tokens."""
    median_norm = float(norms.median())
    center = sample[:: -(-len(sample) // _N_CENTER)].float().median(dim=0).values
    distances = [(piece.float() - center).norm(dim=1) for piece in sample.split(_PIECE)]
    centered = float(torch.cat(distances).median())
    massive = max_abs > MASSIVE_FACTOR * max_abs.median()
    order = max_abs.argsort(descending=True)
    return Scale(
        median_norm=median_norm,
        median_centered_norm=centered,
        scale=centered / math.sqrt(len(mean)),
        standard_deviation=math.sqrt(float(variance.mean())),
        max_abs=float(max_abs.max()),
        massive_token_share=float((norms > MASSIVE_FACTOR * median_norm).double().mean()),
        massive_dimensions=[int(i) for i in order if massive[i]][:16],
    )


def limit_norms(x_centered: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
    """Shorten massive tokens to three times the norm that nine tokens in ten stay below.

    Of 1% of tokens a hundred times as long as the others some 5% are left in the root mean square;
    a median would do without a threshold, but is 0 where most tokens are.
    """
    norms = x_centered.norm(dim=1, keepdim=True)
    limit = _LIMIT * norms.flatten().quantile(_LIMIT_QUANTILE)
    return torch.where((norms > limit) & (limit > 0), x_centered * (limit / norms), x_centered)


def massive_activation_report(scale: Scale) -> str:
    """Say in a sentence or two what the massive activations mean for a fit; empty without any.

    Parameters
    ----------
    scale : Scale
        From `robust_scale`, or `Scale(**store.index["scale"])` of a store.

    Returns
    -------
    str
        One line; no massive token and no massive dimension make an empty one.
    """
    if scale.massive_token_share == 0 and not scale.massive_dimensions:
        return ""
    lines = [
        f"massive activations: {scale.massive_token_share:.3%} of tokens have a norm above "
        f"{MASSIVE_FACTOR:g} times the median ({scale.median_norm:.3g})"
    ]
    if scale.massive_dimensions:
        lines.append(f"dimensions {scale.massive_dimensions} reach {scale.max_abs:.3g}")
    if scale.standard_deviation > 2 * scale.scale:
        lines.append(
            f"they make up most of the variance (standard deviation "
            f"{scale.standard_deviation:.3g}, robust scale {scale.scale:.3g}), and a fit would "
            "spend itself on them: harvest with exclude_first=True"
        )
    return "; ".join(lines)
