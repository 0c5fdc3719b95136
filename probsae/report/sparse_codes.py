"""A dictionary's codes on a text, without those that are surely zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsae.dictionary import Dictionary, posterior_batches
from probsae.metrics.calibration import BAND
from probsae.models.code_posterior import CodePosterior


class Entries(NamedTuple):
    """One feature's codes, by ascending token."""

    token: Int[np.ndarray, " entry"]
    """Row of the token."""
    mean: Float[np.ndarray, " entry"]
    """E z, units of the activations."""
    scale: Float[np.ndarray, " entry"]
    """Standard deviation of z, same units."""
    p_active: Float[np.ndarray, " entry"]


@dataclass(frozen=True)
class SparseCodes:
    """Codes with p_active above .02, feature by feature; 16 bytes each.

    Attributes
    ----------
    n_tokens : int
        Tokens encoded.
    entries : Entries
        Of all features, the first feature's first.
    starts : array, shape (d_sae + 1,)
        Where each feature's entries begin.
    p_sum, p_square_sum : array, shape (d_sae,)
        Sums of p_active and of its square over all tokens, those left out included.
    """

    n_tokens: int
    entries: Entries
    starts: Int[np.ndarray, " boundary"]
    p_sum: Float[np.ndarray, " d_sae"]
    p_square_sum: Float[np.ndarray, " d_sae"]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.p_sum)

    def of(self, feature: int) -> Entries:
        """Return one feature's entries, as views."""
        where = slice(self.starts[feature], self.starts[feature + 1])
        return Entries(*(values[where] for values in self.entries))

    @property
    def rate(self) -> Float[np.ndarray, " d_sae"]:
        """Mean p_active: the expected share of tokens on which each feature is active."""
        return self.p_sum / self.n_tokens

    @property
    def undecided(self) -> Float[np.ndarray, " d_sae"]:
        """Share of each feature's activity that is uncertain, sum p (1 - p) / sum p, in [0, 1].

        0 where every p_active is 0 or 1, as for a deterministic SAE; 1 - p where all are p.
        """
        safe = np.where(self.p_sum > 0, self.p_sum, 1)
        return np.clip((self.p_sum - self.p_square_sum) / safe, 0, 1)


def encode_sparse(
    dictionary: Dictionary, x: Float[Tensor, "token d_in"], *, progress: bool | None = None
) -> SparseCodes:
    """Encode `x` in pieces and keep what may be active.

    Parameters
    ----------
    dictionary : Dictionary
        Fitted.
    x : Tensor, shape (token, d_in)
        Activations, in the order of the text.
    progress : bool, optional
        Show a bar; by default on terminals, where it takes longer than two seconds.

    Returns
    -------
    SparseCodes
        Codes with p_active above .02, and sums over all.

    Examples
    --------
    >>> import torch
    >>> from probsae import TopKSAE
    >>> codes = encode_sparse(TopKSAE(d_in=8, d_sae=16, k=2), torch.randn(100, 8))
    >>> bool(len(codes.entries.token) <= 200)
    True
    """
    d_sae = len(dictionary.dictionary())
    pieces, features = [], []
    sums = torch.zeros(2, d_sae, dtype=torch.float64)
    for where, _, posterior in posterior_batches(dictionary, x, progress=progress):
        p_active = posterior.p_active.detach()
        sums += torch.stack([p_active.double().sum(0), p_active.double().square().sum(0)]).cpu()
        piece, feature = _kept(posterior, p_active, where.start)
        pieces.append(piece)
        features.append(feature)
    feature = np.concatenate(features)
    order = np.argsort(feature, kind="stable")  # stable: tokens stay in ascending order
    entries = Entries(*(np.concatenate(values)[order] for values in zip(*pieces, strict=True)))
    starts = np.searchsorted(feature[order], np.arange(d_sae + 1))
    return SparseCodes(len(x), entries, starts, sums[0].numpy(), sums[1].numpy())


def _kept(posterior: CodePosterior, p_active: Tensor, first: int) -> tuple[Entries, np.ndarray]:
    """Return the entries of one piece, token by token, and the feature of each."""
    token, feature = (p_active > BAND[0]).nonzero(as_tuple=True)
    values = (posterior.mean, posterior.variance.clamp(min=0).sqrt(), p_active)
    kept = (value.detach()[token, feature].float().cpu().numpy() for value in values)
    return (
        Entries((token + first).int().cpu().numpy(), *kept),
        feature.int().cpu().numpy(),
    )
