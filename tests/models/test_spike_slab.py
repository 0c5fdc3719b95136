"""What only the spike-and-slab encoder has."""

import torch

import probsae as ps
from probsae.models.spike_slab import MAX_LEAN, share_explained


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


def test_filters_lean_no_further_than_the_bound():
    torch.manual_seed(0)
    model = ps.SpikeSlabDictionary(d_in=6, d_sae=8)
    with torch.no_grad():
        model.W_enc[:, :4] += 0.1 * torch.randn(6, 4)
        model.W_enc[:, 4:] += 3 * torch.randn(6, 4)
    before = model.W_enc.detach().clone()
    model.normalize_()
    lean, lean_before = model.W_enc - model.W_dec.T, before - model.W_dec.T
    is_free = lean_before.norm(dim=0) <= MAX_LEAN
    assert is_free.tolist() == [True] * 4 + [False] * 4  # 3 randn(6) is some 7 long
    assert torch.equal(model.W_enc[:, is_free], before[:, is_free])
    bound = torch.full((4,), MAX_LEAN)
    torch.testing.assert_close(lean.norm(dim=0)[~is_free], bound)
    cosine = torch.nn.functional.cosine_similarity(lean, lean_before, dim=0)
    torch.testing.assert_close(cosine, torch.ones(8))
