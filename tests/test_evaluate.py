"""The comparison's numbers, where they are known, and its forms."""

import io
import re

import pytest
import torch
from rich.console import Console
from torch.distributions import Normal

import probsae as ps
from probsae.distributions import SpikeSlab
from probsae.models import CodePosterior, PointPosterior
from probsae.report.markdown import _table


class Oracle:
    """Knows the features and reads the codes off: features are orthonormal here."""

    def __init__(self, features, n_first=None):
        self.features = features[:n_first]

    def dictionary(self):
        return self.features

    def encode(self, x):
        z = x @ self.features.T
        return PointPosterior(torch.where(z > 1e-4, z, 0.0))

    def decode(self, z):
        return z @ self.features


@pytest.fixture(scope="module")
def data():
    source = ps.SyntheticActivations(d_in=12, n_features=8, n_active=2, decay=1.0, seed=0)
    source.features = torch.linalg.qr(source.features.T)[0].T.contiguous()
    return source


def test_an_oracle_is_perfect_and_half_of_one_half_so(data):
    oracles = {"all": Oracle(data.features), "half": Oracle(data.features, 4)}
    report = ps.evaluate(oracles, data, n_tokens=4000)
    row = report["all"]
    assert (row.mmcs, row.mcc, row.share_found, row.f1) == pytest.approx((1, 1, 1, 1), abs=1e-3)
    assert row.fvu == pytest.approx(0, abs=1e-6)
    assert row.l0 == pytest.approx(2, abs=0.1)
    assert row.alive == 8
    assert row.brier_ratio == pytest.approx(0, abs=1e-3)
    assert row.elbo is None
    half = report["half"]
    assert half.mmcs == pytest.approx(0.5, abs=1e-3)
    assert half.mmcs_precision == pytest.approx(1, abs=1e-3)
    assert half.recall == pytest.approx(0.5, abs=0.03)
    assert half.precision == pytest.approx(1, abs=1e-3)
    # Hits over half of predicted and true; no threshold finds what has no feature.
    assert half.f1 == pytest.approx(2 / 3, abs=0.03)
    assert half.best_f1 == pytest.approx(half.f1, abs=1e-6)
    # Two of eight are active on average: all called active, precision 1/4 and recall 1.
    assert row.f1_chance == pytest.approx(0.4, abs=0.02)
    assert 0 < row.mcc_chance < row.mmcs_chance < 1
    assert row.share_found_chance < 0.2
    assert (row.precision_chance, row.recall_chance) == pytest.approx((0.25, 1), abs=0.01)
    assert half.precision_chance == pytest.approx(0.25, abs=0.02)
    assert half.recall_chance == pytest.approx(0.5, abs=0.03)
    # Half the codes' second moment over their variance: .5 (1/12) / (1/12 - 1/64).
    assert half.fvu == pytest.approx(0.615, abs=0.03)


class Binary(Oracle):
    """Says 1 where a direction's projection is positive: no threshold can change that."""

    def encode(self, x):
        return PointPosterior((x @ self.features.T > 1e-4).float())


def _half_at_random(data):
    others = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    return torch.cat([data.features[:4], torch.nn.functional.normalize(others, dim=-1)])


def test_predictions_of_features_not_found_count_in_neither_f1(data):
    dictionaries = {
        "half": Binary(data.features, 4),
        "and others": Binary(_half_at_random(data)),
        # Left over by the assignment, not matched at chance: the true ones are all taken.
        "and more": Binary(torch.cat([data.features, _half_at_random(data)[4:]])),
    }
    half, others, more = ps.evaluate(dictionaries, data, n_tokens=4000).rows
    assert (others.share_found, more.share_found) == (0.5, 1)
    for name in ("precision", "recall", "f1", "best_f1"):
        assert getattr(others, name) == getattr(half, name)
    for row in (half, others, more):
        assert row.best_f1 == row.f1
        assert row.precision == pytest.approx(1, abs=1e-3)
    assert more.f1 == pytest.approx(1, abs=1e-3)


class Doubtful(Oracle):
    """A posterior of no model of ours, whose inactive codes would be large if they were not."""

    def encode(self, x):
        is_active = x @ self.features.T > 1e-4
        logits, mean = torch.where(is_active, 2.0, -2.0), torch.where(is_active, 0.1, 9.0)
        return CodePosterior(SpikeSlab(logits, Normal(mean, 0.1)))


def test_the_best_f1_is_never_below_f1(data):
    models = [ps.SpikeSlabDictionary(12, 10), ps.ReLUSAE(12, 10), ps.TopKSAE(12, 10, k=2)]
    dictionaries = [*models, Doubtful(data.features), Binary(data.features)]
    for row in ps.evaluate(dictionaries, data, n_tokens=1000).rows:
        assert row.best_f1 >= row.f1, row.method


def test_truth_as_tensors_gives_the_same(data):
    x, z = data.sample(2000, seed=1)
    oracle = {"all": Oracle(data.features)}
    a = ps.evaluate(oracle, x, truth=(data.features, z))
    b = ps.evaluate(oracle, data, n_tokens=2000, seed=1)
    assert a.rows == b.rows
    arrays = ps.evaluate(oracle, x.numpy(), truth=(data.features.numpy(), z.numpy()))
    assert arrays.rows == b.rows


def test_a_source_beside_another_says_nothing_of_its_tokens(data):
    other = ps.SyntheticActivations(d_in=12, n_features=5, n_active=1, seed=7)
    oracle = {"all": Oracle(data.features)}
    row, own = (ps.evaluate(oracle, data, truth=t, n_tokens=500).rows[0] for t in (other, None))
    assert (row.fvu, row.l0) == (own.fvu, own.l0)
    assert row.f1 is None
    assert row.mmcs == pytest.approx(ps.metrics.mmcs(data.features, other.features))
    same = ps.evaluate(oracle, data, truth=data, n_tokens=500).rows[0]
    assert same == own


def test_a_source_beside_activations_says_nothing_of_their_supports(data):
    x, _ = data.sample(500, seed=3)
    row = ps.evaluate({"all": Oracle(data.features)}, 2 * x, truth=data).rows[0]
    assert row.mmcs == pytest.approx(1, abs=1e-3)
    assert row.f1 is None
    assert row.l0 == pytest.approx(float((2 * x @ data.features.T > 1e-4).sum(1).double().mean()))


def test_probabilistic_columns_and_held_out_elbo(data):
    model = ps.SpikeSlabDictionary(d_in=12, d_sae=10)
    ps.fit(model, data, n_steps=150, batch_size=128)
    report = ps.evaluate([model, ps.ReLUSAE(d_in=12, d_sae=10)], data, n_tokens=1000)
    row, point = report.rows
    x, _ = data.sample(1000, seed=1)
    elbo = float(ps.inference.elbo_terms(model, x).elbo.detach().mean())
    assert row.elbo == pytest.approx(elbo, rel=1e-5)
    assert row.noise_scale == pytest.approx(float(model.noise_scale.detach()))
    assert 0 < row.interval_width < 1
    z = data.sample(1000, seed=1)[1]
    match = ps.metrics.match_features(model.dictionary(), data.features).above(0.9)
    covered = ps.metrics.code_coverage(model.encode(x), z[:, match.true], match.learned, [0.9])
    assert row.coverage == pytest.approx(float(covered.given_active[0]))
    p_active = model.encode(x).p_active[:, match.learned]
    assert row.brier == pytest.approx(ps.metrics.brier(p_active, z[:, match.true] != 0))
    assert point.interval_width is None
    assert point.band_ece is None


def test_sampled_elbos_are_reproducible_and_leave_the_callers_stream_alone(data):
    model = ps.SparseVAE(d_in=12, d_sae=10, decoder_hidden=8)
    torch.manual_seed(5)
    first = ps.evaluate([model], data, n_tokens=300).rows[0].elbo
    after = torch.rand(3)
    assert ps.evaluate([model], data, n_tokens=300).rows[0].elbo == first
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)


def test_sampled_elbos_do_not_draw_what_may_have_made_the_data(data, monkeypatch):
    monkeypatch.setattr("probsae.scores._sampled_elbo", lambda *_: float(torch.randn(())))
    model = ps.SparseVAE(d_in=12, d_sae=10, decoder_hidden=8)
    drawn = ps.evaluate([model], data, n_tokens=2, seed=7).rows[0].elbo
    torch.manual_seed(7)
    assert 2 * drawn != pytest.approx(float(torch.randn(())))


def test_without_truth_recovery_is_left_out():
    model = ps.SpikeSlabDictionary(d_in=12, d_sae=10)
    report = ps.evaluate([model], torch.randn(100, 12))
    assert report.rows[0].mmcs is None
    assert "mmcs" not in report.to_markdown()
    assert report.n_tokens == 100


def test_forms(data):
    report = ps.evaluate({"a": Oracle(data.features)}, data, n_tokens=500)
    assert ps.Report.from_json(report.to_json()) == report
    lines = report.to_markdown().splitlines()
    assert lines[0].startswith("| method | d_sae | fvu |")
    assert len(lines) == 3
    assert len({line.count("|") for line in lines}) == 1
    screen = io.StringIO()
    Console(file=screen, width=250).print(report)  # which shows its rich_table
    assert "mmcs" in screen.getvalue()
    with pytest.raises(KeyError, match="no method 'b'"):
        report["b"]


def test_equal_classes_get_different_names(data):
    report = ps.evaluate([Oracle(data.features), Oracle(data.features)], data, n_tokens=100)
    assert [row.method for row in report.rows] == ["Oracle", "Oracle 2"]


def test_bad_input(data):
    with pytest.raises(ValueError, match="at least one dictionary"):
        ps.evaluate([], data)
    x, z = data.sample(50)
    for n in (1, 5):
        with pytest.raises(ValueError, match=f"two different tokens .* got {n}, all equal"):
            ps.evaluate([Oracle(data.features)], torch.ones(n, 12))
    with pytest.raises(ValueError, match="features, codes"):
        ps.evaluate([Oracle(data.features)], x, truth=(data.features, z[:, :3]))


@pytest.mark.usefixtures("unchecked_types")
def test_one_model_is_a_comparison_too_and_other_things_are_named(data):
    model = ps.TopKSAE(d_in=12, d_sae=10, k=2)
    x = torch.randn(100, 12)
    assert ps.evaluate(model, x) == ps.evaluate([model], x)
    with pytest.raises(TypeError, match="got FitResult; pass a model, a list of them"):
        ps.evaluate([ps.fit(model, data, n_steps=1, batch_size=8)], x)
    with pytest.raises(TypeError, match="got str"):
        ps.evaluate("run", x)


@pytest.mark.usefixtures("unchecked_types")
def test_features_without_codes_are_no_truth(data):
    model = ps.TopKSAE(data.d_in, 10, k=2)
    with pytest.raises(TypeError, match=r"pair \(features, codes\), got ndarray"):
        ps.evaluate(model, data.sample(64)[0], truth=data.features.numpy())


def test_a_printed_report_is_its_table(data):
    report = ps.evaluate(ps.TopKSAE(data.d_in, 10, k=2), data, n_tokens=64)
    title, *table = str(report).splitlines()
    assert title.strip() == "1 dictionary on 64 held-out tokens"
    assert "mmcs" in table[1]
    assert f" {report.rows[0].mmcs:.4f} " in table[3]
    assert len({len(line) for line in table}) == 1  # one box, no wrapped lines
    assert report._repr_markdown_() == report.to_markdown()  # a notebook's, with every column


# What rich reads as a style, as an end of none, and what ends a cell of Markdown.
_NAMES = ("TopK[k=2]", "runs/[/x]", ":warning:", "k|8", "a\\|b", "two\nlines")


def test_names_are_printed_as_they_are(data):
    report = ps.evaluate(dict.fromkeys(_NAMES, Oracle(data.features)), data, n_tokens=50)
    printed = str(report)
    assert all(line in printed for name in _NAMES for line in name.splitlines())
    screen = io.StringIO()
    Console(file=screen, width=250).print(report)
    assert "TopK[k=2]" in screen.getvalue()
    for table in (report.to_markdown(), _table(report)):
        lines = table.splitlines()
        n_cells = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines}
        assert len(n_cells) == 1
        assert r"k\|8" in table
        assert r"a\\\|b" in table
        assert "two lines" in table
