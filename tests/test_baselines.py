"""Classical dictionaries: the four verbs, and that each is the method it says it is."""

import inspect

import numpy as np
import pytest
import torch

import probsae as ps
from probsae import baselines
from probsae.baselines import Baseline

ALL = [
    cls
    for cls in vars(baselines).values()
    if inspect.isclass(cls) and issubclass(cls, Baseline) and not inspect.isabstract(cls)
]


@pytest.fixture(scope="module")
def data():
    return ps.SyntheticActivations(d_in=12, n_features=16, n_active=1.5, decay=1.0, seed=0)


@pytest.fixture(scope="module", params=ALL, ids=lambda cls: cls.__name__)
def fitted(request, data):
    return request.param(d_sae=12, n_tokens=2000).fit(data)


def test_seven_methods_are_there():
    names = {"KMeans", "KMedoids", "PCA", "ICA", "NMF", "MiniBatchDictionaryLearning"}
    assert {cls.__name__ for cls in ALL} == names | {"RandomDictionary"}


def test_four_verbs(fitted, data):
    x, _ = data.sample(50, seed=3)
    directions = fitted.dictionary()
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(12))
    posterior = fitted.encode(x)
    assert posterior.mean.shape == (50, 12)
    assert float(posterior.variance.max()) == 0
    assert fitted.decode(posterior.mean).shape == x.shape
    torch.testing.assert_close(
        fitted.decode(posterior.mean), posterior.mean @ directions + fitted.b_dec
    )
    for z in (posterior.mean.numpy(), posterior.mean.double()):
        torch.testing.assert_close(fitted.decode(z), fitted.decode(posterior.mean))
    again = fitted.encode(x.double().numpy())
    torch.testing.assert_close(again.mean, posterior.mean, rtol=1e-4, atol=1e-5)
    assert type(fitted)(d_in=12, d_sae=5).d_in == fitted.d_in == 12


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_callers_generators_are_not_touched(cls, data):
    np.random.seed(0)  # noqa: NPY002 (the generator that others draw from)
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state()
    cls(d_sae=6, n_tokens=300).fit(data).encode(data.sample(20, seed=3)[0])
    assert np.random.random() == expected  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before)


def test_reconstruction_beats_chance(fitted, data):
    x, _ = data.sample(500, seed=3)
    chance = baselines.RandomDictionary(d_sae=12).fit(data)
    fvu, chance_fvu = (ps.metrics.fvu(x, d.decode(d.encode(x).mean)) for d in (fitted, chance))
    assert fvu < min(0.9, chance_fvu) or isinstance(fitted, baselines.RandomDictionary)
    assert fvu < 1


def test_same_seed_same_dictionary(fitted, data):
    again = type(fitted)(d_sae=12, n_tokens=2000).fit(data)
    torch.testing.assert_close(again.dictionary(), fitted.dictionary(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(fitted):
    with pytest.raises(ValueError, match="d_in=12"):
        fitted.encode(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="d_sae=12"):
        fitted.decode(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="as many tokens"):
        type(fitted)(d_sae=100).fit(torch.randn(20, 5))
    with pytest.raises(ValueError, match="two different tokens"):
        type(fitted)(d_sae=3).fit(torch.ones(30, 5))
    with pytest.raises(ValueError, match="d_in=4 columns"):
        type(fitted)(d_in=4, d_sae=3).fit(torch.randn(20, 5))
    for name in ("d_sae", "n_tokens", "d_in"):
        for value in (0, -1, 2.5):
            with pytest.raises(ValueError, match=f"{name} must be"):
                type(fitted)(**{"d_sae": 3, name: value})
    with pytest.raises(RuntimeError, match="call fit"):
        type(fitted)(d_sae=3).dictionary()


def test_a_second_fit_finds_what_was_asked_for(data):
    narrow = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    pca = baselines.PCA(20)
    assert pca.d_sae == 20
    assert pca.fit(narrow).d_sae == 6
    assert pca.fit(data.sample(100, seed=3)[0]).d_sae == len(pca.dictionary()) == 12


def test_pca_is_the_svd():
    x = torch.randn(300, 6) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1])
    pca = baselines.PCA(d_sae=3).fit(x)
    _, _, v = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    np.testing.assert_allclose(np.abs(pca.dictionary().numpy() @ v[:3].T), np.eye(3), atol=1e-3)


def test_ica_unmixes_sparse_sources():
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(20_000, 4, generator=generator) * (
        torch.rand(20_000, 4, generator=generator) < 0.2
    )
    mixing = torch.nn.functional.normalize(torch.randn(4, 4, generator=generator), dim=1)
    ica = baselines.ICA(d_sae=4).fit(z @ mixing)
    assert ps.metrics.mmcs(ica.dictionary(), mixing) > 0.99
    x = (z @ mixing)[:100]
    torch.testing.assert_close(ica.decode(ica.encode(x).mean), x, rtol=1e-3, atol=1e-3)


def test_kmeans_finds_separated_centres_and_kmedoids_returns_tokens():
    centres = 5 * torch.eye(3)
    x = centres.repeat(100, 1) + 0.1 * torch.randn(300, 3)
    assert ps.metrics.mmcs(baselines.KMeans(d_sae=3).fit(x).dictionary(), centres) > 0.999
    medoids = baselines.KMedoids(d_sae=3).fit(x)
    unit = torch.nn.functional.normalize(x, dim=1)
    assert float((medoids.dictionary() @ unit.T).max(1).values.min()) > 1 - 1e-5
