"""What only the spike-and-slab encoder has."""

import torch

import probsae as ps
from probsae.models.spike_slab import share_explained


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
    x = 3 * torch.randn(200, 8)
    residual = (x - model.decode(model.encode(x).mean)).norm(dim=1)
    assert (residual < 10 * x.norm(dim=1)).all()
