"""What the browser shows is what the posterior says: sums, intervals, examples, neighbours."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import beta, binom

import probsae as ps
from probsae.activations import ActivationStore, StoreWriter
from probsae.comparison import Row
from probsae.report import gather_features, token_text
from probsae.report.comparison import comparison_table
from probsae.report.examples import N_TOP, N_UNDECIDED, WINDOW
from probsae.report.features import rate_interval
from probsae.report.inspect import feature_page
from probsae.report.payload import feature_payload
from probsae.report.sparse_codes import encode_sparse
from tests.report.planted import SLAB_SCALE, Planted, planted_activations, store_of

D_IN, N_TOKENS = 6, 1200


@pytest.fixture
def x():
    return planted_activations(N_TOKENS, D_IN)


@pytest.fixture
def text(tmp_path, x):
    store = store_of(tmp_path / "store", x, torch.arange(N_TOKENS) % 7)
    return token_text(store, decode=lambda ids: [f" w{i}" for i in ids])


def test_sparse_codes_are_the_dense_ones(x, monkeypatch):
    monkeypatch.setattr("probsae.dictionary._MAX_CODES", 4 * D_IN * 64)  # pieces of 64 tokens
    codes, dense = encode_sparse(Planted(D_IN), x), Planted(D_IN).encode(x)
    assert len(codes.entries.token) < 0.1 * dense.mean.numel()
    for feature in range(D_IN):
        kept = np.flatnonzero(dense.p_active[:, feature] > 0.02)
        entries = codes.of(feature)
        np.testing.assert_array_equal(entries.token, kept)
        np.testing.assert_array_equal(entries.p_active, dense.p_active[kept, feature])
        np.testing.assert_array_equal(entries.mean, dense.mean[kept, feature])
        np.testing.assert_allclose(
            entries.scale**2, dense.variance[kept, feature], rtol=1e-5, atol=1e-7
        )
    p = dense.p_active.double().numpy()
    np.testing.assert_allclose(codes.rate, p.mean(0), rtol=1e-12)
    np.testing.assert_allclose(codes.undecided, (p * (1 - p)).sum(0) / p.sum(0), rtol=1e-12)


def test_a_deterministic_dictionary_is_decided():
    codes = encode_sparse(ps.TopKSAE(d_in=8, d_sae=32, k=3), torch.randn(50, 8))
    assert codes.undecided.max() == 0
    assert codes.rate.sum() == pytest.approx(3)
    assert codes.entries.scale.max() == 0


def test_rate_interval_covers_as_often_as_it_says():
    # Averaged over rates drawn from its prior, a Bayesian interval's coverage is exactly its
    # level; here over 2,000 quantiles of the prior, exactly over all counts of 40.
    n, level = 40, 0.9
    rates = beta.ppf((np.arange(2000) + 0.5) / 2000, 0.5, 0.5)
    count = np.arange(n + 1.0)
    tail = (1 - level) / 2
    lower, upper = beta.ppf([[tail], [1 - tail]], 0.5 + count, 0.5 + n - count)
    ours = rate_interval(count, n, level)
    np.testing.assert_allclose(ours[0][1:], lower[1:])
    np.testing.assert_allclose(ours[1][:-1], upper[:-1])
    is_inside = (lower <= rates[:, None]) & (rates[:, None] <= upper)
    coverage = (binom.pmf(count, n, rates[:, None]) * is_inside).sum(1).mean()
    assert coverage == pytest.approx(level, abs=2e-3)
    # Ours reach 0 and 1 at the ends besides: zero active tokens do not exclude a rate of zero.
    assert (ours[0][0], ours[1][-1]) == (0, 1)


def test_rate_interval_holds_its_own_rate():
    """Also that of a feature which is never active, but for what an encoder's tails add up to."""
    count = np.array([0.0, 1e-20, 1e-4, 0.01, 1.0, 300 - 1e-4, 300.0])
    lower, upper = rate_interval(count, 300)
    assert (lower <= count / 300).all()
    assert (upper >= count / 300).all()


def test_top_examples_are_the_largest_codes(x, text):
    dense = Planted(D_IN).encode(x)
    data = gather_features(Planted(D_IN), x, text=text)
    for feature, one in enumerate(data.examples):
        z, p = dense.mean[:, feature].numpy(), dense.p_active[:, feature].numpy()
        assert one.top[0] == z.argmax()
        assert len(one.top) == N_TOP
        assert z[one.top].tolist() == sorted(z[one.top], reverse=True)
        assert len(one.undecided) <= N_UNDECIDED
        assert all(0.2 < p[row] < 0.8 for row in one.undecided)
        rows = np.array(one.top + one.undecided)
        gaps = np.abs(rows[:, None] - rows)[~np.eye(len(rows), dtype=bool)]
        assert gaps.min() > 2 * WINDOW
        near = np.abs(np.arange(N_TOKENS)[:, None] - rows).min(1) <= WINDOW
        np.testing.assert_array_equal(one.entries.token, np.flatnonzero(near & (p > 0.02)))
        assert one.edges == (0, z.max())
        for counts, which in (
            (one.likely, p > 0.5),
            (one.unlikely, (p > 0.02) & (p <= 0.5)),
        ):
            expected, _ = np.histogram(z[which], bins=24, range=one.edges)
            np.testing.assert_array_equal(counts, expected)
        assert data.columns.largest[feature] == pytest.approx(np.abs(z).max())


def test_common_tokens_are_shares_of_expected_activity(x, text):
    p = Planted(D_IN).encode(x).p_active.double()
    data = gather_features(Planted(D_IN), x, text=text)
    kept = torch.where(p > 0.02, p, 0)[:, 0]
    expected = torch.zeros(7).double().index_add(0, torch.from_numpy(text.index), kept)
    expected /= expected.sum()
    for kind, share in data.examples[0].tokens:
        assert share == pytest.approx(float(expected[kind]), rel=1e-6)
    shares = [share for _, share in data.examples[0].tokens]
    np.testing.assert_allclose(shares, sorted(expected.tolist(), reverse=True)[:6], rtol=1e-6)


def test_without_text_examples_are_single_tokens(x):
    data = gather_features(Planted(D_IN), x)
    one = data.examples[0]
    assert sorted(one.top + one.undecided) == one.entries.token.tolist()
    assert one.tokens == []


def test_nearest_features_by_cosine():
    model = ps.TopKSAE(d_in=5, d_sae=40, k=2)
    data = gather_features(model, torch.randn(30, 5))
    cosine = model.dictionary() @ model.dictionary().T - 2 * torch.eye(40)
    for feature, nearest in enumerate(data.nearest):
        best = cosine[feature].sort(descending=True)
        assert [other for other, _ in nearest] == best.indices[:6].tolist()
        torch.testing.assert_close(torch.tensor([c for _, c in nearest]), best.values[:6])


def test_a_feature_that_never_fires(x):
    x[:, 2] = -9
    data = gather_features(Planted(D_IN), x)
    assert data.examples[2].top == []
    assert data.columns.largest[2] == 0
    assert data.columns.rate_lower[2] >= 0
    assert data.columns.rate_upper[2] < 0.02


class Posterior:
    """What a dictionary's posterior offers the browser."""

    direction_variance = torch.linspace(0.1, 0.2, D_IN)

    def rate_interval(self, level):
        return torch.full((D_IN,), 0.01 * level), torch.full((D_IN,), 0.02 * level)


def test_a_posterior_gives_direction_variance_and_rate_interval(x):
    data = gather_features(Planted(D_IN), x, posterior=Posterior(), level=0.5)
    columns = data.columns
    np.testing.assert_allclose(columns.direction_variance, Posterior.direction_variance)
    np.testing.assert_allclose(columns.rate_lower, 0.005)
    np.testing.assert_allclose(columns.rate_upper, 0.01)
    assert data.interval_source.tokens == "tokens of the posterior"
    assert columns.direction_lower is None  # this one states none


def test_pages_show_the_interval_of_a_direction(x):
    class Whole(Posterior):
        def direction_interval(self, level):
            return level * self.direction_variance, self.direction_variance / level

    data = gather_features(Planted(D_IN), x, posterior=Whole(), level=0.5)
    np.testing.assert_allclose(data.columns.direction_upper, 2 * Posterior.direction_variance)
    screen = io.StringIO()
    Console(file=screen, width=200).print(feature_page(data, 0))
    assert "expected 1 - cosine 0.1, 50% interval 0.05 to 0.2" in screen.getvalue()
    assert feature_payload(data)["columns"]["direction_lower"][0] == 0.05


def test_pages_say_whose_the_intervals_of_the_rates_are(x):
    for posterior, name in ((None, "tokens shown"), (Posterior(), "tokens of the posterior")):
        data = gather_features(Planted(D_IN), x, posterior=posterior)
        screen = io.StringIO()
        Console(file=screen, width=200).print(feature_page(data, 0))
        assert f"({name}); number" in screen.getvalue()
        assert feature_payload(data)["interval"]["tokens"] == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.0}, "level must be"),
        ({"stability": torch.ones(5)}, "stability must have one entry for each of 6 features"),
        ({"logit_effects": [[("a", 1.0)]]}, "logit_effects must have"),
    ],
)
def test_what_does_not_fit_is_named(x, options, message):
    with pytest.raises(ValueError, match=message):
        gather_features(Planted(D_IN), x, **options)


def test_text_of_another_length_is_refused(x, text):
    with pytest.raises(ValueError, match="text must have one entry for each of 1199 tokens"):
        gather_features(Planted(D_IN), x[:-1], text=text)


def test_contexts_begin_where_positions_do(tmp_path, x):
    store = store_of(tmp_path / "s", x, torch.arange(N_TOKENS), context=15)
    text = token_text(store, 40)
    assert text.starts.tolist() == [0, 15, 30]
    assert [text.strings[i] for i in text.index[:3]] == ["#0", "#1", "#2"]


def test_a_store_without_tokens_has_no_text(tmp_path, x):
    writer = StoreWriter(tmp_path / "s", D_IN)
    writer.append(x)
    writer.finish()
    assert token_text(ActivationStore(tmp_path / "s")) is None


def test_payload_is_json_with_three_digits(x, text):
    data = gather_features(Planted(D_IN), x, text=text, stability=torch.full((D_IN,), torch.nan))
    payload = json.loads(json.dumps(feature_payload(data), allow_nan=False))
    assert payload["columns"]["stability"] == [None] * D_IN
    top, _, (rows, mean, scale, per_mille), *_ = payload["examples"][0]
    row = rows.index(top[0])
    post = Planted(D_IN).encode(x)
    assert mean[row] == pytest.approx(float(post.mean[top[0], 0]), rel=5e-3)
    assert per_mille[row] == round(1000 * float(post.p_active[top[0], 0]))
    assert scale[row] >= 0.9 * SLAB_SCALE


def test_comparison_marks_the_best_as_printed():
    rows = (
        Row("a", 8, fvu=1e-7, fvu_hard=0.5, l0=2.0, alive=8, mmcs=0.9),
        Row("b", 8, fvu=2e-7, fvu_hard=0.4, l0=1.0, alive=8),
    )
    table = comparison_table(ps.Report(rows, 100))
    best = {line.name: [cell.is_best for cell in line.cells] for line in table.lines}
    assert best == {
        "d_sae": [False, False],
        "fvu": [True, True],
        "fvu_hard": [False, True],
        "l0": [False, False],
        "alive": [False, False],
        "mmcs": [False, False],  # alone is not best
    }
    assert table.lines[-1].cells[1].text == "-"
