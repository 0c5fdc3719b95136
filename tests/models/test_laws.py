"""Laws of every dictionary that `probsae.models` exports; a new one is tested unasked."""

import copy
import gc
import inspect
import json
import warnings
import weakref

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive
from torch.distributions import kl_divergence

import probsae.models as models
from probsae.distributions import SpikeSlab
from probsae.inference import ExactELBO, NoiseFloorWarning, elbo_terms, fit, objective
from probsae.models.base import SparseDictionary, as_event
from tests.own_prior import OwnPrior

D_IN, D_SAE, N_TOKENS = 6, 10, 64
# Standard errors that a sum of independent draws exceeds with probability 1e-5.
K_STANDARD_ERRORS = 4.5

CLASSES = [
    value
    for value in vars(models).values()
    if inspect.isclass(value)
    and issubclass(value, SparseDictionary)
    and not inspect.isabstract(value)
]
VARIANTS = [(cls, {}) for cls in CLASSES] + [
    (models.LaplaceDictionary, {"nonnegative": True}),
    (models.SpikeSlabDictionary, {"slab": "half_normal"}),
    (models.SpikeSlabDictionary, {"slab": "truncated_normal", "encoder_steps": 1}),
    (models.SpikeSlabDictionary, {"encoder_steps": 0, "rate_prior": (2.0, 5.0)}),
    (models.SparseVAE, {"prior": "laplace"}),
    (OwnPrior, {}),
]
NON_LINEAR = [
    (models.SparseVAE, {"decoder_hidden": 7}),
    (models.SparseVAE, {"prior": "laplace", "decoder_hidden": 7}),
]


def name(variant):
    cls, options = variant
    return "-".join([cls.__name__, *(f"{k}={v}" for k, v in options.items())])


def build(variant, perturb=0.3):
    """Return a model in float64 in a generic position, and activations; training mode off."""
    cls, options = variant
    torch.manual_seed(1)
    x = torch.randn(N_TOKENS, D_IN, dtype=torch.float64) * 2 + 0.5
    model = cls(d_in=D_IN, d_sae=D_SAE, **options).double()
    model.initialize_(x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("b_enc", "encoder.2.bias"):
                parameter.zero_()  # gates that begin nearly shut open in too few draws to count
            parameter.add_(perturb * torch.randn_like(parameter))
    model.n_tokens = 1000
    return model.eval(), x


every = pytest.mark.parametrize("variant", VARIANTS + NON_LINEAR, ids=name)
every_linear = pytest.mark.parametrize("variant", VARIANTS, ids=name)


@every
def test_what_is_printed_says_what_it_is(variant):
    model, x = build(variant)
    for key, value in model.hyperparameters().items():
        assert f"{key}={value!r}" in repr(model)
    assert repr(model.encode(x)) == f"CodePosterior(shape=({N_TOKENS}, {D_SAE}))"


@pytest.mark.usefixtures("unchecked_types")
def test_a_posterior_is_not_decoded():
    model, x = build((models.TopKSAE, {}))
    with pytest.raises(TypeError, match="got a CodePosterior; pass its mean"):
        model.decode(model.encode(x))


def test_every_model_is_found():
    assert len(CLASSES) >= 10


@every
def test_posterior_is_a_posterior(variant):
    model, x = build(variant)
    post = model.encode(x)
    shape = (N_TOKENS, D_SAE)
    assert post.mean.shape == post.variance.shape == post.p_active.shape == shape
    assert post.is_active.dtype == torch.bool
    assert (post.variance >= 0).all()
    assert ((post.p_active >= 0) & (post.p_active <= 1)).all()
    narrow, wide = post.interval(0.5), post.interval(0.9)
    assert (wide[0] <= narrow[0] + 1e-9).all()
    assert (narrow[0] <= narrow[1]).all()
    assert (narrow[1] <= wide[1] + 1e-9).all()
    assert not post.mean.requires_grad


@every
def test_draws_have_the_posteriors_moments(variant):
    model, x = build(variant)
    post = model.encode(x[:8])
    draws = post.sample(4000)
    assert draws.shape == (4000, 8, D_SAE)
    # With fewer than 80 active draws a mean is far from normal: those codes are left out here.
    seen = (post.p_active > 0.02) | (post.variance == 0)
    assert seen.sum() > 4
    error = (draws.mean(0) - post.mean).abs()
    assert (error <= K_STANDARD_ERRORS * (post.variance / 4000).sqrt() + 1e-9)[seen].all()
    spread = (draws - draws.mean(0)).square()
    error = (spread.mean(0) - post.variance).abs()
    assert (error <= K_STANDARD_ERRORS * spread.std(0) / 4000**0.5 + 1e-9)[seen].all()
    lower, upper = post.interval(0.8)
    inside = ((draws >= lower - 1e-9) & (draws <= upper + 1e-9)).double().mean(0)
    assert (inside >= 0.8 - K_STANDARD_ERRORS * (0.16 / 4000) ** 0.5).all()
    if isinstance(post.distribution, SpikeSlab):
        p, share = post.p_active, (draws != 0).double().mean(0)
        assert ((share - p).abs() <= K_STANDARD_ERRORS * (p * (1 - p) / 4000).sqrt() + 2e-3).all()


@every_linear
def test_closed_form_elbo_equals_monte_carlo(variant):
    model, x = build(variant)
    terms = elbo_terms(model, x)
    q, prior = model.posterior(x).distribution, model.prior()
    draws = q.sample((3000,))
    residual = (x - model.decode(draws)).square().sum(-1) / (2 * model.noise_scale**2)
    log_norm = D_IN * (model.noise_scale.log() + 0.5 * np.log(2 * np.pi))
    for sampled, exact in (
        (-residual - log_norm, terms.log_likelihood),
        (as_event(q).log_prob(draws) - prior.log_prob(draws), terms.kl),
    ):
        if model.is_deterministic and exact is terms.kl:
            sampled = -prior.log_prob(draws)
        standard_error = sampled.std(0) / 3000**0.5
        error = (sampled.mean(0) - exact).abs()
        assert (error <= K_STANDARD_ERRORS * standard_error + 1e-6 * exact.abs() + 1e-9).all()


@every_linear
def test_a_posterior_is_held_against_the_prior_as_it_is_now(variant):
    model, x = build(variant)
    post = model.encode(x)
    before = model.kl(post)
    torch.testing.assert_close(objective(model, x).kl, before.mean())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    draws, prior = post.distribution.sample((3000,)), model.prior()
    sampled = -prior.log_prob(draws)
    if not model.is_deterministic:
        sampled = sampled + as_event(post.distribution).log_prob(draws)
    after, standard_error = model.kl(post), sampled.std(0) / 3000**0.5
    assert ((sampled.mean(0) - after).abs() <= K_STANDARD_ERRORS * standard_error + 1e-9).all()


@every_linear
def test_pyro_programs_and_engine_agree_without_variance(variant):
    model, x = build(variant)
    model.train()
    for kl_weight in (1.0, 0.3):
        model.zero_grad()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        engine = objective(model, x, kl_weight).loss
        engine.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        draws = []
        for _ in range(2):  # two draws of the guide: the same number, to rounding
            model.zero_grad()
            model.load_state_dict(state)
            loss = ExactELBO().differentiable_loss(model.model, model.guide, x, kl_weight)
            loss = loss / N_TOKENS
            assert loss.item() == pytest.approx(engine.item(), rel=1e-6)
            loss.backward()
            for n, parameter in model.named_parameters():
                if n in gradients:
                    torch.testing.assert_close(parameter.grad, gradients[n], rtol=1e-6, atol=1e-8)
            draws.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for a, b in zip(*draws, strict=True):  # no variance: rounding is all that differs
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_linear
def test_gradients_reach_every_parameter_and_leave_norms_alone(variant):
    model, x = build(variant)
    model.train()
    objective(model, x, 1.0).loss.backward()
    for n, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.numel():
            assert parameter.grad is not None, n
            assert torch.isfinite(parameter.grad).all(), n
            assert parameter.grad.abs().max() > 0, n
    parallel = (model.W_dec.grad * model.directions).sum(-1)
    assert parallel.abs().max() < 1e-9 * model.W_dec.grad.norm()


@every
def test_works_with_pyro_svi(variant):
    model, x = build(variant, perturb=0.0)
    pyro.clear_param_store()
    loss = ExactELBO() if model.has_linear_decoder else pyro.infer.TraceMeanField_ELBO()
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-2}), loss)
    before, start = svi.evaluate_loss(x), model.W_dec.detach().clone()
    for _ in range(20):
        svi.step(x)
    assert svi.evaluate_loss(x) < before
    assert not torch.equal(model.W_dec, start)


def test_two_models_do_not_share_parameters_through_pyro():
    pyro.clear_param_store()
    first, x = build((models.SpikeSlabDictionary, {}))
    second = copy.deepcopy(first)
    for model in (first, second, first):
        svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-2}), ExactELBO())
        other = second if model is first else first
        kept, start = other.W_dec.detach().clone(), model.W_dec.detach().clone()
        svi.step(x)
        assert torch.equal(other.W_dec, kept)
        assert not torch.equal(model.W_dec, start)


@pytest.fixture
def only_new_garbage():
    """Let the collector look at what a test makes: all that pytest holds takes it .3 s a time."""
    gc.freeze()
    yield
    gc.unfreeze()


@every
@pytest.mark.usefixtures("only_new_garbage")
def test_pyro_forgets_a_model_that_is_gone(variant):
    pyro.clear_param_store()
    mine = pyro.param("mine", torch.ones(2))
    (model, x), (other, _) = build(variant), build(variant)
    Predictive(model.model, guide=model.guide, num_samples=2)(x)
    for each in (model, other):
        Predictive(each.model, num_samples=2)(None, n_tokens=2)
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    n_trained = sum(parameter.requires_grad for parameter in other.parameters())
    assert len(pyro.get_param_store()) == 1 + 2 * n_trained
    each = model = None
    gc.collect()
    assert not any(parameter() is not None for parameter in parameters)
    assert len(pyro.get_param_store()) == 1 + n_trained
    assert pyro.param("mine") is mine


@every
def test_predictive_and_prior_draws(variant):
    model, x = build(variant)
    prior = Predictive(model.model, num_samples=3)(None, n_tokens=5)
    assert prior["activations"].shape == (3, 5, D_IN)
    assert prior["codes"].shape == (3, 5, D_SAE)
    posterior = Predictive(model.model, guide=model.guide, num_samples=3)(x)
    assert posterior["codes"].shape == (3, N_TOKENS, D_SAE)
    activations, codes = model.sample(7)
    assert activations.shape == (7, D_IN)
    assert codes.shape == (7, D_SAE)


@every
@pytest.mark.parametrize("how", ["sample", "predictive"])
def test_prior_draws_have_the_models_moments(variant, how):
    model, _ = build(variant)
    n_draws, prior = 20_000, model.prior()
    if how == "sample":
        x, z = model.sample(n_draws)
    else:
        drawn = Predictive(model.model, num_samples=1)(None, n_tokens=n_draws)
        x, z = drawn["activations"][0].detach(), drawn["codes"][0].detach()
    law = prior.base_dist
    # With fewer than 80 active draws a mean is far from normal: those codes are left out here.
    rate = law.p_active if isinstance(law, SpikeSlab) else torch.ones(D_SAE)
    seen = (rate > 80 / n_draws).expand(D_SAE)
    assert seen.sum() > 4
    error = (z.mean(0) - prior.mean).abs()
    assert (error <= K_STANDARD_ERRORS * (prior.variance / n_draws).sqrt() + 1e-9)[seen].all()
    spread = (z - z.mean(0)).square()
    error = (spread.mean(0) - prior.variance).abs()
    assert (error <= K_STANDARD_ERRORS * spread.std(0) / n_draws**0.5 + 1e-9)[seen].all()
    noise = (x - model.decode(z)) / model.noise_scale
    assert (noise.mean(0).abs() <= K_STANDARD_ERRORS / n_draws**0.5).all()
    assert ((noise.var(0) - 1).abs() <= K_STANDARD_ERRORS * (2 / n_draws) ** 0.5).all()
    assert (
        torch.corrcoef(noise.T).fill_diagonal_(0).abs() < K_STANDARD_ERRORS / n_draws**0.5
    ).all()


@every
def test_renders(variant):
    model, x = build(variant)
    graph = pyro.render_model(model.model, model_args=(x,))
    assert "codes" in graph.source
    assert "activations" in graph.source


@every
def test_a_saved_model_is_the_same_model(variant, tmp_path):
    model, x = build(variant)
    models.save(model, tmp_path / "model")
    loaded = models.load(tmp_path / "model").double()
    assert type(loaded) is type(model)
    assert loaded.hyperparameters() == model.hyperparameters()
    again = models.load(tmp_path / "model")
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].to(value.dtype))
    torch.testing.assert_close(loaded.encode(x).mean, model.encode(x).mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "cls",
    [
        models.SpikeSlabDictionary,
        models.LaplaceDictionary,
        models.RectifiedGaussianDictionary,
        models.SparseVAE,
    ],
)
def test_a_model_is_built_anew_from_its_hyperparameters_with_its_noise(cls):
    noise = {"noise_scale": 0.25, "noise_floor": 0.125, "learn_noise": False}
    model = cls(D_IN, D_SAE, **noise)
    with torch.no_grad():
        model.log_noise_scale.fill_(1.0)  # as a fit changes it
    again = cls(**model.hyperparameters())
    assert float(again.noise_scale) == 0.25
    assert float(again.noise_floor) == 0.125
    assert not again.log_noise_scale.requires_grad


def test_files_from_before_the_noise_was_kept_are_read(tmp_path):
    model, _ = build((models.SpikeSlabDictionary, {"noise_scale": 0.25}))
    models.save(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    for name in ("noise_scale", "noise_floor"):
        del config["hyperparameters"][name]
    file.write_text(json.dumps(config))
    assert torch.equal(models.load(tmp_path / "model").noise_scale, model.noise_scale)


def test_a_sparse_vae_has_the_firing_rates_of_its_prior():
    model = models.SparseVAE(D_IN, D_SAE, rate_prior=(1.0, 3.0))
    assert torch.equal(model.firing_rate, model.prior().base_dist.p_active)
    laplace = models.SparseVAE(D_IN, D_SAE, prior="laplace")
    assert not hasattr(laplace, "firing_rate")
    with pytest.raises(AttributeError, match="firing_rate"):
        print(laplace.firing_rate)


@every
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input_is_named(variant):
    model, x = build(variant)
    with pytest.raises(ValueError, match="d_in=6 columns"):
        model.encode(torch.zeros(3, D_SAE))
    with pytest.raises(ValueError, match="finite"):
        model.encode(torch.full((3, D_IN), torch.nan))
    with pytest.raises(ValueError, match="at least one token"):
        model.encode(torch.zeros(0, D_IN))
    with pytest.raises(ValueError, match="d_sae=10 columns"):
        model.decode(torch.zeros(3, D_IN, dtype=torch.float64))
    for d_sae in (0, -1, 2.5):
        with pytest.raises(ValueError, match="d_sae must be"):
            variant[0](d_in=D_IN, d_sae=d_sae)
    with pytest.raises(ValueError, match="level"):
        model.encode(x).interval(1.0)


@every
def test_fit_improves_and_is_reproducible(variant):
    cls, options = variant
    torch.manual_seed(2)
    directions = torch.nn.functional.normalize(torch.randn(8, D_IN), dim=-1)
    codes = torch.rand(600, 8) * (torch.rand(600, 8) < 0.2)
    x = codes @ directions + 0.05 * torch.randn(600, D_IN)
    fitted = []
    for n_steps in (40, 3, 3):
        torch.manual_seed(3)
        model = cls(d_in=D_IN, d_sae=D_SAE, **options)
        before = torch.get_rng_state()
        result = fit(model, x, n_steps=n_steps, batch_size=64, seed=5, device="cpu", progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        assert not model.training
        assert result.n_tokens == n_steps * 64
        fitted.append(result)
    elbo = fitted[0].history["elbo"]  # of each step's batch of 64
    assert sum(elbo[-10:]) > sum(elbo[:10])
    again, once_more = (result.model.W_dec for result in fitted[1:])
    torch.testing.assert_close(again, once_more, rtol=0, atol=0)
    norms = fitted[0].model.W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(D_SAE), rtol=0, atol=1e-6)


@every
def test_small_and_odd_input(variant):
    """Arrays, other precisions, one token, narrow dictionaries, batches larger than the data."""
    model, x = build(variant)
    post = model.encode(x[:1])
    assert post.mean.shape == post.sample(2)[0].shape == (1, D_SAE)
    z = model.encode(x).mean
    for other in (z.numpy(), z.float(), z.numpy().astype(np.float32)):
        torch.testing.assert_close(model.decode(other), model.decode(z), rtol=1e-5, atol=1e-5)
    for other in (x.numpy(), x.float(), x.float().numpy()):
        torch.testing.assert_close(model.encode(other).mean, z, rtol=1e-4, atol=1e-4)
    cls, options = variant
    one = x[:1].float()
    for data, d_sae in ((x[:20].numpy(), 3), (one, 12), (0 * one, 12), (x[:20].half(), 1)):
        small = cls(d_in=D_IN, d_sae=d_sae, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoiseFloorWarning)
            result = fit(small, data, n_steps=1, batch_size=100, device="cpu", progress=False)
        assert result.n_tokens == 100
        assert np.isfinite(result.history["elbo"][0])


@every_linear
def test_kl_divergence_has_the_batch_shape(variant):
    model, x = build(variant)
    kl = kl_divergence(as_event(model.posterior(x).distribution), model.prior())
    assert kl.shape == (N_TOKENS,)


@every
def test_norms_of_rows_go_into_the_units_of_the_codes(variant):
    model, x = build(variant)
    old, norms = copy.deepcopy(model), 0.5 + torch.rand(D_SAE, dtype=torch.float64)
    rows = norms[:, None] * model.dictionary()
    if model.code_scales is None:
        with pytest.raises(TypeError, match="cannot follow"):
            model.set_rows_(rows)
        for name, value in old.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
        return
    model.set_rows_(rows)
    torch.testing.assert_close(model.dictionary(), old.dictionary())
    torch.testing.assert_close(model.prior().variance, norms.square() * old.prior().variance)
    if getattr(model, "encoder_steps", 0):  # lateral steps see the new rows
        return
    before, after = old.encode(x), model.encode(x)
    torch.testing.assert_close(after.mean, norms * before.mean)
    torch.testing.assert_close(after.variance, norms.square() * before.variance)
    kl = [
        kl_divergence(as_event(q.distribution), m.prior())
        for q, m in ((before, old), (after, model))
    ]
    torch.testing.assert_close(kl[0], kl[1])


@every
def test_filters_turn_with_the_directions(variant):
    model, _ = build(variant)
    if model.code_scales is None:
        return
    filters, directions = model.W_enc.detach().clone(), model.dictionary()
    turned = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, dtype=torch.float64), dim=1)
    model.set_rows_(turned)
    torch.testing.assert_close(model.dictionary(), turned)
    torch.testing.assert_close(model.W_enc.detach(), filters + (turned - directions).T)
