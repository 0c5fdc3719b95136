"""Resampling does what its description says, entry by entry."""

import pytest
import torch
import torch.nn.functional as F

import probsae as ps
from probsae.activations import take
from probsae.inference import Callback, Checkpoint, ResampleDeadFeatures
from tests.killed import KilledAfter

DEAD = [2, 7]


class Record(Callback):
    """Copies what matters just before and after the resampling callback."""

    def on_step(self, state):
        model = state.model
        self.seen = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.moments = {
            name: {k: v.clone() for k, v in state.optimizer.state[p].items()}
            for name, p in model.named_parameters()
            if p in state.optimizer.state
        }


def run(cls, n_steps=6, d_in=8):
    data = ps.SyntheticActivations(d_in=d_in, n_features=10, n_active=3, noise_scale=0.1, seed=0)
    torch.manual_seed(0)
    model = cls(d_in=d_in, d_sae=12)
    model.initialize_(data.sample(500, seed=0)[0])
    with torch.no_grad():
        model.b_enc[DEAD] = -100.0
        if cls is ps.JumpReLUSAE:
            model.log_threshold[DEAD] = 5.0
    before, after = Record(), Record()
    resample = ResampleDeadFeatures([n_steps], dead_after=n_steps, n_tokens=4096)
    ps.fit(
        model, data, n_steps=n_steps, batch_size=256, device="cpu",
        callbacks=[before, resample, after],
    )  # fmt: skip
    return data, before, resample, after


@pytest.mark.parametrize("cls", [ps.ReLUSAE, ps.GatedSAE, ps.JumpReLUSAE])
def test_dead_features_point_at_badly_explained_inputs(cls):
    data, before, resample, after = run(cls)
    assert resample.history == [(6, 2)]
    alive = [i for i in range(12) if i not in DEAD]
    for name, rows in [("W_dec", (alive,)), ("W_enc", (slice(None), alive)), ("b_enc", (alive,))]:
        assert torch.equal(after.seen[name][rows], before.seen[name][rows])
    direction = after.seen["W_dec"][DEAD]
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(2))
    norm = before.seen["W_enc"][:, alive].norm(dim=0).mean()
    torch.testing.assert_close(after.seen["W_enc"][:, DEAD], 0.2 * norm * direction.T)
    assert after.seen["b_enc"][DEAD].tolist() == [0.0, 0.0]
    if cls is ps.JumpReLUSAE:
        threshold = after.seen["log_threshold"]
        torch.testing.assert_close(threshold[DEAD], threshold[alive].mean().expand(2))
        assert float(after.moments["log_threshold"]["exp_avg_sq"][DEAD].abs().max()) == 0
    # Each direction is one of the inputs that were looked at, normalised.
    x = take(data, 4096, seed=6)
    inputs = F.normalize(x - after.seen["b_dec"], dim=1)
    assert float((inputs @ direction.T).max(0).values.min()) > 1 - 1e-5
    for name, index in [("W_dec", (DEAD,)), ("W_enc", (slice(None), DEAD)), ("b_enc", (DEAD,))]:
        for moment in ("exp_avg", "exp_avg_sq"):
            assert float(after.moments[name][moment][index].abs().max()) == 0
            kept = (slice(None), alive) if name == "W_enc" else (alive,)
            torch.testing.assert_close(
                after.moments[name][moment][kept], before.moments[name][moment][kept]
            )


def test_inputs_are_drawn_by_squared_loss():
    """With all but one token explained, the one that is not is what every direction becomes."""
    torch.manual_seed(0)
    model = ps.ReLUSAE(d_in=4, d_sae=6, l1_coefficient=1e-6)
    x = 1e-6 * torch.randn(200, 4)
    x[17] = torch.tensor([0.0, 3.0, 0.0, 4.0])
    with torch.no_grad():
        model.b_enc.fill_(-100.0)
    model.is_initialized.fill_(True)
    ps.fit(
        model, x, n_steps=2, batch_size=50, learning_rate=1e-9,
        callbacks=[ResampleDeadFeatures([2], dead_after=2, n_tokens=200)],
    )  # fmt: skip
    expected = torch.tensor([0.0, 0.6, 0.0, 0.8]).expand(6, 4)
    torch.testing.assert_close(model.W_dec.detach(), expected, rtol=1e-3, atol=1e-3)


def test_features_that_fire_are_left_alone():
    data = ps.SyntheticActivations(d_in=8, n_features=10, n_active=3, noise_scale=0.1, seed=0)
    torch.manual_seed(0)
    model = ps.ReLUSAE(d_in=8, d_sae=12)
    resample = ResampleDeadFeatures([3, 5], dead_after=2, n_tokens=512)
    ps.fit(model, data, n_steps=6, batch_size=256, callbacks=[resample])
    assert resample.history == [(3, 0), (5, 0)]


def test_iterators_are_refused():
    with pytest.raises(ValueError, match="only once"):
        ps.fit(
            ps.ReLUSAE(4, 6), iter([torch.randn(50, 4)]), n_steps=1,
            callbacks=[ResampleDeadFeatures([1], dead_after=1)],
        )  # fmt: skip


def test_probabilistic_dictionaries_are_refused():
    with pytest.raises(ValueError, match="only deterministic"):
        ps.fit(
            ps.SpikeSlabDictionary(4, 6), torch.randn(50, 4), n_steps=1,
            callbacks=[ResampleDeadFeatures([1], dead_after=1)],
        )  # fmt: skip


def test_a_square_dictionary_keeps_its_location():
    """With d_in = d_sae, b_dec has an encoder bias's shape."""
    _, before, resample, after = run(ps.ReLUSAE, d_in=12)
    assert resample.history[-1][1] == len(DEAD)
    assert torch.equal(before.seen["b_dec"], after.seen["b_dec"])
    assert bool((before.seen["b_dec"] != 0).all())


def test_nothing_unexplained_leaves_dead_features_alone():
    """Every loss is 0: no input can be drawn in proportion to it."""
    x = torch.zeros(100, 4)
    x[::2, 0] = 1.0
    model = ps.TopKSAE(d_in=4, d_sae=6, k=1)
    with torch.no_grad():
        model.W_dec[:4] = torch.eye(4)
        model.W_dec[4:] = torch.tensor([0.0, 0.0, 0.0, 1.0])
        model.W_enc.copy_(model.W_dec.T)
        model.b_enc[1:] = -100.0
    model.is_initialized.fill_(True)
    before = model.W_dec.detach().clone()
    resample = ResampleDeadFeatures([2], dead_after=2, n_tokens=100)
    ps.fit(model, x, n_steps=2, batch_size=50, learning_rate=1e-9, callbacks=[resample])
    assert resample.history == [(2, 0)]
    torch.testing.assert_close(model.W_dec.detach(), before)


def test_a_resumed_fit_knows_what_was_dead_before(tmp_path):
    data = ps.SyntheticActivations(d_in=8, n_features=10, n_active=3, noise_scale=0.1, seed=0)
    options = {"n_steps": 12, "batch_size": 64, "device": "cpu"}
    ends = []
    for is_killed in (False, True):
        torch.manual_seed(0)
        model = ps.ReLUSAE(d_in=8, d_sae=12)
        model.initialize_(data.sample(500, seed=0)[0])
        with torch.no_grad():
            model.b_enc[DEAD] = -100.0
        resample = ResampleDeadFeatures([10], dead_after=8, n_tokens=512)
        if is_killed:
            callbacks = [resample, Checkpoint(tmp_path / "c", every=5), KilledAfter(6)]
            with pytest.raises(KeyboardInterrupt):
                ps.fit(model, data, callbacks=callbacks, **options)
            resample = ResampleDeadFeatures([10], dead_after=8, n_tokens=512)
        resume = tmp_path / "c" if is_killed else None
        ps.fit(model, data, callbacks=[resample], resume=resume, **options)
        assert resample.history == [(10, 2)]
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
