"""Data of the tests of fits."""

import pytest

import probsae as ps


@pytest.fixture(scope="module")
def source():
    return ps.SyntheticActivations(d_in=8, n_features=10, n_active=2, noise_scale=0.05, seed=1)
