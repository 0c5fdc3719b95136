"""One test a feature, and what thousands of tests do to an error rate."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from probsae.metrics.probing.probes import as_matrix

Correction: TypeAlias = Literal["bonferroni", "holm", "benjamini-hochberg"]

# A constant's variance comes out as rounding, some 1e-16 per token of its largest square. Codes in
# float32 resolve 6e-8 of their size, whose square is less still.
_ROUNDING = 1e-13
_STATSMODELS_NAMES = {"bonferroni": "bonferroni", "holm": "holm", "benjamini-hochberg": "fdr_bh"}


class FeatureTests(NamedTuple):
    """Welch's two-sample test of every feature."""

    statistic: Float[Tensor, " d_sae"]
    """t, positive where the concept's mean is larger; 0 for features that never vary."""
    degrees_of_freedom: Float[Tensor, " d_sae"]
    """Welch and Satterthwaite's; NaN where neither class varies."""
    p_value: Float[Tensor, " d_sae"]
    """Two-sided, not corrected."""


def welch_tests(
    codes: Float[Tensor, "token d_sae"], labels: Bool[Tensor, " token"]
) -> FeatureTests:
    r"""Test for every feature whether its mean differs between the classes.

    t = (m_1 - m_0) / sqrt(v_1/n_1 + v_0/n_0), with unbiased variances v. Codes of sparse features
    are far from normal: with few active tokens the p-values are approximate.

    Parameters
    ----------
    codes : Tensor, shape (token, d_sae)
        Codes or raw activations.
    labels : Tensor of bool, shape (token,)
        Whether the concept is present; at least two tokens of each class.

    Returns
    -------
    FeatureTests
        A feature that is constant in each class has p = 1 where the constants agree, else p = 0.

    Raises
    ------
    ValueError
        If there is not one label a token, or fewer than two tokens of a class.

    Notes
    -----
    Source: Welch (1947); distribution by scipy. Tokens are taken for independent: where types
    recur, pass one token of each.

    Examples
    --------
    >>> codes = torch.tensor([[0.0], [1.0], [2.0], [4.0], [5.0], [6.0]])
    >>> tests = welch_tests(codes, torch.tensor([False] * 3 + [True] * 3))
    >>> round(float(tests.statistic), 3), round(float(tests.degrees_of_freedom), 3)
    (4.899, 4.0)
    """
    x, y = as_matrix(codes), np.asarray(labels.cpu(), dtype=bool)
    if y.shape != (len(x),) or min(y.sum(), (~y).sum()) < 2:
        raise ValueError(
            f"labels must be {len(x)} booleans with at least two tokens of each class, got shape "
            f"{y.shape} with {int(y.sum())} true"
        )
    t, df = (value[0] for value in welch_statistics(x, y[None]))
    p_value = np.where(np.isinf(t), 0.0, 1.0)
    is_usual = np.isfinite(df)
    p_value[is_usual] = 2 * stats.t.sf(np.abs(t[is_usual]), df[is_usual])
    return FeatureTests(*(torch.from_numpy(value) for value in (t, df, p_value)))


def welch_statistics(
    x: Float[np.ndarray, "token d_sae"], labels: Bool[np.ndarray, "assignment token"]
) -> tuple[Float[np.ndarray, "assignment d_sae"], Float[np.ndarray, "assignment d_sae"]]:
    """Return t and degrees of freedom of each feature under several assignments of labels."""
    x = x - x.mean(axis=0)  # moments about the mean lose no digits
    squares = x**2
    means, errors, dfs = [], [], []
    for is_class in (labels, ~labels):
        n = is_class.sum(axis=1, keepdims=True)
        mean = is_class @ x / n
        variance = ((is_class @ squares - n * mean**2) / (n - 1)).clip(min=0)
        variance[variance < _ROUNDING * squares.max(axis=0)] = 0
        means.append(mean)
        errors.append(variance / n)
        dfs.append(n - 1)
    difference, error = means[0] - means[1], errors[0] + errors[1]
    difference[np.abs(difference) < 1e-12 * np.sqrt(squares.max(axis=0))] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(difference == 0, 0.0, difference / np.sqrt(error))
        df = error**2 / (errors[0] ** 2 / dfs[0] + errors[1] ** 2 / dfs[1])
    return t, df


def adjust_p_values(
    p_values: Float[Tensor, " d_sae"], method: Correction = "holm"
) -> Float[Tensor, " d_sae"]:
    """Correct p-values for their number; reject those that are at most the level.

    Parameters
    ----------
    p_values : Tensor, shape (d_sae,)
        One for each test, in [0, 1].
    method : {"holm", "bonferroni", "benjamini-hochberg"}
        The first two bound the chance of ANY false positive, whatever the dependence (Holm's
        rejects all that Bonferroni's does and more); the last bounds the expected SHARE of false
        positives among the rejected, for independent or positively dependent tests.

    Returns
    -------
    Tensor, shape (d_sae,)
        Corrected p-values, in [0, 1], in the order of the tests.

    Raises
    ------
    ValueError
        If the method is unknown, or `p_values` are no vector within [0, 1].

    Notes
    -----
    Source: Holm (1979); Benjamini and Hochberg (1995); computed by statsmodels.

    Examples
    --------
    >>> [round(p, 3) for p in adjust_p_values(torch.tensor([0.01, 0.04, 0.03])).tolist()]
    [0.03, 0.06, 0.06]
    """
    from statsmodels.stats.multitest import multipletests  # takes seconds to import

    if method not in _STATSMODELS_NAMES:
        raise ValueError(f"method must be one of {', '.join(_STATSMODELS_NAMES)}, got {method!r}")
    p = p_values.detach().cpu().double().numpy()
    if p.ndim != 1 or not len(p) or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values must be a vector within [0, 1], got shape {p.shape}")
    return torch.from_numpy(multipletests(p, method=_STATSMODELS_NAMES[method])[1])


def probability_of_no_false_positive(n_tests: int, level: float) -> float:
    """Chance that none of `n_tests` independent tests of true nulls rejects: (1 - level)^n_tests.

    Without independence it is at least 1 - n_tests * level (union bound).

    Parameters
    ----------
    n_tests : int
        Number of tests.
    level : float
        Of each, in (0, 1).

    Returns
    -------
    float
        In (0, 1).

    Raises
    ------
    ValueError
        If `n_tests` is below 1, or the level outside (0, 1).

    Examples
    --------
    >>> round(probability_of_no_false_positive(16_384, 1e-5), 4)
    0.8489
    """
    _check(n_tests, level)
    return math.exp(n_tests * math.log1p(-level))


def level_for_family(n_tests: int, family_level: float) -> float:
    """Level of each of `n_tests` independent tests that keeps the chance of any false positive.

    1 - (1 - family_level)^(1 / n_tests); source: Šidák (1967).

    Parameters
    ----------
    n_tests : int
        Number of tests.
    family_level : float
        Chance of any false positive, in (0, 1).

    Returns
    -------
    float
        Level of each test, in (0, 1).

    Raises
    ------
    ValueError
        If `n_tests` is below 1, or the level outside (0, 1).

    Examples
    --------
    >>> f"{level_for_family(16_384, 0.05):.3g}"
    '3.13e-06'
    """
    _check(n_tests, family_level)
    return -math.expm1(math.log1p(-family_level) / n_tests)


def _check(n_tests: int, level: float) -> None:
    if n_tests < 1 or not 0 < level < 1:
        raise ValueError(f"need n_tests >= 1 and 0 < level < 1, got {n_tests} and {level}")
