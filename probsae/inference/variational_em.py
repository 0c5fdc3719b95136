"""One round of variational EM: codes, sums over tokens, and the optimum of the rest given them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Beta, Distribution, Gamma, kl_divergence

from probsae.distributions import SpikeSlab
from probsae.inference.dictionary_posterior import DictionaryPosterior
from probsae.inference.dictionary_statistics import DictionaryStatistics, Rows
from probsae.inference.elbo import elbo_terms, require_full_precision, require_linear_decoder
from probsae.inference.refine import Refinement, code_law
from probsae.inference.step_errors import StepErrors, observed_information
from probsae.models.base import SparseDictionary
from probsae.models.code_posterior import CodePosterior
from probsae.models.code_priors import learned_spike_slab
from probsae.processes import Processes

# How often a pass that lowers the held-out ELBO is halved before it is given up.
_N_HALVINGS = 4
# Length of the step that a probe takes, over the uncertainty of its row. Rare rows are uncertain by
# .2 rad, and codes do not answer to such a step in proportion: their observed information came out
# as .88 where that of their own steps was .92, and does not change below a quarter.
_PROBE_SCALE = 0.25


class Expectation:
    """Posterior of the codes: refined where the prior is spike-and-slab, else the encoder's.

    With `compile` the first is compiled, see `Refinement`.
    """

    def __init__(
        self, model: SparseDictionary, n_sweeps: int, n_candidates: int, compile: bool = False
    ):
        if model.is_deterministic:
            raise TypeError(f"{type(model).__name__} has no posterior to polish with")
        require_linear_decoder(model)
        require_full_precision(model)
        if model.code_scales is None:
            raise TypeError(
                "polish needs an encoder that can follow the dictionary, and the one of "
                f"{type(model).__name__} is an MLP; use SpikeSlabDictionary, "
                "RectifiedGaussianDictionary or LaplaceDictionary"
            )
        self.model = model
        self.infer: Callable[[Tensor], CodePosterior] = model.encode
        if isinstance(code_law(model), SpikeSlab):
            self.infer = Refinement(model, n_sweeps, n_candidates, compile)

    def __call__(self, x: Float[Tensor, "token d_in"]) -> CodePosterior:
        return self.infer(x)


class Sums:
    """What the optimum of everything but the codes depends on, summed over tokens."""

    def __init__(self, model: SparseDictionary, block_size: int, prior_weight: float):
        self.model, self.block_size, self.prior_weight = model, block_size, prior_weight
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self.dictionary = DictionaryStatistics(self.model.dictionary(), self.block_size)
        self.n_tokens = 0.0
        zeros = self.dictionary.directions.new_zeros(self.model.d_sae)
        self.n_active, self.code = zeros, zeros.clone()
        self.log_present = zeros.clone()  # sum of -log q(z = 0)
        self.squared_error = zeros.new_zeros(())

    def fade(self, factor: float) -> None:
        """Weigh all tokens seen so far by `factor`."""
        self.dictionary.fade(factor)
        for name in ("n_tokens", "n_active", "code", "log_present", "squared_error"):
            setattr(self, name, getattr(self, name) * factor)

    def add(self, x: Float[Tensor, "token d_in"], q: CodePosterior) -> None:
        """Take in some tokens."""
        mean, variance = q.mean, q.variance
        self.move()
        error = self.dictionary.add(mean, variance, x - self.model.b_dec)
        self.n_tokens += len(x)
        self.n_active += q.p_active.sum(0).double()
        self.code += mean.sum(0).double()
        self.squared_error += error + variance.sum().double()
        if isinstance(q.distribution, SpikeSlab):
            self.log_present += F.softplus(q.distribution.logits).sum(0).double()

    def skip(self, n_tokens: int) -> None:
        """Pass over tokens that other processes take in: halves are of all processes' tokens."""
        self.dictionary.skip(n_tokens)

    def join(self, processes: Processes) -> None:
        """Take in the tokens of all `processes`, which refer to the same dictionary."""
        n_tokens = self.squared_error.new_tensor(self.n_tokens)
        sums = (n_tokens, self.n_active, self.code, self.log_present, self.squared_error)
        processes.add_([*sums, self.dictionary.half_gradients, self.dictionary.second_moment])
        self.n_tokens = float(n_tokens)

    def move(self) -> None:
        """Refer to the model's present dictionary."""
        directions = self.model.dictionary().double()
        if not torch.equal(directions, self.dictionary.directions):
            self.squared_error -= self.dictionary.gain(directions)
            self.dictionary.move(directions)

    def scale(self, factor: Float[Tensor, " d_sae"]) -> None:
        """Measure codes in units that are smaller by `factor`."""
        self.dictionary.scale(factor)
        self.code *= factor


class Maximum(NamedTuple):
    """The optimum of everything but the codes, and how far off it and the fit are."""

    posterior: DictionaryPosterior
    errors: StepErrors


@torch.no_grad()
def maximize(model: SparseDictionary, sums: Sums, probe: Probe | None = None) -> Maximum:
    """Set all of `model` but the codes' law to its optimum; return how certain that is.

    With a `probe` the dictionary goes on to where EM would end, with the errors that the tokens'
    halves tell (`StepErrors`); without one, the rows' own are taken for true. A feature that the
    tokens do not show keeps its direction and slab: those of codes near zero, which are probable
    by the thousand and fit noise, would take their place.
    """
    sums.move()
    anchor = sums.prior_weight * active_energy(model).double()
    rows = sums.dictionary.solve(anchor)
    noise_precision = _noise_posterior(model, sums, rows, anchor)
    rate, log_odds = _feature_posteriors(model, sums, rows, noise_precision)
    is_shown = torch.ones_like(anchor, dtype=torch.bool) if log_odds is None else log_odds > 0
    variance = rows.relative_variance / noise_precision.mean
    errors = StepErrors.stated(variance)
    if probe is not None:
        information = probe(_PROBE_SCALE * variance.sqrt() * is_shown)
        energy = _second_moment(code_law(model))
        errors = StepErrors.of(sums.dictionary, rows, is_shown, variance, information, energy)
    step = (rows.mean - sums.dictionary.directions) * is_shown[:, None]
    rows = rows._replace(mean=sums.dictionary.directions + step / errors.observed[:, None])
    norms = rows.mean.norm(dim=1)
    if probe is not None:
        norms = _without_noise(norms, model.d_in * variance * errors.variance * is_shown)
    if log_odds is not None:
        _set_slabs(model, sums, is_shown)
    model.set_rows_((F.normalize(rows.mean, dim=1) * norms[:, None]).to(model.W_dec.dtype))
    sums.scale(norms)
    prior = learned_spike_slab(model)
    if prior is not None:
        a, b = rate.concentration1, rate.concentration0
        prior.rate_logit.copy_(torch.digamma(a) - torch.digamma(b))  # E log odds
    if model.learn_noise:
        model.log_noise_scale.copy_(-0.5 * noise_precision.mean.log())
    model.normalize_()
    rows = rows.scaled(norms).spread(errors.variance)
    return Maximum(DictionaryPosterior(rows, rate, noise_precision, log_odds, []), errors)


def _without_noise(
    norms: Float[Tensor, " d_sae"], squared_error: Float[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    """Return the norms of rows that are off by `squared_error`, but for what that adds to them.

    Norms go into the units of the codes, and the error lengthens rare features' rows by some 5%.
    """
    square = norms.square()
    return (square - squared_error).maximum(square / 4).sqrt()


class Probe:
    """Asks some tokens how much of the information on a step of the dictionary they hold."""

    def __init__(self, expectation: Expectation, x: Float[Tensor, "token d_in"]):
        self.expectation, self.x = expectation, x

    def __call__(self, scale: Float[Tensor, " d_sae"]) -> tuple[Tensor, Tensor]:
        """Return `observed_information` along a random step of `scale` from the dictionary."""
        model = self.expectation.model
        before = self._codes()
        kept = {name: p.detach().clone() for name, p in model.named_parameters()}
        directions = model.dictionary().clone()
        generator = torch.Generator().manual_seed(0)
        step = torch.randn(directions.shape, generator=generator).to(directions)
        step *= scale[:, None].to(directions)
        model.set_rows_(F.normalize(directions + step, dim=1))
        after = self._codes()
        taken = model.dictionary() - directions
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
        return observed_information(before, after, self.x - model.b_dec, directions, taken)

    def _codes(self) -> tuple[Tensor, Tensor]:
        q = self.expectation(self.x)
        return q.mean, q.variance


def active_energy(model: SparseDictionary) -> Float[Tensor, " d_sae"]:
    """Return E z^2 of each feature's active code under the prior."""
    law = code_law(model)
    return _second_moment(getattr(law, "slab", law))


def _second_moment(law: Distribution) -> Tensor:
    return law.variance + law.mean.square()


def _noise_posterior(model: SparseDictionary, sums: Sums, rows: Rows, anchor: Tensor) -> Gamma:
    """Return q(1 / noise variance), under a flat prior of its logarithm."""
    noise_variance = model.noise_scale.square().double()
    gain = sums.dictionary.gain(rows.mean)
    n_fitted = (1 - anchor * rows.relative_variance).sum()  # trace of (S + P)^-1 S
    error = sums.squared_error - gain + model.d_in * noise_variance * n_fitted
    if not model.learn_noise:
        error = noise_variance * sums.n_tokens * model.d_in
    n_numbers = torch.as_tensor(sums.n_tokens * model.d_in).to(error)
    return Gamma(n_numbers / 2, error.clamp(min=1e-30) / 2)


def _feature_posteriors(
    model: SparseDictionary, sums: Sums, rows: Rows, noise_precision: Gamma
) -> tuple[Beta, Tensor | None]:
    """Return q(rates), and each feature's log odds of being there."""
    prior = learned_spike_slab(model)
    a, b = (1.0, 1.0) if prior is None else prior.rate_prior
    n_active = sums.n_active.clamp(max=sums.n_tokens)
    rate = Beta(a + n_active, b + sums.n_tokens - n_active)
    if prior is None:
        return rate, None
    # A code's optimal factor raises the bound by log(q(0) under the prior / q(0)).
    log_absent = F.logsigmoid(-prior.rate_logit).double()
    gain = sums.log_present + sums.n_tokens * log_absent
    # KL from a uniform direction: rows N(0, 1 / d_in) in each dimension.
    spread = model.d_in * rows.relative_variance / noise_precision.mean
    cost = 0.5 * model.d_in * (spread - spread.log())
    flat = Beta(torch.full_like(n_active, a), torch.full_like(n_active, b))
    return rate, gain - cost - kl_divergence(rate, flat)


def _set_slabs(model: SparseDictionary, sums: Sums, is_shown: Bool[Tensor, " d_sae"]) -> None:
    """Give slabs the moments of their features' active codes and `prior_weight` of their own."""
    prior = learned_spike_slab(model)
    assert prior is not None
    old = _slab_moments(model)
    assert old is not None
    old_mean, old_energy = old
    weight = sums.prior_weight
    count = sums.n_active + weight
    mean = (sums.code + weight * old_mean) / count
    energy = (sums.dictionary.energy + weight * old_energy) / count
    prior.set_moments_(
        torch.where(is_shown, mean, old_mean), torch.where(is_shown, energy, old_energy)
    )


class HeldOutGuard:
    """Takes a share of each pass, or less of it: the ELBO of held-out tokens never falls."""

    def __init__(self, expectation: Expectation):
        self.expectation = expectation
        self.history: list[tuple[float, float]] = []
        self.fitted = self.old = _State.of(expectation.model)

    @contextmanager
    def undo_on_error(self) -> Iterator[None]:
        """Leave the model as the last pass that was taken made it, whatever comes between."""
        try:
            yield
        except BaseException:
            self.old.restore_(self.expectation.model)
            raise

    def begin(self, x: Float[Tensor, "token d_in"]) -> None:
        """Hold out the tokens `x`, those of the first pass."""
        if not self.history:
            self.x = x
            self.history.append(self._elbo())

    def check(self, share: Float[Tensor, " d_sae"]) -> None:
        """Take `share` of the way from the fit to the model as it is now, and the slabs of now."""
        model = self.expectation.model
        new = _State.of(model)
        for n_halvings in range(_N_HALVINGS + 1):
            part = 0.5**n_halvings
            self.fitted.toward(new, part * share, part).restore_(model)
            elbo = self._elbo()
            if all(a >= b for a, b in zip(elbo, self.history[-1], strict=True)):
                break
        else:
            self.old.restore_(model)
            elbo = self.history[-1]
        self.history.append(elbo)
        self.old = _State.of(model)

    def _elbo(self) -> tuple[float, float]:
        model, x = self.expectation.model, self.x
        values = [
            elbo_terms(model, x, q).elbo.mean() for q in (model.encode(x), self.expectation(x))
        ]
        return float(values[0]), float(values[1])


class _State(NamedTuple):
    """All that a pass changes.

    Slabs are averaged by their moments: a truncated normal far below zero and one above it can
    be all but the same law, and the average of their parameters another one.
    """

    parameters: dict[str, Tensor]
    slab_moments: tuple[Tensor, Tensor] | None
    is_average: bool = False

    @classmethod
    def of(cls, model: SparseDictionary) -> _State:
        parameters = {k: v.detach().clone() for k, v in model.named_parameters()}
        return cls(parameters, _slab_moments(model))

    def toward(self, other: _State, share: Float[Tensor, " d_sae"], slab_share: float) -> _State:
        parameters = {
            k: _lerp(k, v, other.parameters[k], share) for k, v in self.parameters.items()
        }
        if self.slab_moments is None or other.slab_moments is None:
            return _State(parameters, None, is_average=True)
        mean, energy = (
            torch.lerp(a, b, slab_share)
            for a, b in zip(self.slab_moments, other.slab_moments, strict=True)
        )
        return _State(parameters, (mean, energy), is_average=True)

    @torch.no_grad()
    def restore_(self, model: SparseDictionary) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(self.parameters[name])
        prior = learned_spike_slab(model)
        if self.is_average and prior is not None and self.slab_moments is not None:
            prior.set_moments_(*self.slab_moments)
        model.normalize_()


@torch.no_grad()
def _slab_moments(model: SparseDictionary) -> tuple[Tensor, Tensor] | None:
    """Return E z and E z^2 of active codes; None where the prior has no slab."""
    prior = learned_spike_slab(model)
    if prior is None:
        return None
    slab = prior().slab
    mean = slab.mean.double()
    return mean, slab.variance.double() + mean.square()


def _lerp(name: str, old: Tensor, new: Tensor, share: Float[Tensor, " d_sae"]) -> Tensor:
    """Go from `old` to `new` by each feature's share, or by their mean where there are none."""
    share = share.to(old.dtype)
    if name.rpartition(".")[2] == "W_dec":
        return torch.lerp(old, new, share[:, None])
    return torch.lerp(old, new, share if old.shape[-1:] == share.shape else share.mean())
