"""Shared by all tests: shapes are checked at run time, and no test leaks its random state."""

import os
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

from tests import typecheck

os.environ.setdefault("WANDB_SILENT", "true")
if "--emulated" not in sys.argv:  # of tests/devices: the checks are a fifth of that run's time
    typecheck.install("probsae")

# Small products gain nothing from a second thread, and wait for it where the cores are busy: a
# fit of 500 small steps then took 15 times as long.
torch.set_num_threads(1)

FALSE_ALARM_RATE = 1e-4
"""Chance that one statistical test fails although the code is right."""


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none: `-m` may ask for it with other tests."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def unchecked_types():
    """Leave shapes and types unchecked, as they are for a user, whose errors are our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct, a real language model."""
    from experiments.smollm2.model import smollm2_path
    from probsae.activations.language_model import load_language_model

    return load_language_model(smollm2_path())


@pytest.fixture(scope="session")
def corpus():
    """English prose: the beginning of a novel in the public domain."""
    return [Path(__file__).parent / "data" / "austen.txt"]
