"""The scikit-learn face keeps scikit-learn's contract."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import probsae as ps
from probsae.inference import NoiseFloorWarning


@parametrize_with_checks(
    [
        ps.DictionaryEstimator(n_components=4, n_steps=3),
        ps.DictionaryEstimator(ps.TopKSAE, n_components=4, n_steps=3, model_options={"k": 1}),
    ]
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
def test_finds_known_features_and_gives_probabilities():
    data = ps.SyntheticActivations(d_in=16, n_features=12, n_active=1, seed=0)
    X = data.sample(4096)[0].numpy()
    with pytest.warns(NoiseFloorWarning, match="lies on its floor"):  # the data have no noise
        estimator = ps.DictionaryEstimator(n_components=16, n_steps=1000).fit(X)
    assert ps.metrics.mmcs(torch.from_numpy(estimator.components_), data.features) > 0.95
    p = estimator.predict_proba(X)
    assert 0 <= p.min() <= p.max() <= 1
    assert estimator.score(X) > 0.9
    np.testing.assert_allclose(
        estimator.inverse_transform(estimator.transform(X)),
        estimator.dictionary_(torch.from_numpy(X).double()).detach().numpy(), rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_the_four_verbs():
    X = np.random.default_rng(0).normal(size=(50, 6))
    estimator = ps.DictionaryEstimator(n_components=8, n_steps=5).fit(X)
    np.testing.assert_allclose(estimator.encode(X).mean.numpy(), estimator.transform(X))
    Z = estimator.transform(X)
    np.testing.assert_array_equal(estimator.decode(Z), estimator.inverse_transform(Z))
    np.testing.assert_array_equal(
        estimator.decode(torch.from_numpy(Z)), estimator.inverse_transform(Z)
    )
    np.testing.assert_array_equal(estimator.dictionary(), estimator.components_)


def test_it_is_compared_like_the_model_inside():
    X = np.random.default_rng(0).normal(size=(50, 6))
    estimator = ps.DictionaryEstimator(n_components=8, n_steps=5).fit(X)
    row = ps.evaluate([estimator], X).rows[0]
    assert row.method == "DictionaryEstimator"
    assert row.elbo == ps.evaluate([estimator.dictionary_], X).rows[0].elbo
    with pytest.raises(NotFittedError):
        ps.evaluate([ps.DictionaryEstimator()], X)


@pytest.mark.parametrize("verb", ["transform", "encode", "decode", "predict_proba", "score"])
def test_verbs_before_the_fit_say_so(verb):
    with pytest.raises(NotFittedError):
        getattr(ps.DictionaryEstimator(), verb)(np.ones((3, 4)))


def test_same_seed_same_model():
    X = np.random.default_rng(0).normal(size=(50, 6))
    fits = [ps.DictionaryEstimator(n_components=8, n_steps=5, random_state=3).fit(X) for _ in "ab"]
    np.testing.assert_array_equal(fits[0].components_, fits[1].components_)


def test_a_fit_does_not_begin_at_features_from_torchs_generator():
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(32, 16), dim=1)
    X = ((torch.rand(500, 32) < 0.1) * torch.rand(500, 32) @ features).numpy()
    estimator = ps.DictionaryEstimator(n_components=32, n_steps=1, random_state=0).fit(X)
    assert ps.metrics.mmcs(estimator.dictionary(), features) < 0.8  # 1 from the same numbers


def test_the_fits_result_is_kept():
    X = np.random.default_rng(0).normal(size=(50, 6))
    estimator = ps.DictionaryEstimator(n_components=8, n_steps=5, batch_size=10).fit(X)
    result = estimator.fit_result_
    assert (result.n_steps, result.n_tokens) == (5, 50)
    assert result.model is estimator.dictionary_
    assert result.history["step"] == [1, 2, 3, 4, 5]
    assert clone(estimator).get_params() == estimator.get_params()


def test_works_in_a_pipeline():
    X = np.random.default_rng(0).normal(size=(50, 6))
    pipeline = make_pipeline(StandardScaler(), ps.DictionaryEstimator(n_components=8, n_steps=5))
    assert pipeline.fit_transform(X).shape == (50, 8)
    assert pipeline[-1].get_feature_names_out()[0] == "dictionaryestimator0"


def test_not_finite_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        ps.DictionaryEstimator().fit([[1.0, float("nan")], [0.0, 1.0]])


def test_every_random_state_of_scikit_learn_is_one():
    X = np.random.default_rng(0).normal(size=(60, 5))
    states = [3, np.int64(3), np.random.RandomState(3), np.random.RandomState(3), None]
    found = [
        ps.DictionaryEstimator(n_components=4, n_steps=3, random_state=state).fit(X).components_
        for state in states
    ]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[2], found[3])
    assert not np.array_equal(found[0], found[2])


@pytest.mark.usefixtures("unchecked_types")
def test_other_things_than_a_class_and_an_array_are_refused():
    X = np.random.default_rng(0).normal(size=(64, 8))
    for model in (ps.TopKSAE(8, 4, k=1), "TopKSAE"):
        with pytest.raises(TypeError, match="model must be a class"):
            ps.DictionaryEstimator(model).fit(X)
    source = ps.SyntheticActivations(d_in=8, n_features=4, n_active=1)
    with pytest.raises(TypeError, match=r"got SyntheticActivations; probsae\.fit takes"):
        ps.DictionaryEstimator().fit(source)
