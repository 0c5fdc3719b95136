"""The point SAE nearest to a posterior: one linear map, one threshold a feature."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probsae.activations.resources import check_memory
from probsae.activations.source import check_activations
from probsae.dictionary import piece_length, posterior_batches
from probsae.models.base import SparseDictionary
from probsae.models.sae.base import DeterministicSAE
from probsae.models.sae.batch_topk import BatchTopKSAE
from probsae.models.sae.jumprelu import JumpReLUSAE
from probsae.seeding import seeded

# Of the mean squared activation: keeps the regression solvable where tokens are few.
_RIDGE = 1e-6
# Expected tokens on which a feature is active, below which its line cannot be fitted.
_MIN_ACTIVE = 5.0
_NO_THRESHOLD = 1e-30


@torch.no_grad()
def point_sae(model: SparseDictionary, x: Tensor | np.ndarray) -> JumpReLUSAE:
    """Return the JumpReLU SAE with the model's directions that comes nearest to its posterior.

    In closed form: filters regress the posterior mean on the activations; a line for each feature
    takes what they give to the code's mean given that it is active; the threshold is where most
    decisions agree with p_active.

    Parameters
    ----------
    model : SparseDictionary
        With a linear decoder.
    x : tensor or array, shape (token, d_in)
        Activations; some tens of thousands, so that rare features are active on some. A feature
        that is active on none is switched off.

    Returns
    -------
    JumpReLUSAE
        On the model's device. `fit` trains it further.

    Raises
    ------
    ValueError
        If the decoder is not linear, or `x` has another width or values that are not finite.
    MemoryError
        If two numbers a token and feature, the most that is held at once, would not fit.

    Notes
    -----
    One linear map cannot explain away: a token on which two similar features compete keeps both
    or the wrong one. docs/interop.md has what that costs.
    """
    if not model.has_linear_decoder:
        raise ValueError(f"a {type(model).__name__} with an MLP decoder has no point SAE")
    x = check_activations(x, model.d_in, model.b_dec.dtype).to(model.b_dec)
    p, mean = _codes(model, x)
    centered = x - model.b_dec
    gram = centered.T @ centered
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    filters = torch.linalg.solve(gram, centered.T @ mean)
    with seeded(0):  # its first dictionary, which is written over, is drawn
        point = JumpReLUSAE(model.d_in, model.d_sae).to(x.device)
    point.W_dec.copy_(model.directions)
    point.b_dec.copy_(model.b_dec)
    point.initialize_codes_(centered)
    threshold = torch.empty_like(point.b_enc)
    for features in torch.arange(model.d_sae, device=x.device).split(piece_length(len(x))):
        h = centered @ filters[:, features]
        slope, intercept = _lines(h, p[:, features], mean[:, features])
        point.W_enc[:, features] = filters[:, features] * slope
        point.b_enc[features] = intercept
        threshold[features] = _thresholds(slope * h + intercept, p[:, features])
    set_threshold_(point, threshold)
    point.is_initialized.fill_(True)
    return point.eval()


def _codes(
    model: SparseDictionary, x: Float[Tensor, "token d_in"]
) -> tuple[Float[Tensor, "token d_sae"], Float[Tensor, "token d_sae"]]:
    """Return p_active and the mean of all tokens: all of their posterior that is held at once."""
    if not x.is_cuda:  # a GPU says it itself
        n_bytes = 2 * len(x) * model.d_sae * x.element_size()
        check_memory(n_bytes, f"the codes of {len(x)} tokens, {model.d_sae} features")
    p, mean = x.new_empty(len(x), model.d_sae), x.new_empty(len(x), model.d_sae)
    for where, _, posterior in posterior_batches(model, x):
        p[where], mean[where] = posterior.p_active, posterior.mean
    return p, mean


def _lines(
    h: Float[Tensor, "token feature"],
    p: Float[Tensor, "token feature"],
    mean: Float[Tensor, "token feature"],
) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
    """Return slope and intercept of E[z | active] by `h`, tokens weighted by p; else 1 and 0."""
    n = p.sum(0)
    n_safe = n.clamp(min=1e-6)
    h_mean, z_mean = (p * h).sum(0) / n_safe, mean.sum(0) / n_safe
    deviation = h - h_mean
    covariance = (deviation * (mean - p * z_mean)).sum(0)
    slope = covariance / (p * deviation.square()).sum(0).clamp(min=1e-12)
    is_fitted = (n > _MIN_ACTIVE) & (slope > 0)
    return torch.where(is_fitted, slope, 1.0), torch.where(is_fitted, z_mean - slope * h_mean, 0.0)


def _thresholds(
    h: Float[Tensor, "token feature"], p: Float[Tensor, "token feature"]
) -> Float[Tensor, " feature"]:
    """Return where `h > threshold` agrees with being active on the most tokens, expected."""
    ordered, order = h.sort(dim=0, descending=True)
    gain = (2 * p.gather(0, order) - 1).cumsum(0)
    most, last = gain.max(0)
    following = (last + 1).clamp(max=len(h) - 1)
    between = (ordered.gather(0, last[None]) + ordered.gather(0, following[None]))[0] / 2
    above_all = ordered[0].abs() * 2 + 1  # to be expected on no token
    return torch.where(most > 0, between, above_all)


def as_point(model: SparseDictionary, x: Tensor | None) -> DeterministicSAE:
    """Return a deterministic SAE as it is, anything else as its `point_sae` on `x`."""
    if isinstance(model, DeterministicSAE):
        return model
    if x is None:
        raise ValueError(
            f"a {type(model).__name__} is a posterior, which this format has no place for: pass "
            "activations as x, on which the point SAE nearest to it is chosen"
        )
    return point_sae(model, x)


def jump_threshold(model: DeterministicSAE) -> Float[Tensor, " d_sae"] | None:
    """Return what each code must EXCEED to be kept; None where there is no such number."""
    if isinstance(model, JumpReLUSAE):
        return model.threshold.detach()
    if not isinstance(model, BatchTopKSAE):
        return None
    if float(model.threshold) < 0:
        raise ValueError(f"this {type(model).__name__} was not trained: it has no threshold yet")
    below = torch.nextafter(model.threshold, torch.zeros_like(model.threshold))
    return below.expand(model.d_sae).clone()


@torch.no_grad()
def set_threshold_(model: JumpReLUSAE, threshold: Float[Tensor, " d_sae"]) -> None:
    """Set what each code must exceed; at 0 and below it, any positive code is kept."""
    model.log_threshold.copy_(threshold.clamp(min=_NO_THRESHOLD).log())
