"""What the checks are given."""

from __future__ import annotations

from torch import Tensor

from probsae.activations.source import check_activations
from probsae.models.base import SparseDictionary
from probsae.models.code_posterior import CodePosterior


def with_posterior(
    model: SparseDictionary, x: Tensor, posterior: CodePosterior | None
) -> tuple[Tensor, CodePosterior]:
    """Return activations, and their posterior: the encoder's where None.

    Raises
    ------
    ValueError
        If the activations do not fit the model, or the posterior is not theirs.
    """
    x = check_activations(x, model.d_in, model.b_dec.dtype).to(model.b_dec)
    posterior = model.encode(x) if posterior is None else posterior
    if posterior.mean.shape != (len(x), model.d_sae):
        raise ValueError(
            f"the posterior must be that of x, of shape {(len(x), model.d_sae)}, "
            f"got {tuple(posterior.mean.shape)}"
        )
    return x, posterior
