"""The exact ELBO of a linear decoder, twice: on the Pyro programs, and as a compilable function.

For x | z ~ N(z W + b, sigma^2 I) and a factorised q with m = E z and v = Var z,

    E_q |x - b - z W|^2 = |x - b - m W|^2 + sum_i v_i |w_i|^2,

so no code is sampled and the gradient has no noise. Source: Titsias and Lazaro-Gredilla (2011),
"Spike and slab variational inference for multi-task and multiple kernel learning", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import torch_item
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import kl_divergence

from probsae.distributions.rows import mean_over_tokens, sum_over_tokens
from probsae.models.base import SparseDictionary
from probsae.models.code_posterior import CodePosterior


class ElboTerms(NamedTuple):
    """The ELBO's parts, nats per token."""

    log_likelihood: Float[Tensor, " token"]
    """E_q log p(x | z), exact."""
    kl: Float[Tensor, " token"]
    """KL(q(z | x) || p(z)); for a point posterior -log p(z)."""
    squared_error: Float[Tensor, " token"]
    """|x - x_hat|^2, x_hat decoded from the posterior mean; units of the activations squared."""

    @property
    def elbo(self) -> Float[Tensor, " token"]:
        """Lower bound of log p(x), nats per token; higher is better."""
        return self.log_likelihood - self.kl


class Objective(NamedTuple):
    """What one training step minimises and shows."""

    loss: Float[Tensor, ""]
    """Minimised: -(E log p(x|z) - kl_weight KL) + auxiliary losses, nats per token."""
    elbo: Float[Tensor, ""]
    """ELBO at full KL weight, nats per token; higher is better."""
    log_likelihood: Float[Tensor, ""]
    """Its first part."""
    kl: Float[Tensor, ""]
    """Its second part."""
    auxiliary: Float[Tensor, ""]
    """Losses beside the ELBO, and minus the log prior of learned parameters, nats per token."""
    fvu: Float[Tensor, ""]
    """Fraction of the batch's variance unexplained by the posterior mean; lower is better."""
    firing_rate: Float[Tensor, " d_sae"]
    """Mean p_active of each feature over the batch."""

    @property
    def l0(self) -> Tensor:
        """Expected number of active features a token."""
        return self.firing_rate.sum()


def elbo_terms(
    model: SparseDictionary, x: Float[Tensor, "token d_in"], posterior: CodePosterior | None = None
) -> ElboTerms:
    """Compute the exact ELBO of each token in closed form.

    Parameters
    ----------
    model : SparseDictionary
        With a linear decoder.
    x : Tensor, shape (token, d_in)
        Activations.
    posterior : CodePosterior, optional
        Of `x`; the model's own where None.

    Returns
    -------
    ElboTerms
        Nats per token, with gradient.

    Raises
    ------
    ValueError
        If the decoder is not linear: the expectation has no closed form then.
    """
    if posterior is None:
        return infer_terms(model, x)[1]
    return _terms(model, x, posterior, model.kl)


def infer_terms(
    model: SparseDictionary, x: Float[Tensor, "token d_in"]
) -> tuple[CodePosterior, ElboTerms]:
    """Return the model's own posterior of `x`, with gradient, and its `elbo_terms`."""
    posterior = model.posterior(x)
    return posterior, _terms(model, x, posterior, model.kl_of_own)


def _terms(
    model: SparseDictionary,
    x: Float[Tensor, "token d_in"],
    posterior: CodePosterior,
    kl: Callable[[CodePosterior], Float[Tensor, " token"]],
) -> ElboTerms:
    require_linear_decoder(model)
    residual = x - model.decode(posterior.mean)
    squared_error = expected = residual.square().sum(-1)
    if not posterior.is_point:
        expected = squared_error + posterior.variance.sum(-1)  # sum_i v_i |w_i|^2, unit rows
    log_likelihood = expected_log_likelihood(model, expected)
    return ElboTerms(log_likelihood, kl(posterior), squared_error)


def expected_log_likelihood(
    model: SparseDictionary, squared_error: Float[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """Return E_q log p(x | z), nats per token, given E_q |x - b - zW|^2."""
    noise_variance = model.noise_scale.square()
    return -0.5 * (
        squared_error / noise_variance + model.d_in * (noise_variance.log() + math.log(2 * math.pi))
    )


def objective(
    model: SparseDictionary, x: Float[Tensor, "token d_in"], kl_weight: float | Tensor = 1.0
) -> Objective:
    """Compute a training step's loss and what the progress bar shows; pure torch.

    `torch.compile` takes it with fullgraph=True. The weight `kl_weight` in [0, 1] anneals the
    Kullback-Leibler term (a deterministic SAE's sparsity penalty).

    Parameters
    ----------
    model : SparseDictionary
        With a linear decoder.
    x : Tensor, shape (token, d_in)
        Activations.
    kl_weight : float or Tensor, default 1
        Weight of the KL term.

    Returns
    -------
    Objective
        Means over the tokens, in nats; `loss` with gradient.

    Raises
    ------
    ValueError
        If the decoder is not linear.
    """
    posterior, terms = infer_terms(model, x)
    extra = model.auxiliary_loss(x, posterior, kl_weight)
    firing_rate = mean_over_tokens(posterior.p_active.detach())
    return summarize(model, x, terms, extra, firing_rate, kl_weight)


def summarize(
    model: SparseDictionary,
    x: Float[Tensor, "token d_in"],
    terms: ElboTerms,
    extra: Float[Tensor, " token"] | None,
    firing_rate: Float[Tensor, " d_sae"],
    kl_weight: float | Tensor,
) -> Objective:
    """Put a step's loss together from its terms of each token."""
    auxiliary = terms.kl.new_zeros(()) if extra is None else extra.mean()
    log_prior = model.log_prior_parameters()
    if log_prior is not None:
        auxiliary = auxiliary - log_prior / (model.n_tokens or len(x))
    log_likelihood, kl = terms.log_likelihood.mean(), terms.kl.mean()
    loss = kl_weight * kl - log_likelihood + auxiliary
    total_variance = (x - sum_over_tokens(x) / len(x)).square().sum()
    return Objective(
        loss=loss,
        elbo=(log_likelihood - kl).detach(),
        log_likelihood=log_likelihood.detach(),
        kl=kl.detach(),
        auxiliary=auxiliary.detach(),
        fvu=terms.squared_error.detach().sum() / total_variance,
        firing_rate=firing_rate,
    )


class ExactELBO(TraceMeanField_ELBO):
    """Pyro's mean-field ELBO with the likelihood's exact expectation in place of one draw.

    Works on the programs `model.model` and `model.guide` of any dictionary with a linear
    decoder, wherever Pyro takes an ELBO. `loss` is the NEGATIVE ELBO of the whole batch, Pyro's
    convention.

    Raises
    ------
    ValueError
        When used on a program whose observed site does not say how to take its expectation: the
        decoder is not linear.

    Notes
    -----
    The guide's draw of the codes is replaced by their mean, on which the model is replayed; the
    log-likelihood there, less half the codes' variance in units of the noise, is its exact
    expectation. The observed site carries what is needed as `infer={"expect": "codes",
    "squared_norms": ...}`.

    Examples
    --------
    >>> import probsae as ps, pyro
    >>> model = ps.SpikeSlabDictionary(d_in=8, d_sae=16)
    >>> optimizer = pyro.optim.Adam({"lr": 1e-3})
    >>> svi = pyro.infer.SVI(model.model, model.guide, optimizer, ps.inference.ExactELBO())
    """

    def _get_trace(self, model, guide, args, kwargs):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        for site in guide_trace.nodes.values():
            if site["type"] == "sample" and site["name"] == "codes":
                site["value"] = CodePosterior(site["fn"].base_dist).mean
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
        model_trace = prune_subsample_sites(model_trace)
        guide_trace = prune_subsample_sites(guide_trace)
        model_trace.compute_log_prob()
        guide_trace.compute_score_parts()
        return model_trace, guide_trace

    def _differentiable_loss_particle(self, model_trace, guide_trace):
        elbo = torch.zeros(())
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                elbo = elbo + site["log_prob_sum"] - _spread(site, guide_trace)
            else:
                q = guide_trace.nodes[name]
                kl = kl_divergence(q["fn"], site["fn"])
                elbo = elbo - scale_and_mask(kl, q["scale"], q["mask"]).sum()
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:
                elbo = elbo - site["score_parts"].entropy_term.sum()
        return torch_item(-elbo), -elbo


def _spread(site: dict, guide_trace: poutine.Trace) -> Tensor | float:
    """What the codes' variance takes from the log-likelihood at their mean, summed over tokens."""
    if site["name"] != "activations":
        return 0.0
    infer: Any = site["infer"]
    if "squared_norms" not in infer:
        raise ValueError(_NEEDS_LINEAR)
    posterior = CodePosterior(guide_trace.nodes[infer["expect"]]["fn"].base_dist)  # pyright: ignore[reportTypedDictNotRequiredAccess]
    noise_variance = site["fn"].base_dist.scale.square()[..., 0]
    spread = 0.5 * (posterior.variance @ infer["squared_norms"]) / noise_variance
    return scale_and_mask(spread, site["scale"], site["mask"]).sum()


_NEEDS_LINEAR = (
    "the exact ELBO needs a linear decoder, and this model has an MLP in its decoder; "
    "use pyro.infer.TraceMeanField_ELBO(), which samples the codes"
)


def require_linear_decoder(model: SparseDictionary) -> None:
    """Raise where the expectation under the decoder has no closed form."""
    if not model.has_linear_decoder:
        raise ValueError(_NEEDS_LINEAR)


def require_full_precision(model: SparseDictionary) -> None:
    """Raise TypeError for a model in half precision: sums and differences need more digits."""
    dtype = model.b_dec.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{type(model).__name__} must be in float32 or float64 for this, got {dtype}; call its "
            "float() first (fit(..., precision='bfloat16') takes products in half precision)"
        )
