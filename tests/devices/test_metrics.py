"""Metrics and what they are laid out for, of codes on a device and on the CPU."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

import probsae as ps
from probsae import interop, metrics
from probsae.metrics import probing
from probsae.report import gather_features, plots

DATA = ps.SyntheticActivations(8, 12, 2, noise_scale=0.05, seed=0)
X, Z = DATA.sample(600)
FAST = {"n_sweeps": 1, "n_candidates": 8, "compile": False, "progress": False}


def fitted(family=ps.SpikeSlabDictionary, seed=0):
    torch.manual_seed(seed)
    model = family(8, 16)
    ps.fit(model, X, n_steps=40, batch_size=256, device="cpu", compile=False, progress=False)
    return model


@pytest.fixture(scope="module")
def model():
    return fitted()


def plain(value):
    """Numbers, tensors, and what holds them, as `assert_close` takes them."""
    if dataclasses.is_dataclass(value):
        return {name: plain(v) for name, v in vars(value).items() if not isinstance(v, str)}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def assert_near(its, mine, near):
    torch.testing.assert_close(plain(its), plain(mine), check_device=False, equal_nan=True, **near)


def random_directions(n=16, seed=0):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


OF_DIRECTIONS = {
    "mmcs": metrics.mmcs,
    "precision": metrics.mmcs_precision,
    "recovered": metrics.share_recovered,
    "matching": metrics.match_features,
    "nearest": metrics.nearest_features,
    "mcc": metrics.mcc,
    "cosines": metrics.max_cosines,
    "alignment": lambda a, b: metrics.align([a, b]),
    "table": lambda a, b: metrics.mmcs_table([a, b]),
    "reappearance": lambda a, b: metrics.reappearance(a, [b]),
    "families": lambda a, b: metrics.families(*metrics.nearest_features(a, b), len(a)),
}


@pytest.mark.parametrize("name", OF_DIRECTIONS)
def test_metrics_of_directions(name, device, near):
    first, second = random_directions(seed=0), random_directions(seed=1)
    metric = OF_DIRECTIONS[name]
    assert_near(metric(first.to(device), second.to(device)), metric(first, second), near)


@pytest.mark.parametrize("refine", [False, True])
def test_metrics_of_codes(refine, model, device, near):
    results = []
    for place in ("cpu", device):
        x, z = X[:100].to(place), Z[:100].to(place)
        its = copy.deepcopy(model).to(place)
        posterior = its.encode(x, refine=refine)
        match = metrics.match_features(its.dictionary(), DATA.features.to(place))
        true = z[:, match.true.to(z.device)]
        columns = match.learned.to(place)
        p = posterior.p_active[:, columns]
        results.append(
            [
                metrics.code_coverage(posterior, true, columns),
                metrics.code_pit(posterior, true, columns),
                metrics.l0(posterior.p_active),
                metrics.alive_features(posterior.p_active),
                metrics.density_histogram(posterior.p_active),
                metrics.support_scores(p > 0.5, true != 0),
                metrics.best_threshold_f1(p, true != 0),
                metrics.brier(p, true != 0),
                metrics.reliability(p, true != 0),
                metrics.inclusion_by_magnitude(p, true, [0.1, 0.5]),
                metrics.log_score_per_positive(p, true != 0),
                metrics.band_ece(p, true != 0),
                metrics.auroc(p.flatten(), (true != 0).flatten()),
                metrics.fvu(x, its.decode(posterior.mean)),
                metrics.correlate_codes(zip(posterior.mean.split(50), z.split(50), strict=True)),
            ]
        )
    assert_near(results[1], results[0], near)


@pytest.mark.filterwarnings("ignore::probsae.metrics.stability.DisagreementWarning")
def test_metrics_of_uncertain_directions(device, near):
    draws = [random_directions(seed=0) + 0.1 * torch.randn(8, 16, 8) for _ in range(2)]
    variance, rate = torch.rand(16) + 0.01, torch.rand(16)
    results = []
    for place in ("cpu", device):
        first, second = (d.to(place) for d in draws)
        mean, v, r = first.mean(0), variance.to(place), rate.to(place)
        found = metrics.reappearance(mean, [second.mean(0)])
        results.append(
            [
                metrics.direction_calibration(mean, random_directions().to(place), v),
                metrics.bad_feature_auroc(mean, random_directions()[:8].to(place), v, r),
                metrics.instability_auroc(v, found, r),
                metrics.direction_rhat([first, second]),
                metrics.family_posterior(first, second),
                metrics.chance_cosines(mean, X.to(place), n_directions=50),
            ]
        )
    assert_near(results[1], results[0], near)


CHECKS = {
    "residuals": lambda model, x: metrics.residual_check(model, x),
    "loo_pit": lambda model, x: metrics.loo_pit(model, x[:3], n_draws=50),
    "importance": lambda model, x: metrics.log_importance_ratios(model, x, n_draws=30),
    "simulation": lambda model, x: metrics.sbc_ranks(model, n_tokens=20, n_draws=9),
}


@pytest.mark.parametrize("name", CHECKS)
def test_checks_that_draw(name, model, device, near):
    x = X[:20]
    mine = CHECKS[name](model, x)
    its = CHECKS[name](copy.deepcopy(model).to(device), x.to(device))
    if device == "emulated":
        assert_near(its, mine, near)


@pytest.mark.parametrize("truth", ["source", "tensors"])
def test_evaluate(truth, model, device, near):
    reports = []
    for place in ("cpu", device):
        there = {"spikes": copy.deepcopy(model).to(place), "sae": fitted(ps.ReLUSAE).to(place)}
        data = DATA if truth == "source" else X.to(place)
        known = None if truth == "source" else (DATA.features.to(place), Z.to(place))
        reports.append(ps.evaluate(there, data, known, n_tokens=500))
    for its, mine in zip(reports[1].rows, reports[0].rows, strict=True):
        assert its.method == mine.method
        assert_near(its, mine, near)


def arrays(tree, groups):
    return {f"{g}.{n}": np.asarray(tree[g][n]) for g in groups for n in tree[g].data_vars}


def test_to_arviz(model, device, near):
    groups = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats")
    mine, its = (
        arrays(ps.to_arviz(copy.deepcopy(model).to(place), X[:4], n_draws=10), groups)
        for place in ("cpu", device)
    )
    assert its.keys() == mine.keys()
    if device == "emulated":
        assert_near(its, mine, near)


def test_probing(device):
    task = probing.concept_task(torch.arange(100) % 2 == 0, n_controls=2, n_folds=2)
    x = X[:100] + (torch.arange(100) % 2 == 0)[:, None]
    scores = [
        probing.localise(codes, probing.selectivity(task, codes)).score
        for codes in (x, x.to(device))
    ]
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)


def test_points_of_pictures(model, device):
    x, z = X[:100].to(device), Z[:100].to(device)
    plots.tsne(x, z)
    p_active = copy.deepcopy(model).to(device).encode(x).p_active[:, :12]
    plots.reliability_diagram({"spikes": (p_active, z != 0)})
    plots.recovery_by_rate({"spikes": random_directions().to(device)}, X[:9].to(device), z[0, :9])
    bins = metrics.reliability(p_active, z != 0)
    assert {values.device.type for values in bins} == {device}


@pytest.mark.parametrize("is_polished", [pytest.param(True, marks=pytest.mark.slow), False])
def test_pages_of_features(is_polished, model, device, near):
    pages = []
    for place in ("cpu", device):
        there = copy.deepcopy(model).to(place)
        posterior = ps.polish(there, X[:200], **FAST) if is_polished else None
        pages.append(gather_features(there, X.to(place), posterior=posterior, progress=False))
    assert_near(pages[1].columns, pages[0].columns, near)


@pytest.mark.slow
def test_dictionaries_to_arviz(model, device, near):
    trees = []
    for place in ("cpu", device):
        models = [copy.deepcopy(m).to(place) for m in (model, fitted(seed=1))]
        posteriors = [ps.polish(m, X, **FAST) for m in models]
        tree = ps.dictionaries_to_arviz(models, posteriors, X[:5].to(place), n_draws=10)
        trees.append(arrays(tree, ("posterior", "log_likelihood")))
    assert trees[1].keys() == trees[0].keys()
    if device == "emulated":
        assert_near(*trees[::-1], near)


@pytest.mark.parametrize("library", ["sae_lens", "dictionary_learning", "sparsify"])
def test_formats_of_other_libraries(library, device, near, tmp_path):
    model = fitted(ps.TopKSAE)
    expected = model.encode(X[:50]).mean
    getattr(interop, f"save_{library}")(model.to(device), tmp_path / "sae")
    back = getattr(interop, f"load_{library}")(tmp_path / "sae").to(device)
    assert_near(back.encode(X[:50]).mean, expected, near)


def test_the_estimator_and_baselines(device):
    estimator = ps.DictionaryEstimator(ps.TopKSAE, n_components=12, n_steps=5).fit(X.numpy())
    estimator.dictionary_.to(device)
    pca = ps.baselines.PCA(d_sae=4).fit(X.to(device))
    report = ps.evaluate([estimator, pca], X.to(device), n_tokens=100)
    assert [row.method for row in report.rows] == ["DictionaryEstimator", "PCA"]
