"""What arviz gets: named, consistent with the posterior, written and read, and usable."""

import math
import re
import types
import warnings

import numpy as np
import pytest
import torch

import probsae as ps
from probsae.arviz_face import import_arviz

az = import_arviz()
GROUPS = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data")


@pytest.fixture(scope="module")
def fitted():
    data = ps.SyntheticActivations(
        d_in=12, n_features=8, n_active=1, magnitudes=(1.0, 0.3), noise_scale=0.1, seed=0
    )
    torch.manual_seed(0)
    model = ps.SpikeSlabDictionary(d_in=12, d_sae=10)
    ps.fit(model, data, n_steps=200, batch_size=256)
    return model, data.sample(6)[0]


@pytest.fixture(scope="module")
def idata(fitted):
    return ps.to_arviz(*fitted, n_draws=1000, n_chains=2)


def test_groups_and_dims(idata):
    assert idata.posterior.codes.dims == ("chain", "draw", "token", "feature")
    assert idata.posterior.p_active.dims == ("chain", "draw", "token", "feature")
    assert idata.posterior.firing_rate.dims == ("chain", "draw", "feature")
    assert idata.posterior.noise_scale.dims == ("chain", "draw")
    assert idata.posterior_predictive.activations.dims == ("chain", "draw", "token", "dimension")
    assert idata.log_likelihood.activations.dims == ("chain", "draw", "token")
    assert idata.sample_stats.elbo.dims == ("chain", "draw", "token")
    assert idata.observed_data.activations.dims == ("token", "dimension")


def test_firing_rates_are_the_prior_s_wherever_it_has_some():
    model = ps.SparseVAE(4, 6)
    idata = ps.to_arviz(model, torch.randn(3, 4), n_draws=2)
    assert model.code_prior is not None
    expected = model.code_prior.rate.detach().numpy()
    np.testing.assert_allclose(idata.posterior.firing_rate.values[1, 1], expected, rtol=1e-6)


def test_draws_have_the_posterior_s_moments(fitted, idata):
    model, x = fitted
    posterior = model.encode(x)
    draws = idata.posterior.codes.values.reshape(2000, 6, 10)
    # 60 means at once; 5 standard errors are exceeded by chance with probability 4e-5.
    error = np.abs(draws.mean(0) - posterior.mean.numpy())
    assert (error <= 5 * np.sqrt(posterior.variance.numpy() / 2000) + 1e-6).all()
    share = (draws != 0).mean(0)
    p = posterior.p_active.numpy()
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / 2000) + 1e-3).all()


def test_draws_are_not_those_of_the_callers_seed(fitted):
    """Data may come from `torch.manual_seed(0)`: draws of seed 0 would know their support."""
    model, x = fitted
    with torch.random.fork_rng():
        torch.manual_seed(0)
        callers = model.encode(x).sample(200)
    drawn = ps.to_arviz(model, x, n_draws=100, n_chains=2, seed=0).posterior["codes"].values
    assert not np.array_equal(drawn.reshape(callers.shape), callers.numpy())


def test_log_likelihood_by_hand(fitted, idata):
    model, x = fitted
    codes = torch.tensor(idata.posterior.codes.values[1, 3], dtype=torch.float32)
    scale = float(model.noise_scale.detach())
    error = (x - model.decode(codes).detach()).square().sum(1) / scale**2
    by_hand = -0.5 * error - 12 * math.log(scale * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(
        idata.log_likelihood.activations.values[1, 3], by_hand.numpy(), rtol=1e-4
    )


def test_netcdf_round_trip(idata, tmp_path):
    idata.to_netcdf(tmp_path / "posterior.nc")
    again = az.from_netcdf(tmp_path / "posterior.nc")
    for group in GROUPS:
        assert set(again[group].data_vars) == set(idata[group].data_vars) != set()
        for name, values in idata[group].data_vars.items():
            np.testing.assert_array_equal(again[group][name], values)
            assert again[group][name].dims == values.dims, (group, name)


def test_arviz_reads_it(fitted, idata):
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")
    summary = az.summary(idata, var_names=["codes"], coords={"token": [0]}, kind="stats")
    posterior = fitted[0].encode(fitted[1])
    np.testing.assert_allclose(summary["mean"], posterior.mean[0], atol=0.05)
    az.plot_forest(idata, var_names=["codes"], coords={"token": [0]})
    # arviz 0.23 writes "codes[0, 3]" as the axis' labels, 1.x the feature as texts beside it.
    texts = [t for axes in plt.gcf().axes for t in (*axes.get_yticklabels(), *axes.texts)]
    features = [re.search(r"(\d+)\]?$", text.get_text()) for text in texts]
    assert {int(found[1]) for found in features if found} == set(range(10))
    plt.close("all")
    with warnings.catch_warnings():
        # Codes drawn given a token, scored without it: high Pareto k is the expected verdict.
        warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto")
        loo = az.loo(idata, var_name="activations")
    assert np.isfinite(getattr(loo, "elpd", None) or loo.elpd_loo)  # its name in 1.x, before


def test_deterministic_dictionary_draws_are_equal():
    model = ps.TopKSAE(d_in=6, d_sae=9, k=2)
    idata = ps.to_arviz(model, torch.randn(3, 6), n_draws=4)
    assert float(idata.posterior.codes.std("draw").max()) == 0


def test_array_and_bad_input():
    model = ps.SpikeSlabDictionary(d_in=6, d_sae=9)
    ps.to_arviz(model, np.zeros((2, 6)), n_draws=4)
    with pytest.raises(ValueError, match="d_in=6"):
        ps.to_arviz(model, torch.zeros(2, 9))
    with pytest.raises(ValueError, match="gigabyte"):
        ps.to_arviz(model, torch.zeros(200_000, 6))
    with pytest.raises(ValueError, match="n_draws"):
        ps.to_arviz(model, torch.zeros(2, 6), n_draws=0)


def test_arviz_1_gets_nested_groups(monkeypatch):
    """What 1.x's `from_dict` is called with, where Python is too old for it too."""
    fake = types.ModuleType("arviz")
    fake.__version__ = "1.0.0"
    fake.from_dict = lambda data, *, coords, dims: (data, coords, dims)
    monkeypatch.setattr("probsae.arviz_face.import_arviz", lambda: fake)
    model = ps.SpikeSlabDictionary(d_in=6, d_sae=9)
    groups, coords, dims = ps.to_arviz(model, torch.zeros(2, 6), n_draws=4)
    assert groups["posterior"]["codes"].shape == (2, 4, 2, 9)
    assert dims["codes"] == ["token", "feature"]
    assert len(coords["feature"]) == 9


def test_refined_posteriors_on_request(fitted):
    model, x = fitted
    refined = ps.to_arviz(model, x, n_draws=2000, refine=True)
    expected = ps.refine(model, x)
    np.testing.assert_allclose(
        refined.posterior.p_active.values[0, 0], expected.p_active.numpy(), rtol=1e-5
    )
    elbo = ps.inference.elbo_terms(model, x, expected).elbo.detach().numpy()
    np.testing.assert_allclose(refined.sample_stats.elbo.values[0, 0], elbo, rtol=1e-4)


def test_any_decoder_has_an_elbo(fitted):
    x = fitted[1]
    vae = ps.SparseVAE(d_in=12, d_sae=10)
    linear = ps.to_arviz(vae, x, n_draws=10).sample_stats.elbo.values[0, 0]
    bent = ps.SparseVAE(d_in=12, d_sae=10, decoder_hidden=3)  # whose last layer begins at zero
    bent.load_state_dict(vae.state_dict(), strict=False)
    draws = ps.to_arviz(bent, x, n_draws=4000)
    error = draws.log_likelihood.activations.values.std() / np.sqrt(8000)
    np.testing.assert_allclose(draws.sample_stats.elbo.values[0, 0], linear, atol=5 * error)
