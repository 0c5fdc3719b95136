"""What the generators promise."""

import itertools
import math

import pytest
import torch
from scipy.stats import truncnorm

import probsae as ps
from tests.conftest import FALSE_ALARM_RATE

CORRELATIONS = [None, "copula", "per_batch", "hierarchy"]


def make(**options):
    return ps.SyntheticActivations(d_in=16, n_features=40, n_active=4, decay=0.95, **options)


def test_probabilities_sum_to_n_active_and_decay():
    data = ps.SyntheticActivations(seed=0)
    p = data.firing_probability
    assert float(p.sum()) == pytest.approx(5, rel=1e-5)
    torch.testing.assert_close(p[1:] / p[:-1], torch.full((511,), 0.99), rtol=1e-4, atol=1e-6)
    assert float(p[0]) == pytest.approx(0.0503, abs=1e-4)
    assert float(p[-1]) == pytest.approx(3.0e-4, abs=2e-5)


@pytest.mark.parametrize("decay", [0.7, 0.5, 0.01])
def test_probabilities_sum_to_n_active_however_steeply_they_fall(decay):
    p = ps.SyntheticActivations(d_in=4, n_features=512, n_active=5, decay=decay).firing_probability
    assert float(p.double().sum()) == pytest.approx(5, rel=1e-6)
    falling = p[(p < 1) & (p > 1e-30)].double()
    ratios = falling[1:] / falling[:-1]
    torch.testing.assert_close(ratios, torch.full_like(ratios, decay), rtol=1e-5, atol=0)


def test_rarer_features_than_numbers_go_are_refused():
    with pytest.raises(ValueError, match="n_active=500"):
        ps.SyntheticActivations(d_in=4, n_features=512, n_active=500, decay=0.01)


@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("magnitudes", ["uniform", "uniform_product", (1.0, 0.5)])
def test_codes_are_exactly_what_made_the_activations(correlation, magnitudes):
    data = make(correlation=correlation, magnitudes=magnitudes)
    x, z = data.sample(200)
    torch.testing.assert_close(x, z @ data.features)
    assert bool((z >= 0).all())
    torch.testing.assert_close(data.features.norm(dim=1), torch.ones(40))


@pytest.mark.parametrize("correlation", [None, "copula", "hierarchy"])
def test_every_feature_keeps_its_firing_probability(correlation):
    n = 100_000
    data = make(correlation=correlation)
    share = (data.sample(n, seed=0)[1] != 0).double().mean(0)
    p = data.firing_probability.double()
    # Bonferroni over 40 features.
    k = float(torch.special.ndtri(torch.tensor(1 - FALSE_ALARM_RATE / 80, dtype=torch.float64)))
    assert bool(((share - p).abs() < k * (p * (1 - p) / n).sqrt()).all())


def test_per_batch_has_n_active_and_no_correlation_inside_a_call():
    data = make(correlation="per_batch")
    rates = []
    for seed in range(3):
        z = data.sample(50_000, seed=seed)[1] != 0
        assert float(z.double().sum(1).mean()) == pytest.approx(4, abs=0.05)
        rates.append(z.double().mean(0))
        on = z[:, :8].double()
        correlation = torch.corrcoef(on.T) - torch.eye(8)
        assert float(correlation.abs().max()) < 0.03
    assert float((rates[0] - rates[1]).abs().max()) > 0.02


def test_per_batch_has_n_active_where_it_would_scale_a_probability_above_1():
    data = ps.SyntheticActivations(
        d_in=4, n_features=64, n_active=20, decay=0.9, correlation="per_batch"
    )
    for seed in range(3):
        z = data.sample(20_000, seed=seed)[1] != 0
        assert float(z.double().sum(1).mean()) == pytest.approx(20, abs=0.1)


def test_copula_correlates_inside_a_call():
    on = (make(correlation="copula").sample(50_000)[1] != 0)[:, :8].double()
    assert float((torch.corrcoef(on.T) - torch.eye(8)).abs().max()) > 0.08


def test_children_fire_only_where_their_parent_does():
    data = make(correlation="hierarchy")
    on = data.sample(20_000)[1] != 0
    assert bool((on <= on[:, data.parent]).all())
    n_children = torch.bincount(data.parent, minlength=40) - 1
    assert n_children[:10].tolist() == [3] * 10
    assert bool((n_children[10:] == -1).all())
    # Of a parent that fires: its children are independent of each other.
    among = on[on[:, 0]][:, (data.parent == 0).nonzero().flatten()[1:]].double()
    assert float((torch.corrcoef(among.T) - torch.eye(3)).abs().max()) < 0.06
    assert make().parent.tolist() == list(range(40))


def test_noise_has_its_scale():
    data = make(noise_scale=0.3)
    x, z = data.sample(20_000)
    assert float((x - z @ data.features).std()) == pytest.approx(0.3, rel=0.01)


def test_seeds():
    a, b, c = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(a.features, b.features)
    assert not torch.equal(a.features, c.features)
    assert torch.equal(a.sample(10)[0], b.sample(10)[0])
    assert not torch.equal(a.sample(10)[0], a.sample(10)[0])
    assert torch.equal(a.sample(10, seed=3)[0], a.sample(10, seed=3)[0])
    first = [next(a.batches(8, seed=5)), next(a.batches(8, seed=5)), next(a.batches(8, seed=6))]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize("seed", range(4))
def test_a_generator_of_the_same_seed_does_not_know_the_features(seed):
    data = ps.SyntheticActivations(seed=seed)
    chance = ps.metrics.chance_level(768, 512, 256)["mmcs"]
    torch.manual_seed(seed)
    model = ps.SpikeSlabDictionary(256, 768)
    assert ps.metrics.mmcs(model.dictionary(), data.features) < 1.05 * chance
    own = torch.Generator().manual_seed(seed)
    z = data.sample(64, seed=seed)[1]
    assert not torch.equal(torch.rand(z.shape, generator=own) < data.firing_probability, z != 0)
    torch.manual_seed(seed)
    random = torch.randn(768, 256)
    assert ps.metrics.mmcs(random, data.features) < 1.05 * chance


def test_magnitude_laws():
    z = make(magnitudes="uniform_product").sample(50_000)[1]
    # P(UV < .05) = .05 (1 - log .05)
    assert float((z[z != 0] < 0.05).double().mean()) == pytest.approx(0.2, abs=0.01)
    z = make(magnitudes=(1.0, 0.5)).sample(50_000)[1]
    # 1 + .5 phi(2)/Phi(2)
    assert float(z[z != 0].mean()) == pytest.approx(1.0276, abs=0.005)


@pytest.mark.parametrize("ratio", [-4.0, -8.0, -10.0, -36.0])
def test_magnitudes_of_a_mean_far_below_zero(ratio):
    z = make(magnitudes=(0.1 * ratio, 0.1)).sample(50_000)[1]
    law = truncnorm(-ratio, math.inf, loc=0.1 * ratio, scale=0.1)
    magnitude = z[z != 0].double()
    error = 5 * law.std() / math.sqrt(len(magnitude))
    assert float(magnitude.mean()) == pytest.approx(law.mean(), abs=error)


@pytest.mark.parametrize(
    "options",
    [
        {"d_in": 0},
        {"n_features": 0},
        {"n_active": 0},
        {"n_active": 41, "n_features": 40},
        {"decay": 0.0},
        {"decay": 1.1},
        {"noise_scale": -1.0},
        {"noise_scale": float("nan")},
        {"d_in": 8.5},
        {"magnitudes": (1.0, 0.0)},
        {"magnitudes": (1.0, float("nan"))},
        {"magnitudes": (1.0, 0.5, 2.0)},
        {"magnitudes": (-5.0, 0.1)},
        {"magnitudes": 3},
        {"magnitudes": "normal"},
        {"correlation": "all"},
        {"decay": 1.0, "correlation": "hierarchy"},
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_arguments_name_themselves(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ps.SyntheticActivations(**options)


def test_it_is_an_endless_iterator_of_the_same_batches():
    source = ps.SyntheticActivations(d_in=8, n_features=10, n_active=2, seed=3)
    first = list(itertools.islice(source, 3))
    assert all(batch.shape[1] == 8 for batch in first)
    assert not torch.equal(first[0], first[1])
    for a, b in zip(first, itertools.islice(source, 3), strict=True):
        assert torch.equal(a, b)
