"""Fits as chains: what arviz gets of their dictionaries, and what each draw says of tokens."""

import copy

import numpy as np
import pytest
import torch
from torch.distributions import Beta, Gamma

import probsae as ps
from probsae.arviz_face import import_arviz
from probsae.inference.dictionary_statistics import Rows

pytestmark = pytest.mark.slow
az = import_arviz()
D_IN, D_SAE, N_TOKENS = 8, 6, 40


@pytest.fixture(scope="module")
def polished():
    data = ps.SyntheticActivations(
        d_in=D_IN, n_features=4, n_active=1, magnitudes=(1.0, 0.3), noise_scale=0.15, seed=0
    )
    fits = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = ps.SpikeSlabDictionary(d_in=D_IN, d_sae=D_SAE)
        ps.fit(model, data, n_steps=300, batch_size=128, seed=seed)
        fits.append((model, ps.polish(model, data, n_tokens=4_096, progress=False)))
    models, posteriors = zip(*fits, strict=True)
    return models, posteriors, data.sample(N_TOKENS)[0]


@pytest.fixture(scope="module")
def idata(polished):
    return ps.dictionaries_to_arviz(*polished, n_draws=100, n_importance=1_000)


def test_groups_and_dims(idata):
    assert idata.posterior.direction.dims == ("chain", "draw", "feature", "dimension")
    assert idata.posterior.direction.shape == (2, 100, D_SAE, D_IN)
    for name in ("cosine", "norm", "firing_rate"):
        assert idata.posterior[name].dims == ("chain", "draw", "feature")
    assert idata.posterior.noise_scale.dims == ("chain", "draw")
    assert idata.log_likelihood.activations.dims == ("chain", "draw", "token")
    assert idata.posterior_predictive.energy.dims == ("chain", "draw", "token")
    assert idata.observed_data.energy.shape == (N_TOKENS,)


def test_likelihood_of_a_draw_is_its_exact_evidence(polished, idata):
    models, _, x = polished
    draw = idata.posterior.isel(chain=0, draw=7)
    model = copy.deepcopy(models[0])
    with torch.no_grad():
        model.code_prior.rate_logit.copy_(torch.tensor(draw.firing_rate.values).logit())
        model.log_noise_scale.fill_(float(np.log(draw.noise_scale)))
        model.set_rows_(torch.tensor(draw.direction.values, dtype=torch.float32))
    evidence = ps.inference.enumerate_supports(model, x).log_evidence
    assert evidence is not None
    exact = evidence.detach().numpy()
    estimate = idata.log_likelihood.activations.isel(chain=0, draw=7).values
    # 1,000 codes from a nearly exact posterior; importance sampling is below only on average.
    assert np.abs(estimate - exact).mean() < 0.05
    assert abs((estimate - exact).mean()) < 0.03


def test_draws_have_the_posteriors_moments(polished, idata):
    posterior = polished[1][0]
    draws = idata.posterior.isel(chain=0)
    # 48 entries: 5 standard errors of a mean over 100 draws.
    error = np.abs(draws.direction.mean("draw").values - posterior.mean.numpy())
    assert (error < 0.5 * posterior.row_variance.sqrt().numpy()[:, None]).all()
    rate, spread = posterior.rate.mean.numpy(), posterior.rate.stddev.numpy()
    assert (np.abs(draws.firing_rate.mean("draw").values - rate) < 0.5 * spread).all()


def test_chains_are_in_the_first_fits_order():
    rows = torch.nn.functional.normalize(torch.randn(5, D_IN, dtype=torch.float64), dim=1)
    order = torch.tensor([3, 0, 4, 1, 2])
    fits = []
    for index in (torch.arange(5), order):
        model = ps.SpikeSlabDictionary(d_in=D_IN, d_sae=5)
        rate = Beta(100 * (1 + index.double()), torch.full((5,), 1e4, dtype=torch.float64))
        cholesky = 1e4 * torch.eye(5, dtype=torch.float64)[None]
        precision = Gamma(torch.tensor(1e4).double(), torch.tensor(1e4).double())
        posterior = ps.DictionaryPosterior(Rows(rows[index], cholesky), rate, precision, None, [])
        fits.append((model, posterior))
    models, posteriors = zip(*fits, strict=True)
    chosen = torch.tensor([4, 1])
    idata = ps.dictionaries_to_arviz(
        models, posteriors, torch.randn(3, D_IN), n_draws=20, features=chosen
    )
    assert idata.posterior.feature.values.tolist() == [4, 1]
    assert float(idata.posterior.cosine.min()) > 0.999
    rates = idata.posterior.firing_rate.mean(("chain", "draw")).values
    np.testing.assert_allclose(rates, [500 / 10_500, 200 / 10_200], rtol=0.05)


def test_rhat_tells_fits_that_agree_from_fits_that_do_not(polished):
    (model, _), (posterior, _), x = polished
    turned = Rows(torch.roll(posterior.rows.mean, 1, dims=1), posterior.rows.cholesky)
    other = ps.DictionaryPosterior(turned, posterior.rate, posterior.noise_precision, None, [])
    for second, agrees in ((posterior, True), (other, False)):
        idata = ps.dictionaries_to_arviz([model] * 2, [posterior, second], x, n_importance=10)
        rhat = az.rhat(idata, var_names=["cosine"]).cosine
        assert bool((rhat < 1.1).all()) == agrees
        assert bool((rhat > 1.5).any()) != agrees


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # arviz 0.23 under pandas 3.1
def test_arviz_compares_dictionaries_by_leaving_tokens_out(polished, idata):
    loo = az.loo(idata, pointwise=True)
    assert float((loo.pareto_k > 0.7).mean()) < 0.05
    x = polished[2]
    narrow = ps.SpikeSlabDictionary(d_in=D_IN, d_sae=2)
    torch.manual_seed(0)
    data = ps.SyntheticActivations(
        d_in=D_IN, n_features=4, n_active=1, magnitudes=(1.0, 0.3), noise_scale=0.15, seed=0
    )
    ps.fit(narrow, data, n_steps=200, batch_size=128)
    posterior = ps.polish(narrow, data, n_tokens=2_000, progress=False)
    worse = ps.dictionaries_to_arviz([narrow] * 2, [posterior] * 2, x, n_importance=200)
    table = az.compare({"wide": idata, "narrow": worse})
    assert table.index[0] == "wide"
    # Best minus this one before arviz 1.0, this one minus the best from then on.
    assert abs(table.elpd_diff["narrow"]) > 5


def test_laplace_and_bad_input(polished):
    models, posteriors, x = polished
    data = ps.SyntheticActivations(d_in=D_IN, n_features=4, n_active=1, noise_scale=0.1, seed=0)
    laplace = ps.LaplaceDictionary(d_in=D_IN, d_sae=D_SAE, nonnegative=True)
    ps.fit(laplace, data, n_steps=20, batch_size=64)
    posterior = ps.polish(laplace, data, n_tokens=500, progress=False)
    idata = ps.dictionaries_to_arviz([laplace], [posterior], x, n_draws=5, n_importance=20)
    assert np.isfinite(idata.log_likelihood.activations.values).all()
    with pytest.raises(ValueError, match="one posterior"):
        ps.dictionaries_to_arviz(models, posteriors[:1], x)
    with pytest.raises(ValueError, match="one shape"):
        ps.dictionaries_to_arviz([models[0], ps.SpikeSlabDictionary(D_IN, 9)], posteriors, x)
    mask = torch.arange(D_SAE) < 2
    for features in ([D_SAE], [-1], [], torch.tensor([1.5]), mask):
        with pytest.raises(ValueError, match="features must be"):
            ps.dictionaries_to_arviz(models, posteriors, x, features=features)
    with pytest.raises(ValueError, match="n_draws"):
        ps.dictionaries_to_arviz(models, posteriors, x, n_draws=0)
    with pytest.raises(ValueError, match="gigabyte"):
        ps.dictionaries_to_arviz(models, posteriors, x, n_importance=10**7)
    with pytest.raises(TypeError, match="no posterior"):
        ps.dictionaries_to_arviz([ps.TopKSAE(D_IN, D_SAE, k=1)], posteriors[:1], x)


@pytest.mark.usefixtures("unchecked_types")
def test_one_model_where_several_belong_is_said(polished):
    models, posteriors, x = polished
    with pytest.raises(TypeError, match=r"one as \[model\]"):
        ps.dictionaries_to_arviz(models[0], posteriors[0], x)
