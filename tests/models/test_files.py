"""Dictionaries on disk: what is saved and loaded, and what is refused."""

import json

import numpy as np
import pytest
import torch

import probsae as ps

CONFIG = {
    "class": "TopKSAE",
    "hyperparameters": {"d_in": 8, "d_sae": 16, "k": 3},
    "n_tokens": None,
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "readable"),
        ("null", "readable"),
        (b"\xff\xfe{", "readable"),
        (CONFIG | {"class": [1]}, "readable"),
        (CONFIG | {"class": "SparseDictionary"}, "does not have"),
        (CONFIG | {"class": "load"}, "does not have"),
        (CONFIG | {"hyperparameters": [8, 16]}, "cannot be"),
        (CONFIG | {"hyperparameters": {"d_in": 8}}, "cannot be"),
        (CONFIG | {"hyperparameters": {"d_in": 8, "d_sae": 16, "other": 1}}, "cannot be"),
        (CONFIG | {"n_tokens": "many"}, "n_tokens"),
    ],
)
def test_a_config_that_describes_no_dictionary_is_refused(content, words, tmp_path):
    ps.save(ps.TopKSAE(8, 16, k=3), tmp_path / "sae")
    if isinstance(content, dict):
        content = json.dumps(content)
    file = tmp_path / "sae" / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as error:
        ps.load(tmp_path / "sae")
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_dictionary_comes_back_in_its_own_precision(dtype, tmp_path):
    model = ps.SpikeSlabDictionary(8, 16).double()
    model.initialize_(torch.randn(100, 8))
    model = model.to(dtype)
    ps.save(model, tmp_path / "model")
    loaded = ps.load(tmp_path / "model")
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[name], value)


class OwnDictionary(ps.TopKSAE):
    """A class that probsae has never seen."""


def test_loading_draws_nothing_from_the_callers_stream(tmp_path):
    ps.save(ps.TopKSAE(8, 16, k=3), tmp_path / "sae")
    ps.interop.save_sparsify(ps.TopKSAE(8, 16, k=3), tmp_path / "sparsify")
    before = torch.get_rng_state()
    ps.load(tmp_path / "sae")
    ps.interop.load_sparsify(tmp_path / "sparsify")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_class_of_ones_own_is_loaded(tmp_path):
    model = OwnDictionary(8, 12, k=2)
    ps.save(model, tmp_path / "own")
    loaded = ps.load(tmp_path / "own")
    assert type(loaded) is OwnDictionary
    assert torch.equal(loaded.W_dec, model.W_dec)


def test_a_class_that_is_nowhere_is_said_so(tmp_path):
    ps.save(ps.TopKSAE(8, 12, k=2), tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace("TopKSAE", "OtherSAE"))
    with pytest.raises(ValueError, match="class of your own, import it first"):
        ps.load(tmp_path / "other")


@pytest.mark.usefixtures("unchecked_types")
def test_other_things_than_a_dictionary_are_not_saved(tmp_path):
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    estimator = ps.DictionaryEstimator(n_components=4, n_steps=2).fit(x)
    result = ps.fit(ps.TopKSAE(8, 12, k=2), x, n_steps=2, batch_size=32)
    for thing in (estimator, result):
        with pytest.raises(TypeError, match=f"got {type(thing).__name__}"):
            ps.save(thing, tmp_path / "thing")
