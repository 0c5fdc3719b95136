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
    errors = StepErrors.of(statistics, rows, is_shown, noise, information)
    assert errors.observed[:100].mean() > 0.9
    assert 0.6 < errors.observed[900:1_000].mean() < 0.75
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
    errors = StepErrors.of(statistics, rows, is_shown, zeros[0] + 1, (zeros, zeros))
    assert (errors.fit_error == 0).all()
    assert (errors.variance == 1).all()
