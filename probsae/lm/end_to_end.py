"""Dictionaries trained by what the language model makes of their reconstructions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probsae.activations.hooks import HookPoint, by_context, edited, find_hook, recorded
from probsae.inference.elbo import ElboTerms, Objective, infer_terms
from probsae.lm.contexts import ContextActivations, logits_with, tokens_of
from probsae.models.base import SparseDictionary
from probsae.models.code_posterior import CodePosterior


class EndToEnd:
    r"""A training objective that runs the language model on the reconstruction.

    For `fit(..., objective=...)`. Per token it minimises

        local_weight (-E log p(x | z)) + output_weight KL(y || y_hat)
          + later_weight (mean over later hooks of |a - a_hat|^2 / Var a)
          + kl_weight KL(q(z | x) || p(z)) + the model's auxiliary losses,

    where y and a are the model's next-token distribution and later activations, and y_hat and
    a_hat the same with the reconstruction spliced in. The fourth term is a deterministic SAE's
    sparsity penalty. `later=()` is end-to-end training, with later hooks it is end-to-end training
    with downstream reconstruction, and `local_weight=1, output_weight=0` alone is the ordinary
    objective.

    Where `local_weight` is 0 a learned noise scale is still fitted to what the codes leave over; it
    has no part in the rest. A noise scale that is given (`learn_noise=False`, as for `TargetL0`)
    weighs the errors of the output and of later layers as it weighs the local one, by one over its
    square: the weights are then in squared units of the activations.

    A probabilistic dictionary is spliced in by draws of its posterior, so that it learns what its
    uncertainty costs: codes m + sqrt(v) e with e standard normal, which have the posterior's mean
    and variance and carry gradients into both. A sum over many features is near normal, so the
    output hardly knows them from real draws (the local reparametrisation of Kingma, Salimans and
    Welling, 2015).

    Parameters
    ----------
    contexts : ContextActivations
        The data that `fit` is given too.
    later : sequence of str
        Hooks behind the dictionary's whose activations are to be kept.
    output_weight, later_weight, local_weight : float, default 1, 1 (without effect where `later`
        is empty) and 0
        Weights of the three errors. The output's is in nats, as are the ELBO's terms: at weight 1
        codes would have to pay with nats of description for nats of prediction, of which a token
        has few. Weights of d_in or so leave a usual number of features active.

    Raises
    ------
    ValueError
        If a hook is unknown, a later one does not lie behind the dictionary's, or the language
        model's own weights ask for gradients; when called, if the dictionary's decoder is not
        linear.

    Notes
    -----
    Source: Braun, Taylor, Goldowsky-Dill and Sharkey (2024), "Identifying functionally important
    features with end-to-end sparse dictionary learning", equations 2 and 3. They weigh squared
    errors of later layers as they are; here each layer's is divided by its variance, since
    residual streams grow from layer to layer.
    """

    def __init__(
        self,
        contexts: ContextActivations,
        *,
        later: Sequence[str] = (),
        output_weight: float = 1.0,
        later_weight: float = 1.0,
        local_weight: float = 0.0,
    ):
        network = contexts.model.network
        if min(output_weight, later_weight, local_weight) < 0:
            raise ValueError(
                "weights must be at least 0, got output_weight="
                f"{output_weight}, later_weight={later_weight} and local_weight={local_weight}"
            )
        if any(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError(
                "only the dictionary is trained: call network.requires_grad_(False) first"
            )
        self.contexts = contexts
        self.later = [find_hook(network, name) for name in later]
        _check_behind(contexts, self.later)
        self.output_weight, self.later_weight = output_weight, later_weight
        self.local_weight = local_weight

    def __call__(
        self, model: SparseDictionary, x: Float[Tensor, "token d_in"], kl_weight: float | Tensor
    ) -> Objective:
        posterior, terms = infer_terms(model, x)
        log_likelihood, kl = terms.log_likelihood.mean(), terms.kl.mean()
        errors = self._errors(model, x, posterior)
        extra = model.auxiliary_loss(x, posterior, kl_weight)
        if extra is not None:
            errors = errors + extra.mean()
        log_prior = model.log_prior_parameters()
        if log_prior is not None:
            errors = errors - log_prior / (model.n_tokens or len(x))
        if self.local_weight == 0 and model.learn_noise:
            errors = errors + _noise_gradient(model, terms, posterior)
        total_variance = (x - x.mean(0)).square().sum()
        return Objective(
            loss=kl_weight * kl - self.local_weight * log_likelihood + errors,
            elbo=(log_likelihood - kl).detach(),
            log_likelihood=log_likelihood.detach(),
            kl=kl.detach(),
            auxiliary=errors.detach(),
            fvu=terms.squared_error.detach().sum() / total_variance,
            firing_rate=posterior.p_active.detach().mean(0),
        )

    def _errors(
        self, model: SparseDictionary, x: Float[Tensor, "token d_in"], posterior: CodePosterior
    ) -> Float[Tensor, ""]:
        """Weighted errors of the output and of later layers, per token."""
        if self.output_weight == 0 and not self.later:
            return x.new_zeros(())
        token_ids = self.contexts.contexts_of(x)
        with torch.no_grad(), recorded(self.later) as before:
            logits = self.contexts.model.logits(token_ids)
        reconstruction = model.decode(draw(model, posterior))
        with recorded(self.later) as after:
            spliced = logits_with(self.contexts, token_ids, reconstruction)
        first = self.contexts.first
        error = self.output_weight * output_kl(logits[:, first:], spliced[:, first:])
        for point in self.later:
            y, changed = (
                tokens_of(by_context(seen[point.name], token_ids.shape), first)
                for seen in (before, after)
            )
            fvu = (y - changed).square().sum() / (y - y.mean(0)).square().sum()
            # A model spread over several GPUs has its later layers on others.
            error = error + self.later_weight * fvu.to(error.device) / len(self.later)
        if not (model.is_deterministic or model.learn_noise):
            error = error / model.noise_scale.detach().square().to(error.device)
        return error.to(x.device)


@torch.no_grad()
def _check_behind(contexts: ContextActivations, later: Sequence[HookPoint]) -> None:
    """Raise ValueError for a hook that a replacement at the dictionary's does not move.

    Its error would be 0 whatever the dictionary did.
    """
    token_ids = contexts.token_ids[:1].long()
    with recorded(later) as before:
        contexts.model.logits(token_ids)
    with recorded(later) as after, edited(contexts.point, lambda x: x.flip(-1)):
        contexts.model.logits(token_ids)
    for name in before:
        if torch.equal(before[name], after[name]):
            raise ValueError(
                f"later hooks must lie behind {contexts.hook!r}, got {name!r}, where nothing "
                "changes with the activations there"
            )


def _noise_gradient(
    model: SparseDictionary, terms: ElboTerms, posterior: CodePosterior
) -> Float[Tensor, ""]:
    """Return 0 with the gradient that fits the noise scale to what the codes leave over.

    Without the local error nothing else would train it, and intervals, `refine` and the ELBO
    would stand on the scale that the fit began with.
    """
    left_over = (terms.squared_error + posterior.variance.sum(-1)).mean().detach()
    variance = model.noise_scale.square()
    loss = 0.5 * (left_over / variance + model.d_in * variance.log())
    return loss - loss.detach()


def draw(model: SparseDictionary, posterior: CodePosterior) -> Float[Tensor, "token d_sae"]:
    """Draw codes with the posterior's mean and variance and pathwise gradients into both."""
    if model.is_deterministic:
        return posterior.mean
    # A variance of 0 has an infinite slope under the root.
    variance = posterior.variance.clamp(min=torch.finfo(torch.float32).tiny)
    return posterior.mean + variance.sqrt() * torch.randn_like(variance)


def output_kl(
    logits: Float[Tensor, "context position vocabulary"],
    spliced: Float[Tensor, "context position vocabulary"],
) -> Float[Tensor, ""]:
    """KL(untouched || spliced) of the next token's distribution, nats, mean over positions."""
    before, after = (F.log_softmax(values.flatten(0, 1), dim=-1) for values in (logits, spliced))
    return F.kl_div(after, before, reduction="batchmean", log_target=True)
