"""Files that are no saved dictionary are said to be none."""

import json

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
