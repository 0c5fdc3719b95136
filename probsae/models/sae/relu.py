"""ReLU SAE with an L1 penalty: the maximum a posteriori form of the Laplace dictionary."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pyro.distributions import Exponential  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor
from torch.distributions import Distribution

from probsae.models.base import as_event
from probsae.models.code_posterior import CodePosterior
from probsae.models.sae.base import KeepingSAE, KeptCodes
from probsae.models.sae.kept import Support

# Tokens of a batch that show how sparse its codes are: so many, or a sixteenth of it.
_N_PROBED = 64


class ReLUSAE(KeepingSAE):
    r"""z = ReLU((x - b_dec) W_enc + b_enc); loss |x - x_hat|^2 + l1_coefficient |z|_1, per token.

    The prior is Exponential: with noise variance 1/2 its rate is the coefficient exactly.

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations, number of features.
    l1_coefficient : float, default 0.1
        Weight of the codes' sum, in units of the activations: the penalty pulls a lone code down
        by half of it. Warmed up with the KL weight. See `DeterministicSAE` for conversions.

    Notes
    -----
    Source: Bricken et al. (2023), "Towards monosemanticity"; Cunningham et al. (2023).

    Examples
    --------
    >>> model = ReLUSAE(d_in=8, d_sae=16, l1_coefficient=0.05)
    >>> bool((model.encode(torch.randn(4, 8)).mean >= 0).all())
    True
    """

    shortened_at_start = ("W_enc",)
    # The other SAEs' dense steps choose among all codes, and choosing does not compile.
    kept_share = 1 / 16
    kept_share_compiled = 1 / 32
    kept_share_bfloat16 = 0.0
    varying: ClassVar[tuple[str, ...]] = (*KeepingSAE.varying, "l1_coefficient")

    def __init__(self, d_in: int, d_sae: int, *, l1_coefficient: float = 0.1):
        if not l1_coefficient > 0:
            raise ValueError(f"l1_coefficient must be positive, got {l1_coefficient}")
        super().__init__(d_in, d_sae)
        self.l1_coefficient = float(l1_coefficient)

    def hyperparameters(self) -> dict[str, Any]:
        return {**super().hyperparameters(), "l1_coefficient": self.l1_coefficient}

    def codes(self, pre_activation: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_sae"]:
        return torch.relu(pre_activation)

    def support(self, pre_activation: Float[Tensor, "token d_sae"]) -> Support:
        return Support.of_mask(~(pre_activation <= 0))

    @torch.no_grad()
    def expected_l0(self, x: Float[Tensor, "token d_in"]) -> float:
        n_tokens = min(_N_PROBED, -(-len(x) // 16))
        pre_activation = self.pre_activation(x[:n_tokens])
        return float((pre_activation > 0).sum()) / len(pre_activation)

    def kept_cost(self, codes: KeptCodes) -> Float[Tensor, " token"]:
        normalizer = self.d_sae * math.log(self.l1_coefficient)
        return self.l1_coefficient * codes.support.sum_by_token(codes.values) - normalizer

    def penalty(self, posterior: CodePosterior) -> Float[Tensor, " token"]:
        return self.l1_coefficient * posterior.mean.sum(-1)

    def kl(self, posterior: CodePosterior) -> Float[Tensor, " token"]:
        if not posterior.is_point:
            return super().kl(posterior)
        # One rate for all: through their sum a step has five passes less over the codes.
        rate: float | Tensor = self.l1_coefficient  # a tensor in a stacked ensemble
        log_rate = rate.log() if isinstance(rate, Tensor) else math.log(rate)
        return self.penalty(posterior) - self.d_sae * log_rate

    def prior(self) -> Distribution:
        rate = self.l1_coefficient * torch.ones_like(self.b_enc)
        return as_event(Exponential(rate, validate_args=False))
