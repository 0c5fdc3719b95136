"""The training step of every dictionary compiles as one graph."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("trace_all.py")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_dictionary_compiles_without_graph_breaks(backend):
    run = subprocess.run([sys.executable, SCRIPT, backend], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("\n") >= 9
