"""Let the dictionary follow its closed form during a fit, while the encoder learns by gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from probsae.inference.dictionary_statistics import DictionaryStatistics
from probsae.inference.elbo import Objective
from probsae.models.base import SparseDictionary

# Steps between two updates.
_EVERY = 3
# Batches that the statistics look back on at the full learning rate. The encoder moves: older codes
# pull directions to where they were (docs/decisions/closed_form_dictionary.md).
_WINDOW = 30
# Activations that a feature's present direction stands for: those of rare features then wait
# until there is something to go by.
_PRIOR_ACTIVATIONS = 1.0
# Features in a block of the statistics; a block of 4,096 takes 128 MiB.
_BLOCK_SIZE = 4096


class RunningDictionary:
    """Natural-gradient updates of the dictionary, from statistics with a forgetting rate.

    Gradient descent is slow where features are rare: their directions move by what a batch's few
    activations say. The closed form weighs every activation seen alike. It needs codes that hold
    still, so it begins once features are found, and its memory grows as the learning rate falls.

    Parameters
    ----------
    model : SparseDictionary
        With a linear decoder; updated in place.

    Notes
    -----
    Source: Hoffman, Blei, Wang and Paisley (2013), "Stochastic variational inference".
    """

    def __init__(self, model: SparseDictionary):
        self.model = model
        self.statistics = DictionaryStatistics(model.dictionary(), _BLOCK_SIZE)
        # Wide dictionaries look at fewer batches: a product with S is to an encoder's as is the
        # block's size to d_in.
        self.n_skipped = self.statistics.block_size // (4 * model.d_in)

    @torch.no_grad()
    def update(
        self, step: int, x: Tensor, objective: Objective, rate: float, is_good: Tensor
    ) -> None:
        """Take in the codes of step `step` and, every few steps, move the directions.

        `rate` is the learning rate as a share of its full value, in (0, 1]. Nothing moves where
        `is_good` is false.
        """
        if step % (1 + self.n_skipped):
            return
        statistics = self.statistics
        statistics.fade(1 - 1 / _WINDOW)
        statistics.move(self.model.dictionary())
        spread = len(x) * objective.code_spread
        statistics.add(objective.code_mean, spread, x - self.model.b_dec)
        if step % (_EVERY * (1 + self.n_skipped)) == 0:
            self._move(is_good)

    def _move(self, is_good: Tensor) -> None:
        weight = _PRIOR_ACTIVATIONS * active_energy(self.model)
        rows = self.statistics.solve(weight).mean
        old = self.model.directions
        new = torch.nn.functional.normalize(rows, dim=1).to(old.dtype)
        is_good = is_good & torch.isfinite(new).all()
        self.model.turn_directions_(torch.where(is_good, new, old))

    def tensors(self) -> dict[str, Tensor]:
        """Return what an update depends on, to be saved, or copied into."""
        return self.statistics.tensors()


def active_energy(model: SparseDictionary) -> Tensor:
    """Return E z^2 of each feature's active code under the prior, shape (d_sae,)."""
    prior = model.prior()
    law = getattr(prior, "base_dist", prior)
    slab = getattr(law, "slab", law)
    return slab.variance + slab.mean.square()
