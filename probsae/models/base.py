"""What every dictionary shares: parameters, hooks, and the Pyro programs made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from probsae.activations.geometric_median import geometric_median
from probsae.activations.resources import check_memory
from probsae.activations.scaling import limit_norms
from probsae.activations.source import check_activations
from probsae.distributions.rows import expand_row
from probsae.models.code_posterior import CodePosterior, check_codes
from probsae.models.programs import as_event, generate, infer
from probsae.processes import ALONE, Processes

__all__ = ["N_FIRST_CODES", "SparseDictionary", "as_event"]

# Tokens that the encoder's first scale and threshold are taken from: right to a percent.
N_FIRST_CODES = 1_024


class SparseDictionary(nn.Module, ABC):
    r"""x = z W_dec + b_dec + noise, with sparse codes z; probabilistic and deterministic alike.

    Subclasses fill the hooks `prior`, `posterior`, `hyperparameters` and, where they need them,
    `initialize_codes_`, `auxiliary_loss`, `kl`, `log_prior_parameters`, `correction`.

    Parameters
    ----------
    d_in : int
        Width of the activations.
    d_sae : int
        Number of features.
    noise_scale : float
        Standard deviation of the noise in each dimension, units of the activations.
    noise_floor : float
        Lower bound of a learned noise scale, same units. Without one, data that the dictionary
        explains fully drive the scale to 0 and the ELBO to infinity. A fit sets it from the data
        where it is 0.
    learn_noise : bool
        Whether `noise_scale` is a parameter.

    Notes
    -----
    All quantities are in the units of the activations that the model is given: nothing is
    rescaled on the way in or out. The rows of `W_dec` enter every computation normalised, so the
    gradient's part along a row vanishes before any optimiser sees it; `fit` also stores them
    normalised after each step.
    """

    default_learning_rate: float = 3e-3
    """Step size of `fit` where none is given."""

    dimensional: tuple[str, ...] = ("b_dec",)
    """Parameters in units of the activations: their learning rate is multiplied by the data's
    scale, so that a fit does not depend on those units."""

    code_scales: ClassVar[tuple[str, ...] | None] = None
    """Parameters in units of each feature's code, last axis d_sae; those named `log_` are
    logarithms. None where the encoder cannot follow a change of these units or directions."""

    shortened_at_start: ClassVar[tuple[str, ...]] = ()
    """Filters of an encoder in one step, which `initialize_` scales until it no longer overshoots.
    One with lateral steps sees to that itself, and one that k limits hardly does."""

    frozen_in_warmup: tuple[str, ...] = ()
    """Parameters that `fit` leaves alone until the KL weight has reached 1."""

    learning_rate_factors: Mapping[str, float] = MappingProxyType({"log_noise_scale": 5.0})
    """Learning rates of single parameters, as multiples of the fit's. Every dimension of every
    token informs the noise scale: it can follow at once what the others leave unexplained."""

    schedule_defaults: Mapping[str, float] = MappingProxyType({})
    """Arguments of `inference.Schedule` where `fit` is given none, as far as they differ."""

    couples_tokens: bool = False
    """Whether a token's loss depends on its batch, or training counts its calls: such a model is
    given whole batches."""

    varying: ClassVar[tuple[str, ...]] = ()
    """Numbers among the attributes that the loss takes as tensors too: members of one stacked
    ensemble may differ in them. One that sets a size, `k`, comes with a `k_max` that then is the
    members' largest."""

    adam_betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of Adam's moments in `fit`."""

    processes: Processes = ALONE
    """Those that share a fit, while it lasts: a model that `couples_tokens` asks the others about
    theirs."""

    noise_floor: Tensor
    noise_factor: Tensor
    is_initialized: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        noise_scale: float = 1.0,
        noise_floor: float = 0.0,
        learn_noise: bool = True,
    ):
        super().__init__()
        for name, value in (("d_in", d_in), ("d_sae", d_sae)):
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not (noise_scale > 0 and noise_floor >= 0):
            raise ValueError(
                f"noise_scale must be positive and noise_floor at least 0, "
                f"got {noise_scale} and {noise_floor}"
            )
        # Encoder and decoder, float32; a fit takes four times as much.
        check_memory(8 * int(d_in) * int(d_sae), f"{d_sae} features in {d_in} dimensions")
        self.d_in, self.d_sae, self.learn_noise = int(d_in), int(d_sae), learn_noise
        self._noise_given = (float(noise_scale), float(noise_floor))
        self.n_tokens: int | None = None
        self.product_dtype: torch.dtype | None = None
        self.W_dec = nn.Parameter(F.normalize(torch.randn(d_sae, d_in), dim=-1))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.log_noise_scale = nn.Parameter(
            torch.tensor(float(noise_scale)).log(), requires_grad=learn_noise
        )
        self.register_buffer("noise_floor", torch.tensor(float(noise_floor)))
        # What a fit multiplies the floor by while it lasts.
        self.register_buffer("noise_factor", torch.ones(()), persistent=False)
        self.register_buffer("is_initialized", torch.tensor(False))

    # ------------------------------------------------------------------ hooks

    @abstractmethod
    def prior(self) -> Distribution:
        """Distribution of one token's codes, event shape (d_sae,)."""

    @abstractmethod
    def posterior(self, x: Float[Tensor, "token d_in"]) -> CodePosterior:
        """q(z | x), differentiable in the parameters.

        Parameters
        ----------
        x : Tensor, shape (token, d_in)
            Activations, not centred.

        Returns
        -------
        CodePosterior
            Of shape (token, d_sae), units of the activations.
        """

    @abstractmethod
    def hyperparameters(self) -> dict[str, Any]:
        """Return the constructor's arguments, JSON-ready: a saved model is rebuilt from them."""

    def initialize_codes_(self, x_centered: Float[Tensor, "token d_in"]) -> None:
        """Set scales of the prior and encoder from centred data.

        Parameters
        ----------
        x_centered : Tensor, shape (token, d_in)
            Activations less `b_dec`, massive ones shortened where a fit begins.
        """

    def auxiliary_loss(
        self, x: Float[Tensor, "token d_in"], posterior: CodePosterior, kl_weight: float | Tensor
    ) -> Float[Tensor, " token"] | None:
        """Training loss beside the ELBO, nats per token (a deterministic SAE's squared error).

        Parameters
        ----------
        x : Tensor, shape (token, d_in)
            Activations of a step.
        posterior : CodePosterior
            What `posterior` returned for them, with gradient.
        kl_weight : float or Tensor
            Weight of the KL term in this step, from 0 to 1.

        Returns
        -------
        Tensor, shape (token,), or None
            Added to the loss as it is: what the KL weight anneals, it weighs itself. None adds
            nothing.
        """
        return None

    def kl(self, posterior: CodePosterior) -> Float[Tensor, " token"]:
        """Return KL(q(z | x) || p(z)) of each token, nats; of a point, minus its log density.

        Parameters
        ----------
        posterior : CodePosterior
            Of shape (token, d_sae).

        Returns
        -------
        Tensor, shape (token,)
            Nats, at full weight.

        Raises
        ------
        NotImplementedError
            If torch knows no closed form for the two laws.
        """
        return kl_divergence(as_event(posterior.distribution), self.prior())

    def kl_of_own(self, posterior: CodePosterior) -> Float[Tensor, " token"]:
        """Return the `kl` of what `posterior` has just returned, before anything has changed.

        A family may know more of it than of any posterior, and find it for less.

        Parameters
        ----------
        posterior : CodePosterior
            As it was returned.

        Returns
        -------
        Tensor, shape (token,)
            Nats, at full weight.
        """
        return self.kl(posterior)

    def log_prior_parameters(self) -> Tensor | None:
        """Log-density of learned parameters that have a prior (the firing rates), nats."""
        return None

    def correction(self, z: Tensor) -> Tensor | None:
        """Non-linear part of the decoder; None where the decoder is linear.

        Parameters
        ----------
        z : Tensor, shape (*batch, d_sae)
            Codes, units of the activations.

        Returns
        -------
        Tensor, shape (*batch, d_in), or None
            What `decode` adds to z W_dec + b_dec, units of the activations.
        """
        return None

    # ------------------------------------------------------------- shared face

    @property
    def has_linear_decoder(self) -> bool:
        """Whether the exact ELBO applies."""
        return type(self).correction is SparseDictionary.correction

    @property
    def is_deterministic(self) -> bool:
        """Whether the posterior is a point."""
        return False

    @property
    def directions(self) -> Float[Tensor, "d_sae d_in"]:
        """Unit rows of `W_dec`, with gradient."""
        return F.normalize(self.W_dec, dim=-1)

    @property
    def noise_given(self) -> dict[str, float | bool]:
        """The constructor's arguments of the noise, as they were given; for `hyperparameters`."""
        scale, floor = self._noise_given
        return {"noise_scale": scale, "noise_floor": floor, "learn_noise": self.learn_noise}

    @property
    def noise_scale(self) -> Tensor:
        """Standard deviation of the noise in each dimension, at least `noise_floor`."""
        scale = self.log_noise_scale.exp()
        # The gradient passes the floor: a scale that lies on it can rise again.
        return scale + (self.noise_floor * self.noise_factor - scale).clamp(min=0).detach()

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply a @ b in `product_dtype` where one is set, and return a's own dtype.

        In bfloat16 both factors and the product are rounded, once each; residuals and sums are
        taken of what it returns, in float32. Rounding the product itself adds half as much again
        to the factors' part: 4.8e-6 -> 7.1e-6 of the variance with 20 codes of size .2 to 1.2 in
        256 dimensions, beside a default noise floor of 4e-2. A product of bfloat16 factors in
        float32 would spare that, but torch has one on CUDA only (`mm` with `out_dtype`).

        Parameters
        ----------
        a, b : Tensor, shapes (*batch, inner) and (inner, outer)
            Two factors of one dtype.

        Returns
        -------
        Tensor, shape (*batch, outer)
            With gradient; in the dtype of `a`.
        """
        if self.product_dtype is None:
            return a @ b
        return (a.to(self.product_dtype) @ b.to(self.product_dtype)).to(a.dtype)

    def dictionary(self) -> Float[Tensor, "d_sae d_in"]:
        """Return the features' directions: unit rows, detached."""
        return self.directions.detach()

    def encode(self, x: Tensor | np.ndarray, refine: bool = False) -> CodePosterior:
        """Return the posterior of the codes of `x`, without gradient, in evaluation mode.

        Parameters
        ----------
        x : tensor or array, shape (token, d_in)
            Activations, in the units of the fit.
        refine : bool, default False
            Improve it by coordinate ascent, see `probsae.refine`.

        Raises
        ------
        ValueError
            If `x` has another width, no rows, or values that are not finite.
        MemoryError
            If the codes would not fit: encode fewer tokens at a time.
        TypeError
            If it is to be refined and the prior is not spike-and-slab.
        """
        if refine:
            from probsae.inference.refine import refine as refined  # it imports the models

            return refined(self, x)
        x = check_activations(x, self.d_in, self.b_dec.dtype).to(self.b_dec)
        if not x.is_cuda:  # mean and p_active, at least; a GPU says it itself
            n_bytes = 2 * len(x) * self.d_sae * x.element_size()
            check_memory(n_bytes, f"the codes of {len(x)} tokens, {self.d_sae} features")
        with torch.no_grad(), in_evaluation(self):
            return self.posterior(x)

    def decode(self, z: Float[Tensor, "*batch d_sae"] | np.ndarray) -> Float[Tensor, "*batch d_in"]:
        """Return the activations that codes stand for, with gradient.

        Parameters
        ----------
        z : tensor or array, shape (*batch, d_sae)
            Codes, units of the activations: a posterior's mean, or draws of it.

        Returns
        -------
        Tensor, shape (*batch, d_in)
            Units of the activations, in the model's precision and on its device.

        Raises
        ------
        ValueError
            If `z` has not d_sae columns.
        TypeError
            If it is a posterior.
        """
        z = check_codes(z, self.d_sae).to(self.b_dec)
        product = self.product(z, self.directions)
        x_hat = product.add_(expand_row(self.b_dec, product))
        correction = self.correction(z)
        return x_hat if correction is None else x_hat + correction

    def forward(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
        """Reconstruct `x` from the posterior mean of its codes, with gradient.

        Parameters
        ----------
        x : Tensor, shape (token, d_in)
            Activations, in the model's precision and on its device; not checked, see `encode`.

        Returns
        -------
        Tensor, shape (token, d_in)
            Units of the activations.
        """
        return self.decode(self.posterior(x).mean)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters().items())

    def fit(self, data: Any, **options: Any) -> SparseDictionary:
        """Fit to `data` through `probsae.fit` and return self; options are passed on.

        Parameters
        ----------
        data
            Activations, in any of the forms that `probsae.fit` takes.
        **options
            Further arguments of `probsae.fit`, which has the errors too.

        Returns
        -------
        SparseDictionary
            Itself, fitted.
        """
        from probsae.inference.fit import fit  # the engine imports the models, not they it

        fit(self, data, **options)
        return self

    @torch.no_grad()
    def sample(self, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Draw activations from the model, with torch's global generator.

        Parameters
        ----------
        n_tokens : int
            How many.

        Returns
        -------
        x : Tensor, shape (n_tokens, d_in)
            Activations, their noise included.
        z : Tensor, shape (n_tokens, d_sae)
            The codes that made them, drawn from the prior.
        """
        z = self.prior().expand((n_tokens,)).sample()
        x_hat = self.decode(z)
        return x_hat + self.noise_scale * torch.randn_like(x_hat), z

    @torch.no_grad()
    def scale_noise_(self, factor: Tensor) -> None:
        """Multiply the noise scale, and all that the encoder takes for noise.

        Parameters
        ----------
        factor : Tensor, shape ()
            Above 0.
        """
        self.log_noise_scale.add_(factor.log())

    @torch.no_grad()
    def set_rows_(self, rows: Float[Tensor, "d_sae d_in"]) -> None:
        """Take `rows`, of any norm above 0, for the dictionary.

        Their norms go into the units of the codes (`code_scales`), and the encoder's filters turn
        with the directions.

        Parameters
        ----------
        rows : Tensor, shape (d_sae, d_in)
            In the model's precision and on its device.

        Raises
        ------
        TypeError
            If the encoder cannot follow; nothing is changed then.
        """
        if self.code_scales is None:
            raise TypeError(f"the encoder of {type(self).__name__} cannot follow its dictionary")
        norms = rows.norm(dim=1)
        directions = rows / norms[:, None]
        self.get_parameter("W_enc").add_((directions - self.directions).T)
        self.W_dec.copy_(directions)
        for name in self.code_scales:
            parameter = self.get_parameter(name)
            if name.rpartition(".")[2].startswith("log_"):
                parameter.add_(norms.log())
            else:
                parameter.mul_(norms)

    @torch.no_grad()
    def normalize_(self) -> None:
        """Store unit rows of `W_dec`, and the noise scale itself where its floor binds.

        That changes nothing that the model computes; families add bounds of their own.
        """
        self.W_dec.copy_(self.directions)
        if self.learn_noise:
            self.log_noise_scale.copy_(self.noise_scale.log())

    @torch.no_grad()
    def initialize_(self, x: Float[Tensor, "token d_in"]) -> None:
        """Set location and scales from data, once; called by `fit` with its first tokens.

        `b_dec` becomes the geometric median, the noise scale the data's deviation per dimension
        (nothing is explained yet), and the noise floor, where none was given, a fifth of that:
        4% of the variance. Massive tokens are shortened first: they say nothing of the others.
        The encoder's filters are scaled so that the first reconstruction is no larger than fits.

        Parameters
        ----------
        x : Tensor, shape (token, d_in)
            Activations. Nothing is done with them where the model is initialised already.

        Raises
        ------
        ValueError
            If `x` has another width, no rows, or values that are not finite.
        TypeError
            If it is neither a tensor nor an array of real numbers.
        """
        if bool(self.is_initialized):
            return
        x = check_activations(x, self.d_in, self.b_dec.dtype).to(self.b_dec)
        self.b_dec.copy_(geometric_median(x))
        x_centered = limit_norms(x - self.b_dec)
        # Equal tokens have no deviation: what rounding leaves of their size stands in for it.
        least = torch.finfo(x.dtype).eps * x.abs().max().clamp(min=torch.finfo(x.dtype).eps)
        deviation = x_centered.square().mean().sqrt().clamp(min=least)
        if self.learn_noise:
            self.log_noise_scale.copy_(deviation.log())
            if self.noise_floor == 0:
                self.noise_floor.copy_(0.2 * deviation)
        self.initialize_codes_(x_centered)
        if self.shortened_at_start:
            self._shorten_encoder_(x_centered[:N_FIRST_CODES])
        self.is_initialized.fill_(True)

    def _shorten_encoder_(self, x_centered: Float[Tensor, "token d_in"]) -> None:
        """Scale the filters by the slope, at most 1, of tokens against their reconstructions.

        Filters that are their directions explain a token some d_sae / d_in times over. From there
        gradients shut most features before they have moved anywhere.
        """
        x_hat = self.decode(self.encode(x_centered + self.b_dec).mean)
        deviation = x_hat - x_hat.mean(0)
        factor = (x_centered * deviation).sum() / deviation.square().sum()
        if 0 < factor < 1:
            for name in self.shortened_at_start:
                self.get_parameter(name).mul_(factor)

    # ------------------------------------------------------------ Pyro programs

    @final
    def model(
        self, x: Tensor | None = None, kl_weight: float | Tensor = 1.0, n_tokens: int = 1
    ) -> Tensor:
        """Pyro program of the generative model; with `x` None it draws `n_tokens` tokens.

        Parameters
        ----------
        x : Tensor, shape (token, d_in), optional
            Activations to condition on.
        kl_weight : float or Tensor, default 1
            Weight of the codes' log density, at least 0.
        n_tokens : int, default 1
            How many to draw; without effect where `x` is given.

        Returns
        -------
        Tensor, shape (token, d_in)
            `x`, or what was drawn.
        """
        return generate(self, x, kl_weight, n_tokens)

    @final
    def guide(
        self, x: Tensor | None = None, kl_weight: float | Tensor = 1.0, n_tokens: int = 1
    ) -> Tensor:
        """Pyro program of the posterior: the encoder.

        Parameters
        ----------
        x : Tensor, shape (token, d_in)
            Activations.
        kl_weight : float or Tensor, default 1
            As for `model`.
        n_tokens : int, default 1
            Without effect; Pyro gives the guide what it gives the model.

        Returns
        -------
        Tensor, shape (token, d_sae)
            Codes drawn for `x`.

        Raises
        ------
        ValueError
            If `x` is None.
        """
        return infer(self, x, kl_weight)


@contextmanager
def in_evaluation(model: SparseDictionary) -> Iterator[None]:
    """Hold `model` in evaluation mode inside a with-block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
