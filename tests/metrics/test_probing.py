"""Probing: hand-computed values, planted concepts, and what may not change a score."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LogisticRegression

from probsae.metrics import probing
from probsae.metrics.probing import probes
from probsae.metrics.probing.selectivity import _ranking, balanced_accuracies
from tests.conftest import FALSE_ALARM_RATE
from tests.metrics.planted import planted

# ------------------------------------------------------------------------------ probes


@pytest.mark.parametrize(("n", "d"), [(60, 7), (30, 90)])
def test_probe_is_the_optimum_that_another_solver_finds(n, d):
    """QR and Newton against scikit-learn's L-BFGS on the standardised codes, in both shapes."""
    codes, labels = planted(n, d)
    penalty = 0.05
    probe = probing.fit_probe(codes, labels, penalty=penalty)
    x = codes.numpy()
    scale = x.std(0) * math.sqrt(d)
    other = LogisticRegression(
        C=1 / (penalty * n), class_weight="balanced", solver="lbfgs", tol=1e-12, max_iter=100_000
    ).fit((x - x.mean(0)) / scale, labels.numpy())
    weight = other.coef_[0] / scale
    np.testing.assert_allclose(probe.weight.numpy(), weight, rtol=1e-5, atol=1e-7)
    assert probe.intercept == pytest.approx(other.intercept_[0] - weight @ x.mean(0), abs=1e-5)


def test_two_points_by_hand():
    # Codes -1 and 1: b = 0, and the optimum solves w penalty = 1 / (1 + e^w).
    codes = torch.tensor([[-1.0], [1.0]])
    probe = probing.fit_probe(codes, torch.tensor([False, True]), penalty=0.1)
    w = float(probe.weight[0])
    assert 0.1 * w == pytest.approx(1 / (1 + math.exp(w)), abs=1e-6)
    assert probe.intercept == pytest.approx(0, abs=1e-6)


def test_probe_converges_at_312_tokens_and_16384_features_without_a_warning():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(312, 16_384, generator=generator).relu() ** 3
    codes *= 10 ** torch.linspace(-6, 6, 16_384)  # twelve orders of magnitude of units
    labels = torch.arange(312) % 2 == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = probing.fit_probe(codes, labels)
    assert bool((probe.decide(codes) == labels).all())  # separable, as any labels are here

    # The optimum of the 16,384 weights that `fit_probe` states, by automatic differentiation: the
    # objective is strongly convex, so that a gradient g is at most |g| / penalty away from it.
    x = codes.double()
    scale = x.std(0, correction=0) * math.sqrt(16_384)
    w = (probe.weight * scale).requires_grad_()
    b = torch.tensor(probe.intercept + float(probe.weight @ x.mean(0)), dtype=torch.float64)
    b.requires_grad_()
    margin = (x - x.mean(0)) / scale @ w + b
    losses = torch.nn.functional.softplus(torch.where(labels, -margin, margin))
    objective = 0.5 * (losses[labels].mean() + losses[~labels].mean())
    objective = objective + 0.5 * probing.PENALTY * w.square().sum()
    gradient = torch.cat([*(g.reshape(-1) for g in torch.autograd.grad(objective, (w, b)))])
    assert float(gradient.norm()) < 1e-9


@pytest.mark.parametrize(("limit", "value"), [("_MAX_NEWTON_STEPS", 1), ("_SOLVER_TOLERANCE", 0.1)])
def test_a_solver_that_stops_early_is_refused(monkeypatch, limit, value):
    codes, labels = planted(noise=2.0)
    monkeypatch.setattr(probes, limit, value)
    with pytest.raises(probing.ProbeConvergenceError, match="gradient"):
        probing.fit_probe(codes, labels)


def test_probe_ignores_constant_features_and_says_what_is_wrong():
    codes, labels = planted(d=3)
    codes[:, 1] = 7.0
    assert float(probing.fit_probe(codes, labels).weight[1]) == 0
    with pytest.raises(ValueError, match="no feature varies"):
        probing.fit_probe(torch.ones(60, 3), labels)
    with pytest.raises(ValueError, match="both classes"):
        probing.fit_probe(codes, torch.ones(60, dtype=torch.bool))
    with pytest.raises(ValueError, match="penalty"):
        probing.fit_probe(codes, labels, penalty=0.0)


@pytest.mark.parametrize("n_features", [None, 2])
def test_codes_that_never_vary_carry_nothing(n_features):
    labels = torch.arange(45) % 3 == 0
    task = probing.concept_task(labels, n_controls=3)
    found = probing.selectivity(task, torch.full((45, 4), 0.3), n_features=n_features)
    assert found.accuracy == 0.5
    assert found.control_accuracies.tolist() == [0.5] * 3
    assert (found.value, *found.interval()) == (0, 0, 0)
    # A code that varies in one fold only is seen by the probes of the others, and by no other.
    alone = torch.zeros(45, 1)
    fold = torch.from_numpy(task.folds == 0)
    alone[fold, 0] = labels[fold].float()
    found = probing.selectivity(task, alone, n_features=n_features)
    assert found.accuracy == pytest.approx(0.5, abs=1e-12)


# ------------------------------------------------------------------------ significance


def test_welch_is_scipys_for_every_feature():
    codes, labels = planted(n=31, d=5, noise=3.0)
    codes[:, 1] = codes[:, 1].relu()
    tests = probing.welch_tests(codes, labels)
    ours = stats.ttest_ind(codes[labels].numpy(), codes[~labels].numpy(), equal_var=False)
    np.testing.assert_allclose(tests.statistic.numpy(), ours.statistic, rtol=1e-10)
    np.testing.assert_allclose(tests.degrees_of_freedom.numpy(), ours.df, rtol=1e-10)
    np.testing.assert_allclose(tests.p_value.numpy(), ours.pvalue, rtol=1e-9)


def test_welch_without_variance():
    labels = torch.tensor([True, True, True, False, False])
    dead, perfect = torch.full((5,), 0.1), labels.float() * 0.3
    tests = probing.welch_tests(torch.stack([dead, perfect, -perfect], dim=1), labels)
    assert tests.statistic.tolist() == [0, math.inf, -math.inf]
    assert tests.p_value.tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="two tokens"):
        probing.welch_tests(torch.randn(3, 2), torch.tensor([True, False, False]))


def test_corrections_by_hand():
    p = torch.tensor([0.01, 0.04, 0.03, 0.005])
    # Sorted .005 .01 .03 .04; Holm: times 4, 3, 2, 1, then never falling; BH: times 4/rank.
    expected = {
        "bonferroni": [0.04, 0.16, 0.12, 0.02],
        "holm": [0.03, 0.06, 0.06, 0.02],
        "benjamini-hochberg": [0.02, 0.04, 0.04, 0.02],
    }
    for method, values in expected.items():
        assert probing.adjust_p_values(p, method).tolist() == pytest.approx(values)
    with pytest.raises(ValueError, match="within"):
        probing.adjust_p_values(torch.tensor([1.5]))


def test_corrections_keep_their_promise_on_true_nulls(monkeypatch):
    """Of 400 families of 50 true nulls, Holm at .05 rejects somewhere in at most 5%, by chance."""
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels collects at every call
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2 == 0
    n_families = 400
    n_wrong = 0
    for _ in range(n_families):
        tests = probing.welch_tests(torch.randn(40, 50, generator=generator), labels)
        n_wrong += bool((probing.adjust_p_values(tests.p_value, "holm") <= 0.05).any())
    assert n_wrong <= stats.binom.ppf(1 - FALSE_ALARM_RATE, n_families, 0.05)
    assert n_wrong >= stats.binom.ppf(FALSE_ALARM_RATE, n_families, 0.04)  # and does not cheat


def test_family_wise_arithmetic():
    assert probing.probability_of_no_false_positive(16_384, 1e-5) == pytest.approx(
        0.99999**16_384, rel=1e-9
    )
    assert round(probing.probability_of_no_false_positive(16_384, 1e-5), 3) == 0.849
    level = probing.level_for_family(16_384, 0.05)
    assert probing.probability_of_no_false_positive(16_384, level) == pytest.approx(0.95)
    assert 0.05 / 16_384 < level < 0.05 / 16_384 * 1.03  # Bonferroni's is a little stricter
    with pytest.raises(ValueError, match="level"):
        probing.level_for_family(0, 0.05)


# -------------------------------------------------------------------------------- tasks


def test_folds_hold_types_out_and_controls_are_one_label_a_type():
    types = torch.arange(40).repeat_interleave(3)
    labels = types % 2 == 0
    task = probing.concept_task(labels, types, n_controls=4)
    for control in task.assignments[1:]:
        assert control.sum() == 60
        assert all(len(set(control[task.types == t])) == 1 for t in range(40))
    folds_of_types = [set(task.folds[task.types == t]) for t in range(40)]
    assert all(len(folds) == 1 for folds in folds_of_types)
    assert len({control.tobytes() for control in task.assignments}) == 5

    mixed = probing.concept_task(labels, types, hold_out_types=False)
    assert any(len(set(mixed.folds[mixed.types == t])) > 1 for t in range(40))


def test_task_says_what_is_wrong():
    labels = torch.arange(20) < 4
    with pytest.raises(ValueError, match="rarer class"):
        probing.concept_task(labels)
    with pytest.raises(ValueError, match="one length"):
        probing.concept_task(labels.numpy(), np.arange(19))


def test_balanced_accuracy_by_hand():
    labels = np.array([[True, True, True, False]])
    is_correct = np.array([[True, True, False, True]])
    weights = np.array([[1.0, 1, 1, 1], [1.0, 0, 1, 2]])
    values = balanced_accuracies(is_correct, labels, weights)
    assert values[:, 0].tolist() == pytest.approx([(2 / 3 + 1) / 2, (1 / 2 + 1) / 2])


# -------------------------------------------------------------------------- selectivity


def test_a_planted_concept_is_selective_and_random_labels_are_not():
    codes, labels = planted(n=100, d=10)
    task = probing.concept_task(labels)
    found = probing.selectivity(task, codes, n_features=1)
    assert found.accuracy == 1
    # 100 tokens: an accuracy by chance deviates by .05, 20 correlated controls' mean by no more.
    assert found.value == pytest.approx(0.5, abs=0.15)
    lower, upper = found.interval(0.9)
    assert 0.35 < lower < found.value < upper < 0.65

    generator = torch.Generator().manual_seed(1)
    values = [
        probing.selectivity(
            probing.concept_task(labels, n_controls=5, seed=seed),
            torch.randn(100, 10, generator=generator),
        ).value
        for seed in range(10)
    ]
    # A difference's deviation is below sqrt(.05^2 + .05^2) = .07; the mean of ten below .023,
    # and 1e-4 is at 3.9 deviations.
    assert abs(np.mean(values)) < 0.09


def test_interval_covers_the_sampling_of_tokens():
    """A probe of true accuracy Phi(1): intervals of 90% hold the true selectivity in 90%, or so."""
    truth = stats.norm.cdf(1.0) - 0.5
    n_covered = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(80) % 2 == 0
        codes = torch.randn(80, 1, generator=generator) + torch.where(labels, 1.0, -1.0)[:, None]
        task = probing.concept_task(labels, n_controls=2, n_folds=2, seed=seed)
        lower, upper = probing.selectivity(task, codes).interval(0.9)
        n_covered += lower < truth < upper
    assert n_covered >= stats.binom.ppf(FALSE_ALARM_RATE, 40, 0.9)


def test_recurring_types_let_a_large_probe_memorise_its_controls():
    """Hewitt and Liang's point: where types recur, controls are solved by memory."""
    types = torch.arange(30).repeat_interleave(4)
    identity = torch.eye(30)[types] + 0.05 * torch.randn(120, 30)
    labels = types % 2 == 0
    recurring = probing.concept_task(labels, types, n_controls=4, hold_out_types=False)
    held_out = probing.concept_task(labels, types, n_controls=4)
    memorised = probing.selectivity(recurring, identity)
    assert memorised.accuracy > 0.95
    assert memorised.control_accuracies.min() > 0.95
    assert abs(memorised.value) < 0.05
    assert probing.selectivity(held_out, identity).control_accuracies.max() < 0.8


def test_same_task_same_result_and_wrong_tokens_are_refused():
    codes, labels = planted()
    first, second = (
        probing.selectivity(probing.concept_task(labels, seed=3), codes) for _ in range(2)
    )
    assert first.value == second.value
    np.testing.assert_array_equal(first.draws, second.draws)
    with pytest.raises(ValueError, match="60 tokens"):
        probing.selectivity(probing.concept_task(labels), codes[:50])
    with pytest.raises(ValueError, match="at least 1"):
        probing.selectivity(probing.concept_task(labels), codes, n_features=0)


# ------------------------------------------------------------------------- localisation


def test_budget_weights_and_score_by_hand():
    assert probing.budget_weights().tolist() == pytest.approx([1 / 2, 3 / 10, 11 / 80, 1 / 16])
    for j, k in enumerate(probing.BUDGETS):
        step = np.array([float(i >= j) for i in range(4)])
        assert float(probing.concept_score(step)) == pytest.approx(1 / k)
    assert float(probing.concept_score(np.array([0.5, -1.0, 2.0, 1.0]))) == pytest.approx(0.45)
    for bad in ((2, 5), (1, 1), (1, 5, 2), ()):
        with pytest.raises(ValueError, match="ascending"):
            probing.budget_weights(bad)


def test_one_carrier_scores_one():
    codes, labels = planted(n=100, d=30)
    raw = probing.selectivity(probing.concept_task(labels), codes[:, :1])
    result = probing.localise(codes, raw)
    assert result.sparse[0].accuracy == 1
    assert result.features_for(0.95) == 1
    # Fidelity is 1 but for the spread of the controls' mean, about .05 / sqrt(10) of .5 each.
    assert result.score > 0.9
    assert result.chance < 0.25
    lower, upper = result.interval(0.9)
    assert 0 <= lower <= result.score <= upper + 1e-9 <= 1 + 1e-9


@pytest.mark.parametrize("k", [2, 5])
def test_k_carriers_need_k_features(k):
    """No k-1 features do, however they are weighed; k are whole, so the score is near 1/k."""
    codes, labels = planted(n=200, d=k, carriers=k)
    raw = probing.selectivity(probing.concept_task(labels), codes, penalty=1e-5)
    assert raw.accuracy > 0.97
    result = probing.localise(codes, raw, budgets=(1, k - 1, k) if k > 2 else (1, k), penalty=1e-5)
    assert result.sparse[-1].accuracy == raw.accuracy
    assert max(probe.accuracy for probe in result.sparse[:-1]) < 0.78
    assert result.features_for(0.95) == k
    assert 1 / k - 1e-9 <= result.score < 1 / k + 0.56 * (1 - 1 / k)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), carriers=st.integers(1, 3))
def test_score_is_bounded_and_does_not_see_order_units_dead_features_or_class_names(seed, carriers):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(30) % 2 == 0
    codes = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    codes[:, :carriers] += 1.5 * labels[:, None]
    options = {"n_controls": 2, "n_folds": 2, "seed": seed}
    raw = probing.selectivity(probing.concept_task(labels, **options), codes)
    if raw.value <= 0:
        with pytest.raises(ValueError, match="selective"):
            probing.localise(codes, raw)
        return
    result = probing.localise(codes, raw, budgets=(1, 3))
    assert 0 <= result.score <= 1
    assert 0 <= result.chance <= 1
    assert ((result.score_draws >= 0) & (result.score_draws <= 1)).all()

    order = torch.randperm(5, generator=generator)
    units = 10 ** (6 * torch.rand(5, generator=generator, dtype=torch.float64) - 3)
    dead = torch.full((30, 2), 0.1, dtype=torch.float64)
    for changed in (codes[:, order], codes * units, codes + units, torch.cat([dead, codes], 1)):
        again = probing.localise(changed, raw, budgets=(1, 3))
        assert again.score == result.score
        np.testing.assert_array_equal(again.score_draws, result.score_draws)

    swapped = probing.selectivity(probing.concept_task(~labels, **options), codes)
    assert swapped.accuracy == raw.accuracy
    assert probing.localise(codes, swapped, budgets=(1, 3)).score == pytest.approx(
        result.score, abs=1e-12
    )


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-2, 2), min_size=4, max_size=4), better=st.floats(0, 1))
def test_score_rises_with_fidelity_and_stays_in_bounds(values, better):
    fidelity = np.array(values)
    score = float(probing.concept_score(fidelity))
    assert 0 <= score <= 1
    assert float(probing.concept_score(fidelity + better)) >= score - 1e-12


def test_features_that_tie_with_dead_ones_come_first():
    """Equally often on in both classes, t is 0: the feature that varies is the one to probe."""
    train = np.array([[0.0, 0, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]])
    labels = np.array([[1, 1, 0, 0]]).astype(bool)
    assert _ranking(train, labels)[0, 0] == 2
