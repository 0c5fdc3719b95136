"""The sparsity knob reaches what it is set to."""

import pytest
import torch

import probsae as ps
from probsae.inference import TargetL0
from probsae.inference.callbacks import Callback, FitState
from probsae.inference.target_l0 import _scale_noise


@pytest.mark.slow
@pytest.mark.parametrize("target", [2.0, 6.0])
def test_reaches_the_target_on_activations_without_a_true_one(target):
    # Dense Gaussian activations of decaying variance: any l0 is as true as another.
    torch.manual_seed(0)
    x = torch.randn(8_000, 16) * torch.linspace(2, 0.2, 16)
    model = ps.SpikeSlabDictionary(d_in=16, d_sae=24, learn_noise=False, noise_scale=0.7)
    ps.fit(model, x[:6_000], n_steps=250, batch_size=256, callbacks=[TargetL0(target)])
    row = ps.evaluate([model], x[6_000:]).rows[0]
    assert row.l0 == pytest.approx(target, rel=0.1)
    assert float(model.code_prior.rate.detach().sum()) == pytest.approx(target, rel=0.02)


class _FirstSum(Callback):
    """Keep the sum of the firing rates after the first step."""

    def on_step(self, state):
        if state.step == 1:
            self.value = float(state.model.code_prior.rate.detach().sum())


@pytest.mark.parametrize(
    ("target", "d_sae", "expected"),
    [
        (2.0, 256, 6.0),
        (32.0, 256, 96.0),
        (32.0 * 2**0.5, 256, 32 * 2**0.5 * 3**0.5),  # halfway between 32 and 64, in logarithms
        (64.0, 256, 64.0),
        (100.0, 256, 100.0),
        (6.0, 24, 12.0),  # half of all features
        (20.0, 24, 20.0),
    ],
)
def test_small_targets_begin_at_three_times_large_ones_at_once(target, d_sae, expected):
    torch.manual_seed(0)
    model = ps.SpikeSlabDictionary(d_in=16, d_sae=d_sae, learn_noise=False)
    # From there the first step's shift of all logits has only Adam's move to make up for.
    model.code_prior.rate_logit.data.fill_(torch.tensor(expected / d_sae).logit())
    first = _FirstSum()
    ps.fit(
        model, torch.randn(200, 16), n_steps=6, batch_size=32, callbacks=[TargetL0(target), first]
    )
    assert first.value == pytest.approx(expected, rel=0.03)


@pytest.mark.slow
def test_a_larger_target_reconstructs_better():
    torch.manual_seed(0)
    x = torch.randn(6_000, 16) * torch.linspace(2, 0.2, 16)
    rows = []
    for target in (2.0, 6.0):
        torch.manual_seed(0)
        model = ps.SpikeSlabDictionary(d_in=16, d_sae=24, learn_noise=False, noise_scale=0.7)
        ps.fit(model, x, n_steps=300, batch_size=256, callbacks=[TargetL0(target)])
        rows.append(ps.evaluate([model], x).rows[0])
    assert rows[1].fvu < rows[0].fvu
    assert rows[1].noise_scale < rows[0].noise_scale


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        (ps.SpikeSlabDictionary(4, 8), 2.0, "learn_noise=False"),
        (ps.ReLUSAE(4, 8), 2.0, "learn_noise=False"),
        (ps.SparseVAE(4, 8, prior="laplace", learn_noise=False), 2.0, "learn_noise=False"),
        (ps.SpikeSlabDictionary(4, 8, learn_noise=False), 8.0, "below d_sae"),
    ],
)
def test_what_cannot_be_steered_is_refused(model, target, message):
    with pytest.raises(ValueError, match=message):
        ps.fit(model, torch.randn(50, 4), n_steps=2, callbacks=[TargetL0(target)])
    with pytest.raises(ValueError, match="positive"):
        TargetL0(0.0)


def test_adam_does_not_remember_another_noise_scale():
    """Gradients over f squared from where the scale is f times as large: the same path."""
    gradients, ends = torch.randn(30, 6, 4), []
    for factor in (1.0, 5.0):
        torch.manual_seed(0)
        model = ps.SpikeSlabDictionary(4, 6, learn_noise=False)
        optimizer = torch.optim.Adam([model.W_dec], betas=model.adam_betas, eps=0)
        state = FitState(model, optimizer, None, 30, torch.device("cpu"), seed=0)
        for step, gradient in enumerate(gradients):
            if step == 15:
                _scale_noise(state, torch.tensor(factor))
            model.W_dec.grad = gradient / (factor**2 if step >= 15 else 1)
            optimizer.step()
        assert float(model.noise_scale) == pytest.approx(factor)
        ends.append(model.W_dec.detach())
    torch.testing.assert_close(*ends)
