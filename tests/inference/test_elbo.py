"""The ELBO against cases whose evidence is known exactly."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import probsae as ps
from probsae.inference import ExactELBO, elbo_terms, objective
from probsae.inference.pyro_objective import pyro_objective
from probsae.models.base import SparseDictionary, as_event
from probsae.models.code_posterior import CodePosterior


class GaussianDictionary(SparseDictionary):
    """Normal(0, prior_scale) codes with the exact posterior of orthonormal directions."""

    def __init__(self, d_in, d_sae, prior_scale=1.7):
        super().__init__(d_in, d_sae, noise_scale=0.6)
        self.prior_scale = prior_scale

    def hyperparameters(self):
        return {"d_in": self.d_in, "d_sae": self.d_sae, "prior_scale": self.prior_scale}

    def prior(self):
        zero = torch.zeros(self.d_sae, dtype=self.b_dec.dtype)
        return as_event(dist.Normal(zero, self.prior_scale))

    def posterior(self, x):
        precision = 1 / self.noise_scale**2 + 1 / self.prior_scale**2
        mean = (x - self.b_dec) @ self.directions.T / self.noise_scale**2 / precision
        return CodePosterior(dist.Normal(mean, precision.rsqrt().expand_as(mean)))


@pytest.fixture
def exact():
    model = GaussianDictionary(7, 4).double()
    with torch.no_grad():
        model.W_dec.copy_(torch.linalg.qr(torch.randn(7, 4, dtype=torch.float64))[0].T)
        model.b_dec.normal_()
    x = 2 * torch.randn(20, 7, dtype=torch.float64)
    covariance = model.directions.T @ model.directions * model.prior_scale**2
    covariance = covariance + torch.eye(7, dtype=torch.float64) * model.noise_scale**2
    evidence = dist.MultivariateNormal(model.b_dec, covariance).log_prob(x)
    return model, x, evidence


def test_every_single_draw_gives_the_log_evidence_under_the_exact_guide(exact):
    model, x, evidence = exact
    for _ in range(5):
        loss = Trace_ELBO(num_particles=1).loss(model.model, model.guide, x)
        assert -loss == pytest.approx(float(evidence.detach().sum()), rel=1e-12)


def test_the_closed_form_equals_the_log_evidence_under_the_exact_guide(exact):
    model, x, evidence = exact
    torch.testing.assert_close(elbo_terms(model, x).elbo, evidence, rtol=1e-12, atol=1e-12)


def test_exact_elbo_has_no_gradient_variance_and_a_sampled_one_has():
    torch.manual_seed(0)
    model = ps.RectifiedGaussianDictionary(d_in=6, d_sae=9).double()
    x = torch.randn(32, 6, dtype=torch.float64)
    model.initialize_(x)

    def gradients(elbo):
        draws = []
        for _ in range(3):
            model.zero_grad()
            elbo.differentiable_loss(model.model, model.guide, x).backward()
            draws.append(model.W_enc.grad.clone())
        return torch.stack(draws).std(0).max() / draws[0].norm()

    assert gradients(ExactELBO()) < 1e-12
    assert gradients(TraceMeanField_ELBO()) > 1e-3


def test_l1_sae_is_the_delta_guide_under_an_exponential_prior():
    model = ps.ReLUSAE(d_in=6, d_sae=9, l1_coefficient=0.3).double()
    x = torch.randn(16, 6, dtype=torch.float64)
    z = model.encode(x).mean
    loss = ((x - model.decode(z)) ** 2).sum(-1) + 0.3 * z.sum(-1)
    constant = 3 * math.log(math.pi) - 9 * math.log(0.3)
    torch.testing.assert_close(-elbo_terms(model, x).elbo, loss + constant)


def test_kl_weight_scales_the_kl_alone():
    model = ps.SpikeSlabDictionary(d_in=6, d_sae=9)
    x = torch.randn(16, 6)
    model.initialize_(x)
    full, half = objective(model, x, 1.0), objective(model, x, 0.5)
    assert float(full.elbo) == pytest.approx(float(half.elbo))
    assert float((full.loss - half.loss).detach()) == pytest.approx(0.5 * float(full.kl), rel=1e-4)


def test_rate_prior_counts_once_over_the_data_set():
    plain = ps.SpikeSlabDictionary(d_in=6, d_sae=9)
    with_prior = ps.SpikeSlabDictionary(d_in=6, d_sae=9, rate_prior=(2.0, 30.0))
    with_prior.load_state_dict(plain.state_dict())
    x = torch.randn(16, 6)
    for model in (plain, with_prior):
        model.n_tokens = 400
    rate = plain.firing_rate.double()
    log_density = (rate.log() + 29 * (1 - rate).log()).sum()
    difference = objective(with_prior, x).loss - objective(plain, x).loss
    assert float(difference.detach()) == pytest.approx(float(-log_density.detach()) / 400, rel=1e-4)


def test_exact_elbo_refuses_a_nonlinear_decoder():
    model = ps.SparseVAE(d_in=6, d_sae=9, decoder_hidden=5)
    x = torch.randn(16, 6)
    with pytest.raises(ValueError, match="linear decoder"):
        elbo_terms(model, x)
    with pytest.raises(ValueError, match="TraceMeanField_ELBO"):
        ExactELBO().differentiable_loss(model.model, model.guide, x)
    pyro.clear_param_store()


@pytest.mark.parametrize(
    "build",
    [
        lambda: ps.SpikeSlabDictionary(6, 9, rate_prior=(2.0, 30.0)),
        lambda: ps.BatchTopKSAE(6, 9, k=2),
        lambda: ps.GatedSAE(6, 9),
    ],
)
def test_a_step_through_pyro_shows_what_the_closed_form_shows(build):
    """Each part of the loss, and buffers that count a step count it once."""
    torch.manual_seed(1)
    x = torch.randn(40, 6)
    direct = build().train()
    direct.initialize_(x)
    direct.n_tokens = 400
    through_pyro = copy.deepcopy(direct)
    weight = torch.tensor(0.3)
    expected = objective(direct, x, weight)
    shown = pyro_objective(ExactELBO())(through_pyro, x, weight)
    for name in ("loss", "elbo", "log_likelihood", "kl", "auxiliary", "fvu", "firing_rate"):
        torch.testing.assert_close(
            getattr(shown, name).detach(), getattr(expected, name).detach(), rtol=1e-4, atol=1e-4
        )
    for (name, a), b in zip(direct.named_buffers(), through_pyro.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_bfloat16_products_are_rounded_and_everything_else_is_float32():
    model = ps.TopKSAE(d_in=64, d_sae=128, k=5)
    a, b = torch.randn(40, 128), torch.randn(128, 64)
    model.product_dtype = torch.bfloat16
    product = model.product(a, b)
    assert product.dtype == torch.float32
    unit = 2.0**-9  # half a unit in the last of bfloat16's 8 bits
    size = a.double().abs() @ b.double().abs()
    error = (product.double() - a.double() @ b.double()).abs()
    # Each factor and the product once; sums of 128 terms in float32 are far below.
    assert bool((error <= 3.1 * unit * size).all())
    x = torch.randn(40, 64)
    posterior = model.encode(x)
    terms = elbo_terms(model, x, posterior)
    assert {value.dtype for value in terms} == {torch.float32}
    # What is left is that of the rounded reconstruction, to float32's rounding and not bfloat16's.
    expected = (x.double() - model.decode(posterior.mean).double()).square().sum(1)
    torch.testing.assert_close(terms.squared_error.double(), expected, rtol=1e-5, atol=0)
