"""What each deterministic SAE is, by its own formulas."""

import pytest
import torch
import torch.nn.functional as F

import probsae as ps
from probsae.activations import resources
from probsae.inference import objective

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def fresh(cls, **options):
    torch.manual_seed(1)
    model = cls(d_in=6, d_sae=12, **options)
    with torch.no_grad():
        model.b_enc.normal_(std=0.3)
        model.b_dec.normal_(std=0.3)
        model.W_enc.add_(0.2 * torch.randn(6, 12))
    return model


def loss_of(model, weight=1.0):
    model.train()
    # The ELBO's constant: log normalisers of the noise and of the prior.
    return objective(model, X, torch.tensor(weight))


def test_relu_loss_is_squared_error_plus_l1():
    model = fresh(ps.ReLUSAE, l1_coefficient=0.3)
    z = torch.relu((X - model.b_dec) @ model.W_enc + model.b_enc)
    x_hat = z @ model.W_dec + model.b_dec
    by_hand = (X - x_hat).square().sum(1).mean() + 0.3 * z.sum(1).mean()
    constant = 3 * torch.log(torch.tensor(torch.pi)) - 12 * torch.log(torch.tensor(0.3))
    torch.testing.assert_close(loss_of(model).loss, by_hand + constant)
    torch.testing.assert_close(model.loss(X).mean(), by_hand)


@pytest.mark.parametrize("cls", [ps.ReLUSAE, ps.GatedSAE, ps.JumpReLUSAE, ps.TopKSAE])
def test_location_gradient_is_autograd_s(cls):
    """The encoder's shortcut for b_dec gives the gradient of the plain formula."""
    model = fresh(cls)
    plain = ((X - model.b_dec) @ model.W_enc + model.b_enc).square().sum()
    (expected,) = torch.autograd.grad(plain, model.b_dec)
    (actual,) = torch.autograd.grad(model.pre_activation(X).square().sum(), model.b_dec)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("cls", [ps.ReLUSAE, ps.TopKSAE, ps.BatchTopKSAE, ps.MatryoshkaSAE])
def test_decoder_gradient_has_no_part_along_its_row(cls):
    model = fresh(cls)
    loss_of(model).loss.backward()
    along = (model.W_dec.grad * model.W_dec).sum(1)
    assert float(along.detach().abs().max()) < 1e-4 * float(model.W_dec.grad.norm(dim=1).max())


def test_topk_keeps_exactly_k_even_with_ties():
    model = fresh(ps.TopKSAE, k=3)
    with torch.no_grad():
        model.W_enc.zero_()
        model.b_enc.fill_(1.0)  # every pre-activation is 1
    assert model.encode(X).p_active.sum(1).tolist() == [3.0] * 40


def test_topk_keeps_the_largest():
    model = fresh(ps.TopKSAE, k=4)
    h = torch.relu((X - model.b_dec) @ model.W_enc + model.b_enc).detach()
    z = model.encode(X).mean
    for row, kept in zip(h, z, strict=True):
        assert torch.equal(kept.nonzero().flatten(), row.topk(4).indices.sort().values)


def test_topk_dead_features_learn_from_the_auxiliary_loss():
    model = fresh(ps.TopKSAE, k=1, dead_after_tokens=1)
    with torch.no_grad():
        model.b_enc.fill_(5.0)
        model.b_enc[5] = 0.0  # positive now and then, never the largest
        model.tokens_since_fired.fill_(10.0)
    loss_of(model).loss.backward()
    gradient = model.W_enc.grad[:, 5].norm()
    model.zero_grad()
    model.auxiliary_coefficient = 0.0
    loss_of(model).loss.backward()
    assert float(gradient) > float(model.W_enc.grad[:, 5].norm())


def test_topk_auxiliary_error_is_relative_to_what_is_unexplained():
    model = fresh(ps.TopKSAE, k=2, k_auxiliary=3, auxiliary_coefficient=0.25).eval()
    dead = torch.tensor([0, 3, 4, 7, 9])
    model.tokens_since_fired[dead] = 1e9  # and stay so: it is not training
    h = (X - model.b_dec) @ model.W_enc + model.b_enc
    residual = X - model.decode(model.codes(h))
    candidates = torch.zeros_like(h)  # five are dead: enough for three a token
    candidates[:, dead] = torch.relu(h[:, dead])
    kept = candidates * (candidates >= candidates.topk(3, dim=1).values[:, -1:])
    error = (residual - kept @ F.normalize(model.W_dec, dim=1)).square().sum(1)
    fvu = residual.square().sum() / (X - X.mean(0)).square().sum()
    by_hand = 0.25 * error / fvu.detach().clamp(max=1)
    auxiliary = model.auxiliary_loss(X, model.posterior(X), 1.0)
    torch.testing.assert_close(auxiliary, by_hand, rtol=1e-4, atol=1e-5)
    # Tokens that are all alike: nothing to explain, and a loss still.
    assert model.auxiliary_loss(X[:1], model.posterior(X[:1]), 1.0).isfinite().all()


def test_batch_topk_keeps_k_times_batch_in_training_and_the_threshold_later():
    model = fresh(ps.BatchTopKSAE, k=3).train()
    counts = []
    for _ in range(200):
        z = model.posterior(X).mean
        counts.append(int((z != 0).sum()))
    assert set(counts) == {3 * 40}
    # The same tokens: the running threshold has become this batch's, up to rounding.
    assert abs(int((model.encode(X).mean != 0).sum()) - 120) <= 1
    one = model.encode(X[:1]).mean
    torch.testing.assert_close(one, model.encode(X).mean[:1])


def test_jumprelu_gradients_are_the_kernel_s():
    model = fresh(ps.JumpReLUSAE, l0_coefficient=0.4, bandwidth=0.5)
    with torch.no_grad():
        model.log_threshold.fill_(-1.0)
    h = model.pre_activation(X)
    theta = model.threshold.detach()
    near = ((h - theta).abs() < 0.25).float().detach() / 0.5
    weights = torch.randn(40, 12)
    (actual,) = torch.autograd.grad((model.codes(h) * weights).sum(), model.log_threshold)
    # d/d log theta = theta d/d theta, and dz/dtheta = -(theta/eps) on the kernel.
    torch.testing.assert_close(actual, -(theta * theta * near * weights).sum(0))
    penalty = model.penalty(model.posterior(X)).sum()
    (actual,) = torch.autograd.grad(penalty, model.log_threshold)
    torch.testing.assert_close(actual, -(0.4 * theta * near).sum(0))
    assert torch.equal(model.codes(h) != 0, h > theta)


def test_gated_formula_and_loss():
    model = fresh(ps.GatedSAE, l1_coefficient=0.2)
    with torch.no_grad():
        model.b_mag.normal_()
        model.log_magnitude.normal_()
    h = (X - model.b_dec) @ model.W_enc
    gate = h + model.b_enc
    z = (gate > 0) * torch.relu(model.log_magnitude.exp() * h + model.b_mag)
    torch.testing.assert_close(model.encode(X).mean, z.detach(), rtol=1e-4, atol=1e-5)
    through_gate = torch.relu(gate) @ model.W_dec + model.b_dec
    by_hand = (X - through_gate).square().sum(1) + 0.2 * torch.relu(gate).sum(1)
    auxiliary = model.auxiliary_loss(X, model.posterior(X), 1.0)
    torch.testing.assert_close(auxiliary, by_hand, rtol=1e-4, atol=1e-5)


def test_matryoshka_adds_the_error_of_every_prefix():
    model = fresh(ps.MatryoshkaSAE, k=3, prefixes=(2, 5), auxiliary_coefficient=0.0).train()
    posterior = model.posterior(X)
    z = posterior.mean
    errors = [
        (X - z[:, :m] @ F.normalize(model.W_dec[:m], dim=1) - model.b_dec).square().sum(1)
        for m in (2, 5)
    ]
    torch.testing.assert_close(model.auxiliary_loss(X, posterior, 1.0), errors[0] + errors[1])


def test_too_little_memory_is_said_before_it_is_taken():
    with pytest.raises(MemoryError, match=r"1000000000 features in 4096 dimensions would take"):
        ps.TopKSAE(4096, 10**9)


def test_a_fit_that_would_not_fit_is_refused_and_changes_nothing(monkeypatch):
    model = ps.ReLUSAE(64, 512)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # Gradients and Adam's two moments, float32, and four arrays of codes for a batch of 100.
    n_bytes = 4 * (3 * sum(p.numel() for p in model.parameters()) + 4 * 100 * 512)
    monkeypatch.setattr(resources, "available_memory", lambda: n_bytes - 1)
    with pytest.raises(MemoryError, match="a fit of 512 features in 64 dimensions"):
        ps.fit(model, torch.randn(200, 64), n_steps=1, batch_size=100)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(resources, "available_memory", lambda: n_bytes)
    ps.fit(model, torch.randn(200, 64), n_steps=1, batch_size=100)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: ps.ReLUSAE(4, 50).encode(torch.randn(3_000, 4)), "the codes of 3000 tokens"),
        (lambda: ps.SyntheticActivations(n_features=5_000), "5000 features in 256 dimensions"),
        (lambda: ps.SyntheticActivations(4, 9, 2).sample(10**5), "100000 tokens of 9 features"),
        (
            lambda: ps.baselines.KMedoids(5, n_tokens=1_000).fit(torch.randn(1_000, 4)),
            "distances between 1000 tokens",
        ),
    ],
)
def test_whatever_is_large_asks_first(monkeypatch, use, message):
    monkeypatch.setattr(resources, "available_memory", lambda: 10**6)
    with pytest.raises(MemoryError, match=message):
        use()


def test_a_container_s_limit_counts(monkeypatch, tmp_path):
    free = resources.available_memory()
    assert free is None or free > 10_000
    for name, text in (
        ("memory.max", "20000"),
        ("memory.current", "15000"),
        ("memory.stat", "anon 9000\ninactive_file 4000"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)
    assert resources.available_memory() == 9_000
    (tmp_path / "memory.max").write_text("max")
    assert resources.available_memory() == pytest.approx(free, rel=0.5)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ps.TopKSAE(4, 8, k=9), "k must be"),
        (lambda: ps.TopKSAE(4, 8, k=0), "k must be"),
        (lambda: ps.TopKSAE(4, 8, k=2.5), "k must be a whole number"),
        (lambda: ps.SpikeSlabDictionary(4, 8, encoder_steps=1.5), "encoder_steps"),
        (lambda: ps.ReLUSAE(4, 8, l1_coefficient=0), "l1_coefficient"),
        (lambda: ps.JumpReLUSAE(4, 8, bandwidth=-1), "bandwidth"),
        (lambda: ps.GatedSAE(4, 8, l1_coefficient=-1), "l1_coefficient"),
        (lambda: ps.MatryoshkaSAE(4, 8, prefixes=(4, 2)), "prefixes"),
        (lambda: ps.ReLUSAE(4, 0), "d_sae"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
