"""The objective through the kept codes is the objective."""

import copy

import pytest
import torch

import probsae as ps
from probsae.inference import NonFiniteElboError, objective
from probsae.inference.kept_objective import keeps_few, kept_objective
from probsae.inference.step import kept_step
from probsae.models.sae.kept import Support, decode_kept, kept_pre_activations, unit_rows

X = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
FAMILIES = [
    (ps.ReLUSAE, {"l1_coefficient": 0.3}),
    (ps.TopKSAE, {"k": 3, "dead_after_tokens": 150}),
    (ps.BatchTopKSAE, {"k": 3, "dead_after_tokens": 150}),
    (ps.MatryoshkaSAE, {"k": 3, "dead_after_tokens": 150}),
]


def fresh(cls, options, *, dead=()):
    torch.manual_seed(1)
    model = cls(d_in=12, d_sae=32, **options).double().train()
    with torch.no_grad():
        model.b_enc.normal_(mean=-0.5, std=0.3)
        model.b_dec.normal_(std=0.3)
        model.W_enc.add_(0.2 * torch.randn(12, 32))
        for feature in dead:
            model.b_enc[feature] = 0.05
            model.W_enc[:, feature] *= 0.01  # positive now and then, never among the largest
    return model


@pytest.mark.parametrize(
    ("cls", "options", "dead"),
    [(*family, ()) for family in FAMILIES] + [(*family, (4, 9)) for family in FAMILIES[1:]],
)
def test_values_gradients_and_counters_agree(cls, options, dead):
    dense = fresh(cls, options, dead=dead)
    if dead:
        dense.tokens_since_fired[list(dead)] = 1_000
    sparse = copy.deepcopy(dense)
    for _ in range(2):  # a second step with what the first one counted
        a = objective(dense, X.double(), torch.tensor(0.7))
        b = kept_objective(sparse, X.double(), torch.tensor(0.7))
        for name, value in a._asdict().items():
            torch.testing.assert_close(getattr(b, name), value, check_dtype=False, msg=name)
        assert (float(a.auxiliary) > 0) == (bool(dead) or cls is ps.MatryoshkaSAE)
        a.loss.backward()
        b.loss.backward()
        other = dict(sparse.named_parameters())
        for name, parameter in dense.named_parameters():
            if parameter.requires_grad:
                assert float(parameter.grad.abs().max()) > 0
                torch.testing.assert_close(other[name].grad, parameter.grad, msg=name)
        for (name, before), after in zip(dense.named_buffers(), sparse.buffers(), strict=True):
            torch.testing.assert_close(after, before, msg=name)


def test_products_have_their_gradients():
    mask = torch.rand(6, 10) < 0.3
    mask[2] = False  # a token without codes
    by_mask = Support.of_mask(mask)
    by_index = Support.of_index(torch.rand(6, 10).argsort(dim=1)[:, :4], 10)
    for support in (by_mask, by_index):
        n_kept = len(support.feature)
        values = torch.randn(n_kept, dtype=torch.float64, requires_grad=True)
        rows = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(
            decode_kept(values, rows, support), support.codes(values).to_dense() @ rows
        )
        assert torch.autograd.gradcheck(
            lambda v, r, s=support: decode_kept(v, r, s), (values, rows)
        )
        x = torch.randn(6, 5, dtype=torch.float64)
        W = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
        b = torch.randn(10, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda W, b, s=support, x=x: kept_pre_activations(x, W, b, x @ W + b, s), (W, b)
        )
        dense = support.codes(values).to_dense()
        torch.testing.assert_close(support.transposed_codes(values).to_dense(), dense.T)
        torch.testing.assert_close(support.sum_by_token(values), dense.sum(1))
        torch.testing.assert_close(support.sum_by_feature(values), dense.sum(0))
        torch.testing.assert_close(support.pick(dense), values)


def test_unit_rows_are_normalize():
    W = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit_rows(W), torch.nn.functional.normalize(W, dim=1))
    assert torch.autograd.gradcheck(unit_rows, W)
    zero = torch.zeros(2, 3, requires_grad=True)
    assert unit_rows(zero).eq(0).all()


def test_a_fit_takes_the_kept_codes_where_they_are_few(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    few, many = ps.TopKSAE(d_in=12, d_sae=32, k=4), ps.TopKSAE(d_in=12, d_sae=32, k=5)
    assert keeps_few(few, X)
    assert not keeps_few(many, X)
    assert not keeps_few(few, X.to("meta"))  # nor on a GPU, where looking at values costs
    relu = ps.ReLUSAE(d_in=12, d_sae=32)
    assert not keeps_few(relu, X)  # half of the pre-activations are positive at first
    shown = kept_objective(relu, X)
    assert not keeps_few(relu, X, shown)
    fewer = shown._replace(firing_rate=1.5 / 32 * shown.firing_rate / shown.firing_rate.mean())
    assert keeps_few(relu, X, fewer)
    assert not keeps_few(relu, X, fewer, is_compiled=True)  # a compiled dense step is faster
    with torch.no_grad():
        relu.b_enc.fill_(-10.0)
    assert keeps_few(relu, X)
    few.product_dtype = relu.product_dtype = torch.bfloat16
    assert keeps_few(few, X)
    assert not keeps_few(relu, X)  # with nothing to choose, dense products are then faster
    assert not keeps_few(ps.SpikeSlabDictionary(d_in=12, d_sae=32), X)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not keeps_few(few, X)  # torch's sparse products on a CPU are MKL's


@pytest.mark.parametrize("cls", [ps.TopKSAE, ps.BatchTopKSAE, ps.MatryoshkaSAE])
def test_the_encoder_product_may_be_in_bfloat16(cls):
    options = {"prefixes": (16,)} if cls is ps.MatryoshkaSAE else {}
    model = cls(d_in=12, d_sae=32, k=4, **options)
    exact = kept_objective(model, X).loss
    model.product_dtype = torch.bfloat16
    rounded = kept_objective(model, X).loss
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("cls", [ps.ReLUSAE, ps.TopKSAE, ps.BatchTopKSAE])
def test_codes_that_are_not_numbers_are_seen(cls):
    model = fresh(cls, {}).float()
    with torch.no_grad():
        model.b_enc.fill_(-10.0)
        model.b_enc[3] = torch.nan
    assert not bool(torch.isfinite(kept_objective(model, X).loss))
    model.is_initialized.fill_(True)
    with pytest.raises(NonFiniteElboError):
        ps.fit(model, X, n_steps=1, batch_size=50)


def test_members_of_an_ensemble_take_them_too(monkeypatch):
    x = torch.randn(400, 12, generator=torch.Generator().manual_seed(1))
    taken = []

    def noted(model, x, *rest):
        taken.append(type(model).__name__)
        return kept_step(model, x, *rest)

    monkeypatch.setattr("probsae.inference.ensemble.group.kept_step", noted)

    def members():
        torch.manual_seed(0)
        sizes = {"d_in": 12, "d_sae": 40}
        return [ps.TopKSAE(**sizes, k=3), ps.TopKSAE(**sizes, k=20), ps.BatchTopKSAE(**sizes, k=3)]

    together, alone = members(), members()
    options = {"n_steps": 20, "batch_size": 100, "seed": 0, "progress": False}
    ps.fit_ensemble(together, x, **options)
    assert taken.count("TopKSAE") == taken.count("BatchTopKSAE") == 20
    for one, other in zip(together, alone, strict=True):
        ps.fit(other, x, **options)
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)
        for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)


def test_both_paths_learn_the_same(monkeypatch):
    """A fit that begins dense and goes on sparse ends where a dense one does."""
    data = ps.SyntheticActivations(d_in=16, n_features=24, n_active=1, seed=0)
    x, _ = data.sample(2_000)
    paths = []

    def fitted(is_dense):
        torch.manual_seed(0)
        model = ps.ReLUSAE(d_in=16, d_sae=64, l1_coefficient=0.4)
        if is_dense:
            monkeypatch.setattr("probsae.inference.step.keeps_few", lambda *inputs: False)
        else:
            monkeypatch.setattr("probsae.inference.step.keeps_few", noted)
        ps.fit(model, x, n_steps=120, batch_size=200, learning_rate=1e-2, schedule=None)
        return model.dictionary()

    def noted(*inputs):
        paths.append(keeps_few(*inputs))
        return paths[-1]

    sparse, dense = fitted(False), fitted(True)
    assert not any(paths[:3])
    assert sum(paths[-20:]) >= 5
    torch.testing.assert_close(sparse, dense, atol=1e-3, rtol=0)
