import pytest
import torch

import probsae as ps
from probsae.inference.step_errors import StepErrors, observed_information
from probsae.inference.variational_em import Sums


def gaussian(n_tokens=3_000, d_sae=6, d_in=40, noise_scale=0.7):
    """Return x = z W + noise with z standard normal, W, and the posterior of z given x and W."""
    truth = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1).double()
    codes = torch.randn(n_tokens, d_sae).double()
    x = codes @ truth + noise_scale * torch.randn(n_tokens, d_in)
    return x, truth, noise_scale


def codes_under(rows, x, noise_scale):
    precision = torch.eye(len(rows)).double() + rows @ rows.T / noise_scale**2
    covariance = torch.linalg.inv(precision)
    return x @ rows.T @ covariance / noise_scale**2, covariance


def test_observed_information_is_the_curvature_of_the_log_evidence():
    """For one Gaussian code the evidence is normal too: N(0, w^T w + noise variance)."""
    x, truth, noise_scale = gaussian(d_sae=1)
    step = 1e-3 * torch.randn_like(truth)

    def log_evidence(rows):
        covariance = rows.T @ rows + noise_scale**2 * torch.eye(x.shape[1]).double()
        law = torch.distributions.MultivariateNormal(torch.zeros(x.shape[1]).double(), covariance)
        return law.log_prob(x).sum()

    def slope(rows):
        return torch.func.grad(log_evidence)(rows)

    expected = -(slope(truth + step) - slope(truth)).mul(step).sum() * noise_scale**2
    codes = []
    for rows in (truth, truth + step):
        mean, covariance = codes_under(rows, x, noise_scale)
        codes.append((mean, covariance.diagonal().expand_as(mean)))
    observed, complete = observed_information(codes[0], codes[1], x, truth, step)
    torch.testing.assert_close(observed[0], expected, rtol=1e-6, atol=0)
    assert 0.3 < observed[0] / complete[0] < 0.95


def test_information_on_features_whose_codes_are_known_is_all_observed():
    x, truth, _ = gaussian()
    codes = (torch.randn(len(x), 6).double(), torch.zeros(len(x), 6).double())
    step = torch.randn_like(truth)
    observed, complete = observed_information(codes, codes, x, truth, step)
    # The change of the gradient is then the information's own: <step, S step>.
    torch.testing.assert_close(observed, complete)


def test_features_are_given_figures_of_near_energies():
    statistics = Sums(ps.SpikeSlabDictionary(16, 1_200), 1_200, 1.0).dictionary
    rate = torch.linspace(0.5, 0.01, 1_200)
    codes = (torch.rand(4_000, 1_200) < rate).float()
    x = codes @ statistics.directions.float() + 0.1 * torch.randn(4_000, 16)
    statistics.add(codes, torch.zeros_like(codes), x)
    rows = statistics.solve(torch.ones(1_200))
    is_shown = torch.arange(1_200) < 1_000
    information = (torch.linspace(1.0, 0.6, 1_200).double(), torch.ones(1_200).double())
    noise = torch.tensor(0.01).double()
    errors = StepErrors.of(
        statistics, rows, is_shown, noise * rows.relative_variance, information, statistics.energy
    )
    assert errors.observed[:100].mean() > 0.9
    assert 0.6 < errors.observed[900:1_000].mean() < 0.8
    # The noise is .1, and with codes known the rows' own variance is true, but for o^2.
    assert (errors.variance * errors.observed**2).mean().item() == pytest.approx(1, abs=0.1)
    last = statistics.energy[:1_000].argmin()
    for figure in errors:
        assert (figure[1_000:] == figure[last]).all()


def test_nothing_shown_leaves_the_rows_their_own_errors():
    statistics = Sums(ps.SpikeSlabDictionary(8, 4), 4, 1.0).dictionary
    zeros = torch.zeros(4).double()
    is_shown = torch.zeros(4, dtype=torch.bool)
    rows = statistics.solve(torch.ones(4))
    errors = StepErrors.of(
        statistics, rows, is_shown, rows.relative_variance, (zeros, zeros), statistics.energy
    )
    assert (errors.fit_error == 0).all()
    assert (errors.variance == 1).all()


def test_intervals_hold_what_they_say_for_frequent_and_rare_features():
    """D is off by what falls with the energy; a step is taken from it, of 20,000 tokens' codes."""
    n, d_in, noise_scale = 600, 100, 0.3
    truth = torch.nn.functional.normalize(torch.randn(n, d_in), dim=1).double()
    rate = torch.logspace(-0.7, -2.7, n)
    fit_variance = 1e-5 * rate.double() ** -0.8
    statistics = Sums(ps.SpikeSlabDictionary(d_in, n), n, 1.0).dictionary
    start = truth + fit_variance.sqrt()[:, None] * torch.randn(n, d_in)
    statistics.move(torch.nn.functional.normalize(start, dim=1))
    for _ in range(10):
        codes = torch.rand(2_000, n) * (torch.rand(2_000, n) < rate)
        x = codes @ truth.float() + noise_scale * torch.randn(2_000, d_in)
        statistics.add(codes, torch.zeros_like(codes), x)
    rows = statistics.solve(torch.zeros(n))
    stated = noise_scale**2 * rows.relative_variance
    is_shown = torch.ones(n, dtype=torch.bool)
    information = (torch.ones(n).double(), torch.ones(n).double())
    errors = StepErrors.of(statistics, rows, is_shown, stated, information, rate)
    step = rows.mean - statistics.directions
    found = statistics.directions + errors.fit_error[:, None] * step
    expected = (d_in - 1) / 2 * stated * errors.variance * errors.fit_error
    result = ps.metrics.direction_calibration(found, truth, expected, variance_dof=errors.dof)
    assert result.share_kept == 1
    for group in (slice(None), slice(0, 200), slice(400, 600)):
        part = ps.metrics.direction_calibration(
            found[group], truth[group], expected[group], variance_dof=errors.dof[group]
        )
        # 200 features: a standard error of 2%, and neighbours' figures err together.
        assert 0.83 < part.coverage < 0.97
        assert part.median_ratio == pytest.approx(1, abs=0.1)
