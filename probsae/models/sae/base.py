"""What the deterministic SAEs share: a Delta guide under a fixed noise scale."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from probsae.distributions import SpikeSlab, TruncatedNormal
from probsae.distributions.rows import expand_row
from probsae.models.base import SparseDictionary, as_event
from probsae.models.code_posterior import CodePosterior, PointPosterior
from probsae.models.code_priors import typical_code_size
from probsae.models.sae.kept import Support, kept_pre_activations


class DeterministicSAE(SparseDictionary):
    r"""z = f((x - b_dec) W_enc + b_enc), a point; loss |x - x_hat|^2 + sparsity, per token.

    The noise scale is fixed at sqrt(1/2), so that minus the ELBO is the squared error SUMMED over
    d_in, plus minus the log prior density of the codes, plus a constant. To carry over a
    coefficient from a loss with the error AVERAGED over d_in, multiply it by d_in; from one on
    activations divided by s, multiply it by s (an L1 coefficient) or s^2 (an L0 coefficient).

    Subclasses fill `codes` and, where they need them, `auxiliary_loss` and `prior`. The encoder is
    untied, initialised as the decoder's transpose; `fit` sets `b_dec`, which the encoder
    subtracts, to the data's geometric median.

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations, number of features.
    reference_rate : float
        Firing rate of prior draws where the prior density is flat; enters no loss.
    """

    default_learning_rate = 3e-3
    adam_betas = (0.9, 0.999)
    dimensional = ("b_dec", "b_enc")
    varying: ClassVar[tuple[str, ...]] = ("reference_logit",)

    code_size: Tensor

    def __init__(self, d_in: int, d_sae: int, *, reference_rate: float = 0.04):
        super().__init__(d_in, d_sae, noise_scale=math.sqrt(0.5), learn_noise=False)
        self.W_enc = nn.Parameter(self.W_dec.detach().T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.register_buffer("code_size", torch.ones(()))
        rate = min(max(reference_rate, 1e-6), 1 - 1e-6)
        self.reference_logit = math.log(rate / (1 - rate))

    @abstractmethod
    def codes(self, pre_activation: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_sae"]:
        """Apply the non-linearity.

        Parameters
        ----------
        pre_activation : Tensor, shape (token, d_sae)
            What `pre_activation` returned.

        Returns
        -------
        Tensor, shape (token, d_sae)
            The codes, with gradient.
        """

    @property
    def is_deterministic(self) -> bool:
        return True

    def prior(self) -> Distribution:
        """Flat density, so that the squared error is the whole loss; draws are a stand-in's.

        The stand-in is spike-and-slab at the reference rate, half-normal at the data's scale.
        """
        zeros = torch.zeros(self.d_sae, device=self.b_dec.device, dtype=self.b_dec.dtype)
        slab = TruncatedNormal(zeros, self.code_size.expand_as(zeros), validate_args=False)
        reference = SpikeSlab(zeros + self.reference_logit, slab, validate_args=False)
        return as_event(reference.mask(False))

    def pre_activation(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        """Return (x - b_dec) W_enc + b_enc.

        Parameters
        ----------
        x : Tensor, shape (token, d_in)
            Activations.

        Returns
        -------
        Tensor, shape (token, d_sae)
            With gradient.
        """
        product = self.product(x - self.b_dec.detach(), self.W_enc)
        # In place: fresh memory for a sum costs a CPU as much as the product (cpu_steps.md).
        return product.add_(expand_row(self.encoder_bias(), product))

    def encoder_bias(self) -> Float[Tensor, " d_sae"]:
        """Return `b_enc` plus a term that is 0 and carries `b_dec`'s gradient.

        The encoder's input may be x - b_dec.detach() then, which spares a product by every token.
        """
        return self.b_enc + (self.b_dec.detach() - self.b_dec) @ self.W_enc

    def posterior(self, x: Float[Tensor, "token d_in"]) -> CodePosterior:
        pre_activation = self.pre_activation(x)
        z = self.codes(pre_activation)
        return PointPosterior(z, pre_activation)

    def penalty(self, posterior: CodePosterior) -> Float[Tensor, " token"]:
        """Return the sparsity penalty of each token at full weight; 0 where k fixes it.

        Parameters
        ----------
        posterior : CodePosterior
            A point, as `posterior` returned it.

        Returns
        -------
        Tensor, shape (token,)
            Units of the squared error.
        """
        return torch.zeros_like(posterior.mean[:, 0])

    def kl(self, posterior: CodePosterior) -> Float[Tensor, " token"]:
        if not posterior.is_point:
            return super().kl(posterior)
        return torch.zeros_like(posterior.mean[:, 0])  # the prior is flat

    def loss(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, " token"]:
        """Return squared error and sparsity penalty of each token.

        Parameters
        ----------
        x : Tensor, shape (token, d_in)
            Activations.

        Returns
        -------
        Tensor, shape (token,)
            Their sum, with gradient; units of the activations squared.
        """
        posterior = self.posterior(x)
        return (x - self.decode(posterior.mean)).square().sum(-1) + self.penalty(posterior)

    def initialize_codes_(self, x_centered: Float[Tensor, "token d_in"]) -> None:
        self.code_size.fill_(typical_code_size(x_centered))

    def hyperparameters(self) -> dict[str, Any]:
        return {"d_in": self.d_in, "d_sae": self.d_sae}


class KeptCodes(NamedTuple):
    """A batch's codes through those that are not zero."""

    support: Support
    """Which ones are kept."""
    values: Float[Tensor, " kept"]
    """What they are; zero is allowed."""


class KeepingSAE(DeterministicSAE):
    """A kept code is its pre-activation, the others are zero: the products can leave those out.

    Subclasses fill `support` and `expected_l0`, and where they have them `kept_cost` and
    `kept_auxiliary`: together the same loss as `codes`, `prior` and `auxiliary_loss`.

    Attributes
    ----------
    kept_share, kept_share_compiled, kept_share_bfloat16 : float
        Share of the codes up to which a CPU's step through the kept ones is the faster one, beside
        an eager dense step, a compiled one, and one whose products are in bfloat16
        (docs/decisions/kept_codes.md).
    """

    kept_share: ClassVar[float] = 1 / 8
    kept_share_compiled: ClassVar[float] = 1 / 8
    kept_share_bfloat16: ClassVar[float] = 1 / 8

    @abstractmethod
    def support(self, pre_activation: Float[Tensor, "token d_sae"]) -> Support:
        """Choose the codes that are kept; what is not a number is, so that the loss shows it."""

    @abstractmethod
    def expected_l0(self, x: Float[Tensor, "token d_in"]) -> float:
        """Return how many codes of a token are kept, about."""

    def kept_codes(self, x: Float[Tensor, "token d_in"]) -> KeptCodes:
        """Encode `x`, with gradient through the kept codes only."""
        bias, x_centered = self.encoder_bias(), x - self.b_dec.detach()
        with torch.no_grad():
            if self.product_dtype is None:
                pre_activation = torch.addmm(bias, x_centered, self.W_enc)
            else:
                pre_activation = self.product(x_centered, self.W_enc).add_(bias)
        support = self.support(pre_activation)
        kept = kept_pre_activations(x_centered, self.W_enc, bias, pre_activation, support)
        return KeptCodes(support, torch.relu(kept))

    def kept_cost(self, codes: KeptCodes) -> Float[Tensor, " token"]:
        """Return minus the log prior density of the codes; 0 where it is flat."""
        return codes.values.new_zeros(codes.support.n_tokens)

    def kept_auxiliary(
        self,
        x: Float[Tensor, "token d_in"],
        codes: KeptCodes,
        residual: Float[Tensor, "token d_in"],
    ) -> Float[Tensor, " token"] | None:
        """Return `auxiliary_loss`, given what the codes leave of `x`."""
        return None


def check_k(k: int, d_sae: int) -> int:
    """Return `k` if it is a number of features that can be active at once."""
    if not isinstance(k, int | np.integer) or not 1 <= k <= d_sae:
        raise ValueError(f"k must be a whole number between 1 and d_sae={d_sae}, got {k!r}")
    return int(k)
