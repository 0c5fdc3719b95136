"""The training step of every dictionary compiles as one graph."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "fit"])  # "fit": as a CPU's fit does
def test_every_dictionary_compiles_without_graph_breaks(backend):
    command = [sys.executable, "-m", "tests.models.trace_all", backend]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("\n") >= 9
