"""Shared by all tests: shapes are checked at run time, and no test leaks its random state."""

import os

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("WANDB_SILENT", "true")
install_import_hook("probsae", "beartype.beartype")

# Threads beyond the cores slow small products down; xdist's workers share them.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

FALSE_ALARM_RATE = 1e-4
"""Chance that one statistical test fails although the code is right."""


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
