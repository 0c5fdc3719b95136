"""Numbers that no generator or prior can make sense of are refused where they come in."""

import numpy as np
import pytest
import torch

import probsae as ps

SOURCE = ps.SyntheticActivations(d_in=4, n_features=6, n_active=1, seed=0)
DATA = {"tensor": SOURCE.sample(64, seed=0)[0], "source": SOURCE}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("seed", [-1, 2**64, np.int64(-3)])
@pytest.mark.usefixtures("unchecked_types")
def test_seeds_that_a_generator_does_not_take(data, seed):
    model = ps.SpikeSlabDictionary(d_in=4, d_sae=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"seed must be a whole number of at least 0"):
        ps.fit(model, DATA[data], n_steps=1, batch_size=8, seed=seed)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_draws_of_a_source_refuse_them_too():
    for draw in (
        lambda: SOURCE.sample(4, seed=-1),
        lambda: next(SOURCE.batches(4, seed=-1)),
        lambda: ps.evaluate(ps.TopKSAE(4, 6, k=2), SOURCE, n_tokens=8, seed=-1),
    ):
        with pytest.raises(ValueError, match="seed must be"):
            draw()


@pytest.mark.parametrize("n_tokens", [-5, 0, 2.5, True])
@pytest.mark.usefixtures("unchecked_types")
def test_a_data_set_has_at_least_one_token(n_tokens):
    model = ps.SpikeSlabDictionary(d_in=4, d_sae=6)
    with pytest.raises(ValueError, match="n_tokens must be a whole number of at least 1"):
        ps.fit(model, SOURCE, n_steps=1, batch_size=8, n_tokens=n_tokens)
    assert model.n_tokens is None


@pytest.mark.usefixtures("unchecked_types")
def test_numpys_numbers_of_tokens_are_saved(tmp_path):
    model = ps.SpikeSlabDictionary(d_in=4, d_sae=6)
    ps.fit(model, SOURCE, n_steps=1, batch_size=8, n_tokens=np.int64(500))
    ps.save(model, tmp_path / "model")
    assert ps.load(tmp_path / "model").n_tokens == 500
