"""Whether intervals of codes hold the truth as often as they say.

All functions take matched features: column j of the intervals and of the truth are one feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probsae.distributions import SpikeSlab
from probsae.models.code_posterior import CodePosterior
from probsae.seeding import new_generator

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Nominal levels that `code_coverage` asks for."""


def interval_coverage(
    lower: Float[Tensor, "token pair"],
    upper: Float[Tensor, "token pair"],
    z: Float[Tensor, "token pair"],
    where: Bool[Tensor, "token pair"] | None = None,
) -> float:
    """Share of true codes inside their interval, ends included.

    Parameters
    ----------
    lower, upper : Tensors, shape (token, pair)
        Ends of the intervals, units of the activations.
    z : Tensor, shape (token, pair)
        True codes.
    where : Tensor of bool, shape (token, pair), optional
        Codes to count, say the active ones; all of them where None.

    Returns
    -------
    float
        In [0, 1]; best at the intervals' level, below it they are over-confident. NaN where there
        is no code to count.

    Examples
    --------
    >>> z = torch.tensor([[0.0, 2.0]])
    >>> interval_coverage(z - 1, torch.ones(1, 2), z)
    0.5
    """
    is_inside = (z >= lower) & (z <= upper)
    if where is not None:
        is_inside = is_inside[where]
    return float(is_inside.double().mean())


def mean_interval_width(
    lower: Float[Tensor, "token pair"],
    upper: Float[Tensor, "token pair"],
    where: Bool[Tensor, "token pair"] | None = None,
) -> float:
    """Mean of upper - lower.

    Parameters
    ----------
    lower, upper : Tensors, shape (token, pair)
        Ends of the intervals, units of the activations.
    where : Tensor of bool, shape (token, pair), optional
        Intervals to count, say those of active codes; all of them where None.

    Returns
    -------
    float
        Units of the activations; lower is better among intervals of one coverage. NaN where there
        is none to count.
    """
    width = upper - lower
    if where is not None:
        width = width[where]
    return float(width.double().mean())


class Coverage(NamedTuple):
    """Observed coverage beside its nominal level; NaN where there is no such code."""

    level: Float[Tensor, " level"]
    """Nominal."""
    all_codes: Float[Tensor, " level"]
    """Share of all codes inside their interval. True posteriors: at least the level, since an
    interval takes the atom at zero whole."""
    active_codes: Float[Tensor, " level"]
    """The same of the truly active codes only. No nominal value: being active is not known to the
    posterior."""
    given_active: Float[Tensor, " level"]
    """Share of the truly active codes inside the interval of q(z | z != 0). True posteriors: the
    level."""
    n_codes: int
    n_active: int

    def standard_error(self) -> Float[Tensor, " level"]:
        """Binomial standard error of `given_active`, were it at its level and codes independent.

        Returns
        -------
        Tensor, shape (level,)
            A share; with no active code, as for one.
        """
        return (self.level * (1 - self.level) / max(self.n_active, 1)).sqrt()


def posterior_given_active(posterior: CodePosterior) -> CodePosterior:
    """Return q(z | z != 0): the slab of a spike-and-slab law, any other law itself."""
    law = posterior.distribution
    return CodePosterior(law.slab) if isinstance(law, SpikeSlab) else posterior


@torch.no_grad()
def code_coverage(
    posterior: CodePosterior,
    z: Float[Tensor, "token pair"],
    columns: Int[Tensor, " pair"] | None = None,
    levels: Sequence[float] = LEVELS,
) -> Coverage:
    """Compare how often equal-tailed intervals hold the true codes with their nominal levels.

    Parameters
    ----------
    posterior : CodePosterior
        Of the tokens; a refined one as well.
    z : Tensor, shape (token, pair)
        True codes.
    columns : Tensor, shape (pair,), optional
        Learned feature of each pair, `Match.learned`; all features in order where None.
    levels : sequence of float, default (.5, .8, .9, .95)
        Nominal levels.

    Returns
    -------
    Coverage
        Shares beside the nominal levels, in double precision. `given_active` is best at its level;
        `all_codes` at or above it.

    Raises
    ------
    ValueError
        If the shapes do not fit or a level is not strictly between 0 and 1.

    Examples
    --------
    >>> law = dist.Normal(torch.zeros(1, 2), torch.ones(1, 2))
    >>> code_coverage(CodePosterior(law), torch.tensor([[0.1, 3.0]]), levels=[0.9]).all_codes
    tensor([0.5000], dtype=torch.float64)
    """
    columns = _columns(posterior, z, columns)
    given_active = posterior_given_active(posterior)
    is_active = z != 0
    covered: list[tuple[float, float, float]] = []
    for level in levels:
        lower, upper = (end[:, columns] for end in posterior.interval(level))
        slab_lower, slab_upper = (end[:, columns] for end in given_active.interval(level))
        covered.append(
            (
                interval_coverage(lower, upper, z),
                interval_coverage(lower, upper, z, is_active),
                interval_coverage(slab_lower, slab_upper, z, is_active),
            )
        )
    shares = torch.tensor(covered, dtype=torch.float64).reshape(-1, 3).unbind(1)
    level = torch.tensor(list(levels), dtype=torch.float64)
    return Coverage(level, *shares, n_codes=z.numel(), n_active=int(is_active.sum()))


@torch.no_grad()
def code_pit(
    posterior: CodePosterior,
    z: Float[Tensor, "token pair"],
    columns: Int[Tensor, " pair"] | None = None,
    seed: int = 0,
) -> Float[Tensor, "token pair"]:
    """Return the randomised probability integral transform of true codes.

    u = q(code < z) + v q(code = z) with v uniform on (0, 1): uniform where the posterior is true,
    in spite of its atom at zero. Codes of one feature are independent over tokens; those of one
    token are not.

    Parameters
    ----------
    posterior, z, columns
        See `code_coverage`.
    seed : int, default 0
        Of v.

    Returns
    -------
    Tensor, shape (token, pair)
        In [0, 1]; `pit_uniformity` tests that it is uniform.

    Raises
    ------
    TypeError
        If the posterior is a point.
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Source: Czado, Gneiting and Held (2009), "Predictive model assessment for count data", on the
    randomised transform of laws with atoms.
    """
    columns = _columns(posterior, z, columns)
    law = posterior.distribution
    if isinstance(law, dist.Delta):
        raise TypeError("a point posterior has no probability integral transform")
    values = z.new_zeros(law.batch_shape).index_copy(1, columns, z)
    if not isinstance(law, SpikeSlab):
        return law.cdf(values)[:, columns]
    p_active = law.p_active
    below = p_active * law.slab.cdf(values) + (1 - p_active) * (values > 0)
    at = (1 - p_active) * (values == 0)
    generator = new_generator("code_pit", seed, z.device)
    v = torch.rand(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    return below[:, columns] + v * at[:, columns]


def _columns(posterior: CodePosterior, z: Tensor, columns: Tensor | None) -> Tensor:
    n_tokens, d_sae = posterior.mean.shape
    if columns is None:
        columns = torch.arange(d_sae, device=z.device)
    if z.shape != (n_tokens, len(columns)):
        raise ValueError(
            f"z must have shape {(n_tokens, len(columns))}, a column for each matched feature, "
            f"got {tuple(z.shape)}"
        )
    return columns.to(z.device)
