"""What only the spike-and-slab encoder has."""

import pytest
import torch
from torch.distributions import kl_divergence

import probsae as ps
from probsae.distributions import SpikeSlab, TiltedSpikeSlab
from probsae.inference import objective
from probsae.models.base import as_event
from probsae.models.spike_slab import MAX_FILTER_NORM, max_lean, share_explained


def test_share_is_the_nearest_multiple_and_never_an_overshoot():
    x, explained = torch.randn(50, 7), torch.randn(50, 7)
    share = share_explained(x, explained)
    assert ((share >= 0) & (share <= 1)).all()
    error = (x - share * explained).norm(dim=1)
    for other in torch.linspace(0, 1, 21):
        assert (error <= (x - other * explained).norm(dim=1) + 1e-5).all()
    torch.testing.assert_close(share_explained(x, 4 * x), torch.full((50, 1), 0.25))
    assert (share_explained(x, torch.zeros(50, 7)) == 0).all()


def test_tokens_explained_many_times_over_stay_bounded():
    """Directions that are nearly one: without the share each undamped step overshoots."""
    torch.manual_seed(0)
    model = ps.SpikeSlabDictionary(d_in=8, d_sae=64, encoder_steps=12, noise_scale=0.1)
    with torch.no_grad():
        axis = torch.randn(8)
        model.W_dec.copy_(axis + 0.3 * torch.randn(64, 8))
        model.W_enc.copy_(model.directions.T)
        model.log_step_noise.fill_(-2.0)
        model.damping_logit.fill_(2.0)
        model.code_prior.rate_logit.fill_(-3.2)
    x = 3 * torch.randn(200, 8)
    residual = (x - model.decode(model.encode(x).mean)).norm(dim=1)
    assert (residual < 10 * x.norm(dim=1)).all()


def test_filters_stay_near_their_directions():
    torch.manual_seed(0)
    model = ps.SpikeSlabDictionary(d_in=6, d_sae=9)
    directions = model.directions.detach().T
    normal = torch.linalg.qr(torch.stack([directions, torch.randn(6, 9)]).permute(2, 1, 0))
    across = normal.Q[:, :, 1].T  # a unit vector at right angles to each direction
    near, far, long = slice(0, 3), slice(3, 6), slice(6, 9)
    with torch.no_grad():
        model.W_enc[:, near] = 1.05 * directions[:, near] + 0.3 * across[:, near]
        model.W_enc[:, far] = 0.2 * directions[:, far] + 2 * across[:, far]
        model.W_enc[:, long] = 3 * directions[:, long] + across[:, long]
    before = model.W_enc.detach().clone()
    model.normalize_()
    torch.testing.assert_close(model.W_enc[:, near], before[:, near])
    bounded = 0.2 * (directions[:, far] + max_lean(model.d_in) * across[:, far])
    torch.testing.assert_close(model.W_enc[:, far], bounded)
    shorter = before[:, long] * (MAX_FILTER_NORM / 10**0.5)
    torch.testing.assert_close(model.W_enc[:, long], shorter)


def test_filters_that_point_away_can_come_back():
    model = ps.SpikeSlabDictionary(d_in=6, d_sae=8)
    with torch.no_grad():
        model.W_enc.copy_(-model.directions.T + 0.1 * torch.randn(6, 8))
    model.normalize_()
    assert torch.isfinite(model.W_enc).all()
    with torch.no_grad():
        model.W_enc.zero_()
    model.normalize_()
    assert torch.isfinite(model.W_enc).all()


@pytest.mark.parametrize("name", ["rate_logit", "slab_mean", "log_slab_scale"])
def test_a_former_posterior_is_held_against_the_prior_as_it_is_now(name):
    torch.manual_seed(0)
    model, x = ps.SpikeSlabDictionary(d_in=6, d_sae=9), 3 * torch.randn(5, 6)
    for infer in (model.encode, model.posterior):
        post = infer(x)
        q = post.distribution
        before = SpikeSlab(q.logits.clone(), q.slab.expand(q.batch_shape))
        former = model.kl(post)
        with torch.no_grad():
            model.code_prior.get_parameter(name).add_(1)
        torch.testing.assert_close(model.kl(post), kl_divergence(as_event(before), model.prior()))
        assert not torch.allclose(model.kl(post), former)


class OwnPosterior(ps.SpikeSlabDictionary):
    """Tilts another law than its prior."""

    def posterior(self, x):
        q = super().posterior(x).distribution
        prior = SpikeSlab(q.prior.logits + 1, q.prior.slab)
        return ps.CodePosterior(TiltedSpikeSlab(prior, x @ self.W_enc, torch.ones(self.d_sae)))


class OwnDivergence(ps.SpikeSlabDictionary):
    def kl(self, posterior):
        return 2 * super().kl(posterior)


@pytest.mark.parametrize("cls", [ps.SpikeSlabDictionary, OwnPosterior, OwnDivergence])
def test_a_step_s_divergence_is_that_of_the_hooks(cls):
    torch.manual_seed(0)
    model, x = cls(d_in=6, d_sae=9), 3 * torch.randn(5, 6)
    shown = objective(model, x)
    torch.testing.assert_close(shown.kl, model.kl(model.encode(x)).mean())
    torch.testing.assert_close(shown.elbo, shown.log_likelihood - shown.kl)
