"""TopK SAE: the k largest pre-activations of each token."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probsae.models.code_posterior import CodePosterior
from probsae.models.sae.base import KeepingSAE, KeptCodes, check_k
from probsae.models.sae.kept import Support
from probsae.processes import ALONE, Processes

# The auxiliary loss counts for at most 1,000 times its coefficient.
_LEAST_UNEXPLAINED = 1e-3


class TopKSAE(KeepingSAE):
    r"""z keeps the k largest of ReLU((x - b_dec) W_enc + b_enc) of each token.

    Features that have not fired for a while are trained by the auxiliary loss: the `k_auxiliary`
    largest pre-activations among them reconstruct what the main codes left over. Its squared error
    is divided by the batch's fraction of variance unexplained: with it as it is, dead features
    would learn more slowly the better the alive ones are.

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations, number of features.
    k : int, default 32 (or d_sae, if that is less)
        Features kept a token.
    auxiliary_coefficient : float, default 1/32
        Weight of the auxiliary squared error over the fraction of variance unexplained; 0 leaves
        it out.
    k_auxiliary : int, optional
        Dead features that take part a token; d_in / 2 where None, at most d_sae / 2.
    dead_after_tokens : int, default 100,000
        Tokens without firing after which a feature counts as dead.

    Notes
    -----
    Source: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", sections 2.3 and A.2;
    both of its losses are relative, to the variance of what they reconstruct.

    Examples
    --------
    >>> model = TopKSAE(d_in=8, d_sae=16, k=3)
    >>> int(model.encode(torch.randn(4, 8)).p_active.sum(-1).max())
    3
    """

    couples_tokens = True
    varying: ClassVar[tuple[str, ...]] = (
        *KeepingSAE.varying,
        "k",
        "dead_after_tokens",
    )

    tokens_since_fired: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int | None = None,
        auxiliary_coefficient: float = 1 / 32,
        k_auxiliary: int | None = None,
        dead_after_tokens: int = 100_000,
    ):
        k = min(32, max(1, d_sae)) if k is None else k
        rate = k / max(1, d_sae) if isinstance(k, int | np.integer) else 0.0  # refused below
        super().__init__(d_in, d_sae, reference_rate=rate)
        if auxiliary_coefficient < 0 or dead_after_tokens < 1:
            raise ValueError(
                "auxiliary_coefficient must be at least 0 and dead_after_tokens at least 1, "
                f"got {auxiliary_coefficient} and {dead_after_tokens}"
            )
        self.k = self.k_max = check_k(k, self.d_sae)
        self.auxiliary_coefficient = float(auxiliary_coefficient)
        self.k_auxiliary = min(k_auxiliary or max(1, d_in // 2), max(1, d_sae // 2))
        self.dead_after_tokens = dead_after_tokens
        self.register_buffer("tokens_since_fired", torch.zeros(self.d_sae))

    def hyperparameters(self) -> dict[str, Any]:
        return {
            **super().hyperparameters(),
            "k": self.k,
            "auxiliary_coefficient": self.auxiliary_coefficient,
            "k_auxiliary": self.k_auxiliary,
            "dead_after_tokens": self.dead_after_tokens,
        }

    def codes(self, pre_activation: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_sae"]:
        return _keep_largest(torch.relu(pre_activation), self.k, self.k_max)

    def support(self, pre_activation: Float[Tensor, "token d_sae"]) -> Support:
        # Of what is below 0 it does not matter which are kept: their codes are 0.
        index = pre_activation.topk(self.k, dim=-1, sorted=False).indices
        return Support.of_index(index, self.d_sae)

    def expected_l0(self, x: Float[Tensor, "token d_in"]) -> float:
        return self.k

    def auxiliary_loss(
        self, x: Float[Tensor, "token d_in"], posterior: CodePosterior, kl_weight: float | Tensor
    ) -> Float[Tensor, " token"] | None:
        z, pre_activation = posterior.mean, posterior.pre_activation
        assert pre_activation is not None
        if self.training:
            self._count((z.detach() > 0).any(0), len(z))
        if self.auxiliary_coefficient == 0:
            return None
        candidates = torch.relu(pre_activation) * self.is_dead
        kept = _keep_largest(candidates, self.k_auxiliary, self.k_auxiliary)
        reconstruction = self.product(kept, self.directions)
        return self._dead_loss(x, x - self.decode(z), reconstruction)

    def kept_auxiliary(
        self,
        x: Float[Tensor, "token d_in"],
        codes: KeptCodes,
        residual: Float[Tensor, "token d_in"],
    ) -> Float[Tensor, " token"] | None:
        if self.training:
            self._count(codes.support.sum_by_feature(codes.values.detach()) > 0, len(x))
        dead = self.is_dead.nonzero().flatten()
        if self.auxiliary_coefficient == 0 or len(dead) == 0:
            return None
        # The dead features' part of every product, with gradient through that alone.
        x_centered = x - self.b_dec.detach()
        pre_activation = x_centered @ self.W_enc[:, dead] + self.encoder_bias()[dead]
        k = min(self.k_auxiliary, len(dead))
        kept = _keep_largest(torch.relu(pre_activation), k, k)
        return self._dead_loss(x, residual, kept @ self.directions[dead])

    @property
    def sharing(self) -> Processes:
        """Processes whose tokens a loss depends on; outside training each is on its own."""
        return self.processes if self.training else ALONE

    @property
    def is_dead(self) -> Bool[Tensor, " d_sae"]:
        """Which features have not fired for `dead_after_tokens` tokens of training."""
        return self.tokens_since_fired >= self.dead_after_tokens

    def _dead_loss(
        self,
        x: Float[Tensor, "token d_in"],
        residual: Float[Tensor, "token d_in"],
        reconstruction: Float[Tensor, "token d_in"],
    ) -> Float[Tensor, " token"]:
        """Return what dead features leave of the `residual` that they are to reconstruct."""
        residual = residual.detach()
        # With few dead features the auxiliary codes cannot explain much: their error counts less.
        share = (self.is_dead.sum() / self.k_auxiliary).clamp(max=1)
        error = (residual - reconstruction).square().sum(-1)
        every = self.sharing
        variance = (x - every.mean(x.mean(0))).square().sum()
        unexplained = every.sum(residual.square().sum()) / every.sum(variance)
        # Tokens that are all alike, or all but explained, leave nothing to divide by.
        unexplained = unexplained.nan_to_num(1.0).clamp(_LEAST_UNEXPLAINED, 1.0)
        return self.auxiliary_coefficient * share * error / unexplained

    @torch.no_grad()
    def _count(self, has_fired: Bool[Tensor, " d_sae"], n_tokens: int) -> None:
        since = self.tokens_since_fired + n_tokens * self.sharing.size
        self.tokens_since_fired.copy_(torch.where(self.sharing.any(has_fired), 0.0, since))


def _keep_largest(values: Tensor, k: int | Tensor, k_max: int) -> Tensor:
    """Set all but the `k` largest of each row to zero; ties are broken, never kept.

    A `k` that is a tensor, at most `k_max`, cuts off by rank.
    """
    if isinstance(k, int):
        largest, index = values.topk(k, dim=-1, sorted=False)
    else:
        largest, index = values.topk(k_max, dim=-1)
        largest = largest * (torch.arange(k_max, device=values.device) < k)
    return torch.zeros_like(values).scatter(-1, index, largest)
