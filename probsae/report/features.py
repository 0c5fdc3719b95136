"""What the feature browser shows of a dictionary: figures of all features, examples of each."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.stats import beta
from torch import Tensor

from probsae.dictionary import Dictionary
from probsae.levels import check_level, tails
from probsae.progress import shown
from probsae.report.examples import FeatureExamples, examples
from probsae.report.sparse_codes import SparseCodes, encode_sparse
from probsae.report.token_text import TokenText

N_NEAREST = 6
# Rows of the cosine matrix held at once.
_ROWS = 1024

Values = Float[np.ndarray, " d_sae"]
LogitEffects = Sequence[Sequence[tuple[str, float]]]
"""For each feature the output tokens that it moves most, with the change of their logits."""


@runtime_checkable
class DirectionUncertainty(Protocol):
    """A dictionary's posterior, as far as the browser shows it."""

    @property
    def direction_variance(self) -> Float[Tensor, " d_sae"]: ...

    def rate_interval(self, level: float) -> tuple[Tensor, Tensor]: ...


class IntervalSource(NamedTuple):
    """Which posterior of the rates their intervals are of."""

    tokens: str
    """In two or three words."""
    meaning: str


OF_TOKENS = IntervalSource(
    "tokens shown", "of the tokens shown, by Jeffreys' prior: Beta(1/2 + k, 1/2 + n - k)"
)
OF_POSTERIOR = IntervalSource(
    "tokens of the posterior",
    "of the tokens that the dictionary's posterior was made from, by the model's prior",
)


@dataclass(frozen=True)
class FeatureColumns:
    """Figures of every feature, arrays of shape (d_sae,).

    Attributes
    ----------
    rate : array
        Expected share of tokens on which the feature is active, mean p_active.
    rate_lower, rate_upper : array
        Equal-tailed interval of the rate; of which tokens is `FeatureData.interval_source`. One
        of the posterior's tokens need not hold the rate on these.
    undecided : array
        Share of its activity that is uncertain, sum p (1 - p) / sum p, in [0, 1]; lower is
        better.
    largest : array
        Largest code E z in size, with its sign; units of the activations.
    direction_variance : array or None
        Expected 1 - cosine with the true direction, as the dictionary's posterior states it; lower
        is better.
    direction_lower, direction_upper : array or None
        Equal-tailed interval of that 1 - cosine.
    p_real : array or None
        Probability that the data have the feature, as stated there; higher is better.
    stability : array or None
        As given; higher is better.
    """

    rate: Values
    rate_lower: Values
    rate_upper: Values
    undecided: Values
    largest: Values
    direction_variance: Values | None = None
    direction_lower: Values | None = None
    direction_upper: Values | None = None
    p_real: Values | None = None
    stability: Values | None = None


@dataclass(frozen=True)
class FeatureData:
    """All that the browser's feature page is made of.

    Attributes
    ----------
    columns : FeatureColumns
        Figures of all features.
    examples : list of FeatureExamples
        What each does on the text.
    nearest : list of list of (int, float)
        For each feature the others with the largest cosine, and that.
    n_tokens : int
        Tokens looked at.
    level : float
        Of the intervals.
    interval_source : IntervalSource
        Which posterior they are of: the dictionary's, where there is one, else that of the tokens
        looked at.
    p_active : array of int, shape (20,)
        (token, feature) pairs by p_active, in equal bins from 0 to 1; those under .02 left out.
    text : TokenText or None
        The tokens' text.
    logit_effects : LogitEffects or None
        As given.
    """

    columns: FeatureColumns
    examples: list[FeatureExamples]
    nearest: list[list[tuple[int, float]]]
    n_tokens: int
    level: float
    interval_source: IntervalSource
    p_active: np.ndarray
    text: TokenText | None = None
    logit_effects: LogitEffects | None = None


def gather_features(
    dictionary: Dictionary,
    x: Float[Tensor, "token d_in"],
    *,
    text: TokenText | None = None,
    posterior: DirectionUncertainty | None = None,
    stability: Float[Tensor, " d_sae"] | Values | None = None,
    logit_effects: LogitEffects | None = None,
    level: float = 0.9,
    progress: bool | None = None,
) -> FeatureData:
    """Encode `x` and collect what a feature browser shows.

    Parameters
    ----------
    dictionary : Dictionary
        A fitted model or baseline.
    x : Tensor, shape (token, d_in)
        Activations; in the order of the text where there is one.
    text : TokenText, optional
        What the tokens read, by `token_text`.
    posterior : DirectionUncertainty, optional
        Posterior of the dictionary: direction variances and intervals of the rates. Without one a
        rate's interval is that of Beta(1/2 + k, 1/2 + n - k) with k the expected number of
        active tokens (Jeffreys' prior; Brown, Cai and DasGupta 2001, section 4.2.2). It takes
        tokens for independent; those of one text are not, so it is rather too narrow.
    stability : Tensor or array, shape (d_sae,), optional
        Say the cosine of each feature with its match in other seeds' dictionaries.
    logit_effects : sequence of sequences of (str, float), optional
        For each feature the tokens whose logits it raises or lowers most.
    level : float, default 0.9
        Of the rates' intervals.
    progress : bool, optional
        Show bars; by default on terminals, for what takes longer than two seconds.

    Returns
    -------
    FeatureData
        To be written by `write_browser`.

    Raises
    ------
    ValueError
        If `level` is not strictly between 0 and 1, or text, stability, posterior or effects are
        not of the dictionary's and the activations' sizes.

    Examples
    --------
    >>> import torch
    >>> from probsae import SpikeSlabDictionary
    >>> data = gather_features(SpikeSlabDictionary(d_in=8, d_sae=16), torch.randn(100, 8))
    >>> data.columns.rate.shape, len(data.nearest[0])
    ((16,), 6)
    """
    check_level(level)
    directions = dictionary.dictionary().detach().float()
    d_sae = len(directions)
    _check_length("text", text, len(x), "tokens")
    _check_length("stability", stability, d_sae, "features")
    _check_length("logit_effects", logit_effects, d_sae, "features")
    codes = encode_sparse(dictionary, x, progress=progress)
    return FeatureData(
        columns=_columns(codes, posterior, stability, level),
        examples=list(shown(examples(codes, text), "examples", "feature", progress, d_sae)),
        nearest=_nearest(directions),
        n_tokens=len(x),
        level=level,
        interval_source=OF_TOKENS if posterior is None else OF_POSTERIOR,
        p_active=np.histogram(codes.entries.p_active, bins=20, range=(0, 1))[0],
        text=text,
        logit_effects=logit_effects,
    )


def _check_length(name: str, values: Sized | None, n: int, what: str) -> None:
    if values is not None and len(values) != n:
        raise ValueError(f"{name} must have one entry for each of {n} {what}, got {len(values)}")


def _columns(
    codes: SparseCodes,
    posterior: DirectionUncertainty | None,
    stability: Tensor | Values | None,
    level: float,
) -> FeatureColumns:
    if posterior is None:
        lower, upper = rate_interval(codes.p_sum, codes.n_tokens, level)
    else:
        lower, upper = (_values(bound) for bound in posterior.rate_interval(level))
        _check_length("posterior.rate_interval", lower, codes.d_sae, "features")
    directions = _direction_interval(posterior, level)
    return FeatureColumns(
        rate=codes.rate,
        rate_lower=lower,
        rate_upper=upper,
        undecided=codes.undecided,
        largest=np.array([_largest(codes.of(i).mean) for i in range(codes.d_sae)]),
        direction_variance=None if posterior is None else _values(posterior.direction_variance),
        direction_lower=directions[0],
        direction_upper=directions[1],
        p_real=_p_real(posterior),
        stability=None if stability is None else _values(stability),
    )


def _direction_interval(
    posterior: DirectionUncertainty | None, level: float
) -> tuple[Values, Values] | tuple[None, None]:
    """Return what the posterior states; a foreign one may state none."""
    interval = getattr(posterior, "direction_interval", None)
    if interval is None:
        return None, None
    lower, upper = interval(level)
    return _values(lower), _values(upper)


def _p_real(posterior: DirectionUncertainty | None) -> Values | None:
    log_odds = getattr(posterior, "log_odds_real", None)
    return None if log_odds is None else _values(torch.sigmoid(log_odds))


def rate_interval(count: Values, n_tokens: int, level: float = 0.9) -> tuple[Values, Values]:
    """Equal-tailed interval of a firing rate after `count` active of `n_tokens` independent tokens.

    Quantiles of Beta(1/2 + count, 1/2 + n_tokens - count); the lower end is 0 where nothing was
    active, the upper 1 where all were. Expected counts may lie between, 1e-20 say: an interval
    holds its own rate.

    Examples
    --------
    >>> import numpy as np
    >>> lower, upper = rate_interval(np.array([0.0, 5.0]), 10)
    >>> lower.round(3).tolist(), upper.round(3).tolist()
    ([0.0, 0.262], [0.171, 0.738])
    """
    below, above = tails(level)
    a, b = 0.5 + count, 0.5 + np.maximum(n_tokens - count, 0)
    lower = np.where(count > 0, beta.ppf(below, a, b), 0.0)
    upper = np.where(count < n_tokens, beta.ppf(above, a, b), 1.0)
    return np.minimum(lower, count / n_tokens), np.maximum(upper, count / n_tokens)


def _values(values: Tensor | np.ndarray) -> Values:
    return torch.as_tensor(values).detach().double().cpu().numpy()


def _largest(mean: Float[np.ndarray, " entry"]) -> float:
    return float(mean[np.abs(mean).argmax()]) if len(mean) else 0.0


def _nearest(directions: Float[Tensor, "d_sae d_in"]) -> list[list[tuple[int, float]]]:
    unit = F.normalize(directions, dim=-1)
    n = min(N_NEAREST, len(unit) - 1)
    found: list[list[tuple[int, float]]] = []
    for start in range(0, len(unit), _ROWS):
        cosine = unit[start : start + _ROWS] @ unit.T
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -torch.inf
        best = cosine.topk(n, dim=1)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found += [list(zip(*row, strict=True)) for row in rows]
    return found
