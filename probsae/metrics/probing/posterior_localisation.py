"""The localisation score of codes that are not known but for a posterior."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from probsae.metrics.probing.localisation import BUDGETS, Localisation, localise
from probsae.metrics.probing.probes import PENALTY
from probsae.metrics.probing.selectivity import Selectivity, percentile_interval
from probsae.progress import shown


@dataclass(frozen=True)
class PosteriorLocalisation:
    r"""A concept in codes drawn from their posterior; made by `localise_posterior`.

    The score S(z) of a draw z ~ q(z | x) is a random number in [0, 1], as certain as the codes are.
    A feature is there in a draw with probability p_active, so that S weighs every pattern of active
    features by its probability under the posterior. `score` and `interval` are its median and its
    quantiles: two statements about one quantity, so that the interval holds the score at any level.

    Attributes
    ----------
    of_draws : tuple of Localisation
        Of each posterior draw of the codes.
    """

    of_draws: tuple[Localisation, ...]

    @property
    def draw_scores(self) -> Float[np.ndarray, " draw"]:
        """S(z) of each draw; in [0, 1]."""
        return np.array([draw.score for draw in self.of_draws])

    @property
    def score(self) -> float:
        """Posterior median of S(z); in [0, 1], higher is better."""
        return float(np.quantile(self.draw_scores, 0.5))

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Equal-tailed interval of S(z) over posterior draws of the codes; holds `score`.

        Parameters
        ----------
        level : float, default 0.9
            Share of the draws that it holds.

        Returns
        -------
        lower, upper : float
            In [0, 1].

        Raises
        ------
        ValueError
            If `level` is not strictly between 0 and 1.
        """
        return percentile_interval(self.draw_scores, level)

    @property
    def fidelity(self) -> Float[np.ndarray, " budget"]:
        """Posterior median of the share of the raw probe's selectivity kept at each budget."""
        return np.quantile([draw.fidelity for draw in self.of_draws], 0.5, axis=0)

    @property
    def chance(self) -> float:
        """Posterior median of the score of the control assignments."""
        return float(np.quantile([draw.chance for draw in self.of_draws], 0.5))

    @property
    def score_draws(self) -> Float[np.ndarray, " draw"]:
        """Bootstrap draws of `score` over types and controls, the draws of the codes fixed.

        Paired with those of `Localisation.score_draws` on the same task.
        """
        return np.quantile([draw.score_draws for draw in self.of_draws], 0.5, axis=0)


def localise_posterior(
    draws: Iterable[Float[Tensor, "token d_sae"]],
    raw: Selectivity,
    *,
    budgets: Sequence[int] = BUDGETS,
    penalty: float = PENALTY,
    progress: bool | None = None,
) -> PosteriorLocalisation:
    """Measure how few features carry a concept in draws from the codes' posterior.

    Parameters
    ----------
    draws : iterable of Tensor, each of shape (token, d_sae)
        Draws of the codes of all tokens; a generator keeps one in memory at a time. Twenty place
        the ends of a 90% interval at the outermost draws but one.
    raw, budgets, penalty
        As of `localise`.
    progress : bool, optional
        Show a bar over the draws; by default on terminals, where they take longer than two seconds.
        It says how long the rest will take where `draws` has a length.

    Returns
    -------
    PosteriorLocalisation

    Raises
    ------
    ValueError
        If there is no draw, or the raw probe is not selective.

    Notes
    -----
    The score does not change when features are permuted, multiplied by positive numbers (or
    shifted), or when features that never vary are appended, in all draws alike; of a point
    posterior it is `localise`'s and the interval has no width. The score of
    `localise(posterior.mean, raw)` is another quantity: a draw is the mean plus noise, which costs
    fidelity as a rule, unless the posterior is sure of the features that matter.

    Examples
    --------
    >>> import torch
    >>> from probsae.metrics.probing import concept_task, selectivity
    >>> labels = torch.arange(40) % 2 == 0
    >>> x = torch.cat([labels[:, None].float(), torch.randn(40, 3)], dim=1)
    >>> raw = selectivity(concept_task(labels, n_controls=2), x)
    >>> draws = (x + 0.01 * torch.randn_like(x) for _ in range(3))
    >>> result = localise_posterior(draws, raw, budgets=(1, 2))
    >>> lower, upper = result.interval(0.9)
    >>> lower <= result.score <= upper
    True
    """
    of_draws = tuple(
        localise(draw, raw, budgets=budgets, penalty=penalty, progress=False)
        for draw in shown(draws, "probes", "draw", progress)
    )
    if not of_draws:
        raise ValueError("draws must hold at least one draw of the codes, got none")
    return PosteriorLocalisation(of_draws)
