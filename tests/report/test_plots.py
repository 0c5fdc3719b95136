"""Figures show the numbers they are given."""

import numpy as np
import torch

from probsae.report import plots


def test_recovery_draws_a_point_a_bin_and_the_chance_level():
    features = torch.nn.functional.normalize(torch.randn(64, 16), dim=1)
    probability = torch.linspace(0.1, 0.01, 64)
    learned = torch.cat([features[:32], -features[32:]])
    axes = plots.recovery_by_rate({"half": learned}, features, probability).axes[0]
    x, y = axes.lines[0].get_data()
    np.testing.assert_allclose(x, [probability[:32].mean(), probability[32:].mean()], rtol=1e-5)
    assert y[0] > 0.9999
    assert y[1] < 0.9
    assert len(axes.lines) == 2


def test_reliability_of_perfect_probabilities_lies_on_the_diagonal():
    p = torch.rand(200_000, 1)
    is_true = torch.rand(200_000, 1) < p
    axes = plots.reliability_diagram({"exact": (p, is_true)}).axes[0]
    x, y = (np.asarray(v, dtype=float) for v in axes.containers[0].lines[0].get_data())
    # Ten bins of 20,000: a standard error of at most .0036, and 5 of them.
    np.testing.assert_allclose(x, y, atol=0.018)


def test_loss_curves_draw_each_history():
    history = {"step": [1, 2, 3], "elbo": [-3.0, 2.0, 1.0]}
    history |= {"fvu": [0.5, 0.1, 0.2], "l0": [9.0, 3.0, 4.0]}
    drawn = history | {"elbo": [1.0, 0.0, 0.2]}
    panels = plots.loss_curves({"a": history, "b": history}).axes
    for axes, key in zip(panels, ("elbo", "fvu", "l0"), strict=True):
        assert len(axes.lines) == 2
        np.testing.assert_allclose(axes.lines[0].get_data()[1], drawn[key])


def test_tsne_shows_every_token():
    z = torch.zeros(60, 5)
    z[:50, 1] = torch.rand(50)
    figure = plots.tsne(torch.randn(60, 4), z)
    sizes = [len(c.get_offsets()) for c in figure.axes[0].collections]
    assert sizes == [10, 50]
