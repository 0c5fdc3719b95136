"""Tests that take a `device` run on a GPU under the `gpu` mark, and on the emulated one always.

A backend stays registered for as long as the process: `test_on_emulated_device.py` runs these
files in another one, as `pytest tests/devices --emulated` does.
"""

import pytest
import torch

from tests.devices import emulated_device


def pytest_addoption(parser):
    parser.addoption("--emulated", action="store_true", help="run on the emulated device")


def _is_emulated(config) -> bool:
    return config.getoption("--emulated", default=False)


def pytest_configure(config):
    if _is_emulated(config):
        emulated_device.register(config.cache.mkdir("emulated_device"))
        torch.set_num_threads(1)  # a backward pass on a device has a pool of threads of its own


def pytest_ignore_collect(collection_path, config):
    other = "test_on_emulated_device.py" if _is_emulated(config) else "test_emulated_device.py"
    return True if collection_path.name == other else None


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("device", ["emulated" if _is_emulated(metafunc.config) else on_gpu])


@pytest.fixture
def near(device):
    """Tolerances: the emulated device computes with the CPU's kernels, a GPU with its own."""
    return {"atol": 1e-5, "rtol": 1e-5} if device == "emulated" else {"atol": 2e-2, "rtol": 1e-2}
