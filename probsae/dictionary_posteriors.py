"""Dictionary posteriors of several fits as an arviz object: the fits are the chains."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from probsae.activations.source import check_activations
from probsae.arviz_face import from_dict
from probsae.inference.dictionary_posterior import DictionaryPosterior
from probsae.inference.elbo import require_linear_decoder
from probsae.inference.refine import refine
from probsae.metrics.stability import align
from probsae.models.base import SparseDictionary, as_event
from probsae.models.code_posterior import CodePosterior
from probsae.models.code_priors import learned_spike_slab
from probsae.seeding import own_stream

_DIMS = {
    "direction": ["feature", "dimension"],
    "cosine": ["feature"],
    "norm": ["feature"],
    "firing_rate": ["feature"],
    "activations": ["token"],
    "energy": ["token"],
}
# 2 ** 27 numbers are half a GiB in float32.
_MAX_NUMBERS = 2**27


@torch.no_grad()
def dictionaries_to_arviz(
    models: Sequence[SparseDictionary],
    posteriors: Sequence[DictionaryPosterior],
    x: Float[Tensor, "token d_in"] | np.ndarray,
    *,
    features: Sequence[int] | np.ndarray | Tensor | None = None,
    n_draws: int = 100,
    n_importance: int = 200,
    seed: int = 0,
) -> Any:
    r"""Draw dictionaries, rates and noise from fits' posteriors, and score held-out tokens.

    Each fit is a chain, its features in the order of the first fit's (Hungarian). Each draw's
    likelihood of a token has the codes integrated out,

        log p(x | W, rates, noise) ~= log mean_s p(x, z_s | W, rates, noise) / q(z_s | x),

    with codes z_s from the posterior under the fit's mean: leaving a token out by `az.loo`, and
    `az.compare` between families, then judge dictionaries, not codes.

    Parameters
    ----------
    models : sequence of SparseDictionary
        Independent fits of one width, each with an initial dictionary of its own, polished.
    posteriors : sequence of DictionaryPosterior
        What `polish` returned for each.
    x : Tensor, shape (token, d_in)
        Held-out activations; a hundred tell families apart.
    features : sequence, array or tensor of int, optional
        Features of the first fit whose directions are kept; all where None.
    n_draws : int, default 100
        Dictionaries drawn from each fit's posterior.
    n_importance : int, default 200
        Codes drawn for each token. Fewer make the likelihood a lower bound, as IWAE's.
    seed : int, default 0
        Of all draws.

    Returns
    -------
    arviz.InferenceData, or xarray.DataTree with arviz 1.x
        - `posterior`: `direction` (feature, dimension), rows as drawn; `cosine` (feature) with
          the first fit's mean direction and `norm` (feature); `firing_rate` (feature);
          `noise_scale`, units of the activations.
        - `log_likelihood`: `activations` (token), nats, codes integrated out.
        - `posterior_predictive`, `observed_data`: `energy` (token), squared distance from
          the first fit's `b_dec`: each draw's token is a fresh one, for `az.plot_loo_pit`.

    Raises
    ------
    TypeError
        If a model is deterministic, or one came where several belong.
    ValueError
        If there are none, their shapes differ, the decoder is not linear, a feature is not one of
        theirs, or the draws would take more than half a gigabyte.

    Notes
    -----
    Source: Burda, Grosse and Salakhutdinov (2016), equation 8, for the likelihood; Vehtari,
    Gelman and Gabry (2017), "Practical Bayesian model evaluation using leave-one-out
    cross-validation".

    Examples
    --------
    >>> import probsae as ps
    >>> data = ps.SyntheticActivations(d_in=8, n_features=6, n_active=1, noise_scale=0.1, seed=0)
    >>> models = [ps.SpikeSlabDictionary(d_in=8, d_sae=8) for _ in range(2)]
    >>> for model in models:
    ...     result = ps.fit(model, data, n_steps=20, batch_size=64)
    >>> posteriors = [ps.polish(model, data, n_tokens=500, progress=False) for model in models]
    >>> idata = dictionaries_to_arviz(models, posteriors, data.sample(5)[0], n_draws=10)
    >>> idata.posterior["cosine"].dims
    ('chain', 'draw', 'feature')
    """
    _check(models, posteriors, n_draws, n_importance)
    x = check_activations(x, models[0].d_in, models[0].b_dec.dtype).to(models[0].b_dec)
    features = _check_features(features, models[0].d_sae)
    _check_size(models[0], len(x), len(features), len(models) * n_draws, n_importance)
    reference = posteriors[0].mean
    index = align([p.mean for p in posteriors]).index.to(reference.device)
    with own_stream("dictionaries", seed, x.device):
        chains = [
            _chain(
                model,
                posterior,
                x,
                models[0].b_dec,
                rows[features],
                reference[features],
                n_draws,
                n_importance,
            )
            for model, posterior, rows in zip(models, posteriors, index, strict=True)
        ]
    draws = {
        name: np.stack([getattr(chain, name).cpu().double().numpy() for chain in chains])
        for name in _Chain._fields
    }
    energy = _energy(x, models[0].b_dec).cpu().double().numpy()
    groups = {
        "posterior": {
            name: draws[name]
            for name in ("direction", "cosine", "norm", "firing_rate", "noise_scale")
        },
        "log_likelihood": {"activations": draws["log_likelihood"]},
        "posterior_predictive": {"energy": draws["energy"]},
        "observed_data": {"energy": energy},
    }
    coords = {
        "token": np.arange(len(x)),
        "feature": np.asarray(features),
        "dimension": np.arange(x.shape[1]),
    }
    return from_dict(groups, coords, _DIMS)


class _Chain(NamedTuple):
    """One fit's draws; the first axis of each is the draw."""

    direction: Tensor
    cosine: Tensor
    norm: Tensor
    firing_rate: Tensor
    noise_scale: Tensor
    log_likelihood: Tensor
    energy: Tensor


def _chain(
    model: SparseDictionary,
    posterior: DictionaryPosterior,
    x: Tensor,
    centre: Tensor,
    rows: Tensor,
    reference: Tensor,
    n_draws: int,
    n_importance: int,
) -> _Chain:
    drawn = copy.deepcopy(model)
    codes = _Codes(model, x, n_importance)
    rates = posterior.rate.sample((n_draws,))
    noise_scales = posterior.noise_precision.sample((n_draws,)).rsqrt()
    directions, likelihoods, energies = [], [], []
    for rate, noise_scale in zip(rates, noise_scales, strict=True):
        dictionary = posterior.sample(1)[0]
        _set_rates(drawn, rate)
        W, scale = dictionary.to(x), noise_scale.to(x)
        likelihoods.append(codes.log_likelihood(drawn, W, scale))
        fresh = drawn.prior().sample(torch.Size((len(x),))) @ W + drawn.b_dec
        energies.append(_energy(fresh + scale * torch.randn_like(x), centre))
        directions.append(dictionary[rows])
    direction = torch.stack(directions)
    return _Chain(
        direction=direction,
        cosine=(normalize(direction, dim=-1) * normalize(reference, dim=-1)).sum(-1),
        norm=direction.norm(dim=-1),
        firing_rate=rates[:, rows],
        noise_scale=noise_scales,
        log_likelihood=torch.stack(likelihoods),
        energy=torch.stack(energies),
    )


class _Codes:
    """Codes drawn once for each token, to integrate over under any dictionary near the fit's."""

    def __init__(self, model: SparseDictionary, x: Tensor, n_draws: int):
        posterior = _best_posterior(model, x)
        self.x = x - model.b_dec
        self.z = posterior.sample(n_draws)
        self.log_q = as_event(posterior.distribution).log_prob(self.z)

    def log_likelihood(self, model: SparseDictionary, W: Tensor, noise_scale: Tensor) -> Tensor:
        """Log of the mean weight of each token's codes."""
        likelihood = dist.Normal(self.z @ W, noise_scale).log_prob(self.x).sum(-1)
        log_weight = likelihood + model.prior().log_prob(self.z) - self.log_q
        return log_weight.logsumexp(0) - math.log(len(log_weight))


def _energy(x: Tensor, centre: Tensor) -> Tensor:
    return (x - centre).square().sum(-1)


def _best_posterior(model: SparseDictionary, x: Tensor) -> CodePosterior:
    return model.encode(x) if learned_spike_slab(model) is None else refine(model, x)


def _set_rates(model: SparseDictionary, rate: Tensor) -> None:
    prior = learned_spike_slab(model)
    if prior is not None:
        prior.rate_logit.copy_(rate.logit())


def _check(
    models: Sequence[SparseDictionary],
    posteriors: Sequence[DictionaryPosterior],
    n_draws: int,
    n_importance: int,
) -> None:
    if isinstance(models, SparseDictionary) or isinstance(posteriors, DictionaryPosterior):
        raise TypeError("models and posteriors must be several: pass one as [model], [posterior]")
    if not models or len(models) != len(posteriors):
        raise ValueError(
            "dictionaries_to_arviz needs one posterior from `polish` for each model, got "
            f"{len(models)} models and {len(posteriors)} posteriors"
        )
    shapes = {tuple(p.mean.shape) for p in posteriors} | {(m.d_sae, m.d_in) for m in models}
    if len(shapes) > 1:
        raise ValueError(f"fits must have one shape (d_sae, d_in) to be chains, got {shapes}")
    if n_draws < 1 or n_importance < 1:
        raise ValueError(
            f"n_draws and n_importance must be at least 1, got {n_draws} and {n_importance}"
        )
    for model in models:
        if model.is_deterministic:
            raise TypeError(f"{type(model).__name__} has no posterior to draw from")
        require_linear_decoder(model)


def _check_features(features: Sequence[int] | np.ndarray | Tensor | None, d_sae: int) -> list[int]:
    chosen = torch.arange(d_sae) if features is None else torch.as_tensor(features)
    is_count = not (chosen.is_floating_point() or chosen.dtype == torch.bool)  # no mask, say
    rows = chosen.tolist()
    if not (is_count and chosen.ndim == 1 and rows and 0 <= min(rows) <= max(rows) < d_sae):
        raise ValueError(
            f"features must be some of 0 to {d_sae - 1}, whole numbers in a row, got {rows}"
        )
    return rows


def _check_size(
    model: SparseDictionary, n_tokens: int, n_features: int, n_draws: int, n_importance: int
) -> None:
    widest = max(model.d_sae, model.d_in)
    n_numbers = max(n_importance * n_tokens * widest, n_draws * n_features * model.d_in)
    if n_numbers > _MAX_NUMBERS:
        raise ValueError(
            f"draws of {n_numbers:.2g} numbers are more than half a gigabyte; pass fewer tokens, "
            "features or draws"
        )
