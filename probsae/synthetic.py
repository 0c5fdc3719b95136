"""Activations made of known features, to see whether a dictionary finds them.

Source of the generators: Sharkey, Braun and Millidge (2022), "Taking features out of
superposition with sparse autoencoders", and the code of Cunningham et al. (2023). Their forms
mislead in three ways, corrected here:

- firing probabilities decay^i n_active / n_features do not sum to n_active (at decay .99 and 512
  features .97 features are active a token, not 5, and 38% of tokens are empty): renormalised;
- their "correlated" features share one Gaussian draw for a whole batch, so that inside a batch
  they are independent: kept as `"per_batch"`, beside a copula for each token, `"copula"`;
- one of their magnitudes is a product of two uniforms of which only one is returned with the
  codes: `sample` returns exactly the codes that made the activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from probsae.activations.resources import check_count, check_memory, choose_device

Correlation = Literal["copula", "per_batch", "hierarchy"]
Magnitudes = Literal["uniform", "uniform_product"] | tuple[float, float]

# What is drawn from one seed, each in a stream of its own.
Stream = Literal["features", "sample", "batches"]
# Factors of the copula: features share 8 latent causes, with loadings that leave each feature
# half its variance of its own. Correlations of the latent Gaussians then spread over (-.5, .5).
_N_FACTORS, _SHARED_VARIANCE = 8, 0.5
# Of a hierarchy: the most frequent features of each group of four are parents of the others.
_FAMILY = 4
# Below this mean of a magnitude, in its scales, the mass above zero leaves float64.
_LOWEST_MEAN = -36.0


class SyntheticActivations:
    r"""x = z F + noise, with sparse codes z and unit rows of F, all known.

    Feature i fires with probability p_i proportional to decay^i, scaled so that `n_active`
    features are active a token on average.

    Parameters
    ----------
    d_in : int, default 256
        Width of the activations.
    n_features : int, default 512
        Number of true features.
    n_active : float, default 5
        Features active a token, on average.
    decay : float in (0, 1], default 0.99
        Ratio of successive firing probabilities; 1 makes them equal.
    correlation : {None, "copula", "per_batch", "hierarchy"}
        None: features fire independently. "copula": a Gaussian copula for each token, so that
        features co-occur; every feature keeps its firing probability. "per_batch": the original
        form, one Gaussian draw a call scales the probabilities of that call, which are brought
        back to sum to `n_active`; features are independent inside it. "hierarchy": the most
        frequent quarter of the features are parents of three others each, which fire only where
        their parent does; every feature keeps its firing probability.
    magnitudes : {"uniform", "uniform_product"} or (mean, scale)
        Size of an active code: U(0, 1); the product of two such (20% are below .05); or
        Normal(mean, scale) given that it is positive, its mean at least -36 scales.
    noise_scale : float, default 0
        Standard deviation of Gaussian noise in each dimension.
    seed : int, default 0
        Of the features, and of all that is drawn.
    device : str or torch.device, optional
        Where activations are made; the CPU by default.

    Attributes
    ----------
    features : Tensor, shape (n_features, d_in)
        True directions, unit rows.
    firing_probability : Tensor, shape (n_features,)
        Sums to `n_active`.
    parent : Tensor, shape (n_features,)
        Under "hierarchy", the feature without which each does not fire; itself where there is
        none.

    Raises
    ------
    ValueError
        If an argument is outside its range, or `n_active` cannot be reached.

    Examples
    --------
    >>> data = SyntheticActivations(d_in=16, n_features=32, n_active=3, seed=0)
    >>> x, z = data.sample(100)
    >>> bool(torch.allclose(x, z @ data.features))
    True
    """

    def __init__(
        self,
        d_in: int = 256,
        n_features: int = 512,
        n_active: float = 5,
        decay: float = 0.99,
        correlation: Correlation | None = None,
        magnitudes: Magnitudes = "uniform",
        noise_scale: float = 0.0,
        seed: int = 0,
        device: str | torch.device | None = None,
    ):
        _check_arguments(d_in, n_features, n_active, decay, correlation, magnitudes, noise_scale)
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.d_in, self.n_features, self.n_active = d_in, n_features, n_active
        self.decay = decay
        self.correlation: Correlation | None = correlation
        self.magnitudes: Magnitudes = magnitudes
        self.noise_scale, self.seed = noise_scale, seed
        self.device = choose_device(device or "cpu")
        # Drawn on the CPU: the same features on every device.
        generator = self._new_generator("features", torch.device("cpu"))
        features = torch.randn(n_features, d_in, generator=generator)
        self.features = F.normalize(features, dim=-1).to(self.device)
        self.firing_probability = firing_probability(n_features, n_active, decay).to(self.device)
        self.parent = torch.arange(n_features, device=self.device)
        if correlation == "hierarchy":
            self.parent %= max(1, n_features // _FAMILY)
        loadings = torch.randn(n_features, _N_FACTORS, generator=generator)
        loadings = math.sqrt(_SHARED_VARIANCE) * F.normalize(loadings, dim=-1)
        self._loadings = loadings.to(self.device)
        # A feature fires where its standard normal is under this threshold.
        self._threshold = torch.special.ndtri(self.firing_probability.double()).float()
        self._generator = self._new_generator("sample", self.device)

    def sample(
        self, n_tokens: int, seed: int | None = None
    ) -> tuple[Float[Tensor, "token d_in"], Float[Tensor, "token feature"]]:
        """Draw activations and exactly the codes that made them.

        Parameters
        ----------
        n_tokens : int
            Number of tokens.
        seed : int, optional
            Makes the draw repeatable; where None, each call goes on in the source's own stream.

        Returns
        -------
        x : Tensor, shape (n_tokens, d_in)
            Activations.
        z : Tensor, shape (n_tokens, n_features)
            Codes; zero where a feature is not active.

        Raises
        ------
        ValueError
            If `n_tokens` is no whole number of at least 1, or `seed` is below 0.
        MemoryError
            If they would not fit, on a CPU.
        """
        check_count("n_tokens", n_tokens)
        if seed is None:
            return self._draw(n_tokens, self._generator)
        return self._draw(n_tokens, self._new_generator("sample", self.device, seed))

    def batches(
        self, batch_size: int, *, seed: int = 0, device: str | torch.device | None = None
    ) -> Iterator[Float[Tensor, "token d_in"]]:
        """Endless fresh batches; a stream of its own for each (source seed, `seed`).

        Parameters
        ----------
        batch_size : int
            Tokens of a batch, at least 1.
        seed : int, default 0
            Of the stream, at least 0; `sample` draws from none of these.
        device : str or torch.device, optional
            Where to make them; the source's where None.

        Yields
        ------
        Tensor, shape (batch_size, d_in)
            Activations, single precision.

        Raises
        ------
        ValueError
            At the first batch, if `batch_size` or `seed` is out of range.
        MemoryError
            At the first batch, if it would not fit, on a CPU.
        """
        check_count("batch_size", batch_size)
        source = self if device is None else self.to(device)
        generator = self._new_generator("batches", source.device, seed)
        while True:
            yield source._draw(batch_size, generator)[0]

    def __iter__(self) -> Iterator[Float[Tensor, "token d_in"]]:
        return self.batches(1024)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.n_features} features in {self.d_in} dimensions)"

    def to(self, device: str | torch.device) -> SyntheticActivations:
        """Return the same source on another device.

        Parameters
        ----------
        device : str or torch.device
            Where to draw.

        Returns
        -------
        SyntheticActivations
            With the same features, at the start of its stream; itself where it is there already.

        Raises
        ------
        ValueError
            If this machine has no such device.
        """
        if torch.device(device) == self.device:
            return self
        return SyntheticActivations(
            self.d_in,
            self.n_features,
            self.n_active,
            self.decay,
            self.correlation,
            self.magnitudes,
            self.noise_scale,
            self.seed,
            device,
        )

    def _new_generator(self, stream: Stream, device: torch.device, *seeds: int) -> torch.Generator:
        """Return a generator that shares no numbers with another stream, or with the caller's.

        Were features drawn from `manual_seed(seed)` itself, a dictionary made after
        `torch.manual_seed(seed)` would begin at the true features.
        """
        if min(seeds, default=0) < 0:
            raise ValueError(f"seed must be at least 0, got {min(seeds)}")
        key = (get_args(Stream).index(stream), *seeds)
        sequence = np.random.SeedSequence(self.seed, spawn_key=key)
        seed = int(sequence.generate_state(1, np.uint64)[0])
        return torch.Generator(device=device).manual_seed(seed)

    def _draw(self, n_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.device.type == "cpu":  # codes and their uniforms; a GPU says it itself
            n_bytes = 4 * n_tokens * (2 * self.n_features + self.d_in)
            check_memory(n_bytes, f"{n_tokens} tokens of {self.n_features} features")
        is_active = self._support(n_tokens, generator)
        z = self._magnitudes((n_tokens, self.n_features), generator) * is_active
        x = z @ self.features
        if self.noise_scale:
            x += self.noise_scale * torch.randn(x.shape, generator=generator, device=self.device)
        return x, z

    def _support(self, n_tokens: int, generator: torch.Generator) -> Tensor:
        shape, device = (n_tokens, self.n_features), self.device
        if self.correlation is None:
            return torch.rand(shape, generator=generator, device=device) < self.firing_probability
        if self.correlation == "hierarchy":
            return self._support_of_families(torch.rand(shape, generator=generator, device=device))
        n_draws = n_tokens if self.correlation == "copula" else 1
        factors = torch.randn(n_draws, _N_FACTORS, generator=generator, device=device)
        own = torch.randn((n_draws, self.n_features), generator=generator, device=device)
        latent = factors @ self._loadings.T + math.sqrt(1 - _SHARED_VARIANCE) * own
        if self.correlation == "copula":
            return latent < self._threshold
        # One draw a call scales all probabilities, which are then brought back to n_active.
        probability = torch.special.ndtr(latent[0]) * self.firing_probability
        probability *= self.n_active / probability.sum()
        if bool((probability > 1).any()):  # what is above 1 would be missing from the sum
            probability = _clipped_to_sum(probability, self.n_active).to(probability)
        return torch.rand(shape, generator=generator, device=device) < probability

    def _support_of_families(self, uniforms: Tensor) -> Tensor:
        is_child = self.parent != torch.arange(self.n_features, device=self.device)
        given_parent = self.firing_probability / self.firing_probability[self.parent]
        probability = torch.where(is_child, given_parent, self.firing_probability)
        may_fire = uniforms < probability
        return may_fire & (may_fire[:, self.parent] | ~is_child)

    def _magnitudes(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        def uniform() -> Tensor:
            return torch.rand(shape, generator=generator, device=self.device)

        if self.magnitudes == "uniform":
            return uniform()
        if self.magnitudes == "uniform_product":
            return uniform() * uniform()
        assert not isinstance(self.magnitudes, str)
        mean, scale = self.magnitudes
        # By inversion from the upper tail: z = mean - scale ndtri(u ndtr(mean/scale)), float64.
        # erfc has the tail's digits; torch's ndtr is 0 below -8.3.
        mass = 0.5 * math.erfc(-mean / scale / math.sqrt(2))
        tail = uniform().double().clamp(min=1e-12) * mass
        return (mean - scale * torch.special.ndtri(tail)).float().clamp(min=0)


def firing_probability(n_features: int, n_active: float, decay: float) -> Float[Tensor, " feature"]:
    """Return probabilities proportional to decay^i, none above 1, that sum to `n_active`."""
    weight = decay ** torch.arange(n_features, dtype=torch.float64)
    return _clipped_to_sum(weight, n_active).float()


def _clipped_to_sum(weight: Float[Tensor, " feature"], total: float) -> Float[Tensor, " feature"]:
    """Return min(1, c weight), in float64 on the CPU, with the c that makes its sum `total`."""
    weight = weight.double().cpu()
    low, high = 0.0, len(weight) / float(weight.min().clamp(min=1e-300))
    # To the last digit: c may be hundreds of factors of 2 below the first guess.
    while low < (factor := (low + high) / 2) < high:
        is_short = float((factor * weight).clamp(max=1).sum()) < total
        low, high = (factor, high) if is_short else (low, factor)
    probability = (high * weight).clamp(max=1)
    if float(probability.sum()) < 0.999 * total:
        raise ValueError(
            f"n_active={total} cannot be reached: the rarest features' probabilities are below "
            "what float64 holds; use a decay nearer to 1"
        )
    return probability


def _check_arguments(d_in, n_features, n_active, decay, correlation, magnitudes, noise_scale):
    check_count("d_in", d_in)
    check_count("n_features", n_features)
    check_memory(4 * d_in * n_features, f"{n_features} features in {d_in} dimensions")
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}")
    if not 0 < n_active <= n_features:
        raise ValueError(f"n_active must be in (0, n_features={n_features}], got {n_active}")
    if correlation is not None and correlation not in get_args(Correlation):
        raise ValueError(
            f"correlation must be None or one of {get_args(Correlation)}, got {correlation!r}"
        )
    if correlation == "hierarchy" and decay == 1:
        raise ValueError(
            "decay must be below 1 under correlation='hierarchy': where children are as frequent "
            "as their parent they fire whenever it does, and cannot be told from it"
        )
    if not 0 <= noise_scale < math.inf:
        raise ValueError(f"noise_scale must be at least 0 and finite, got {noise_scale}")
    if isinstance(magnitudes, list | tuple) and len(magnitudes) == 2:
        mean, scale = magnitudes
        is_known = math.isfinite(mean) and 0 < scale < math.inf and mean >= _LOWEST_MEAN * scale
    else:
        is_known = magnitudes in ("uniform", "uniform_product")
    if not is_known:
        raise ValueError(
            "magnitudes must be 'uniform', 'uniform_product' or (mean, scale) with scale > 0 and "
            f"mean >= {_LOWEST_MEAN:g} scale, got {magnitudes!r}"
        )
