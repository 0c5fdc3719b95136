"""Whatever takes a device, on the emulated one: in a process of its own, see conftest.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from probsae.inference.compiling import has_compiler

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not has_compiler(), reason="the emulated device is compiled with g++ or clang")
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_the_emulated_device(marks):
    folder = str(Path(__file__).parent.relative_to(ROOT))
    command = [sys.executable, "-m", "pytest", folder, "--emulated", "-q", "-m", marks]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
