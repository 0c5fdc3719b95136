"""Every benchmark runs, at sizes that say nothing, and writes what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Sizes by benchmark, and a key of what it writes. A process each: torch.compile does not take
# code whose shapes are checked at run time, as they are in tests.
SIZES = "d_in=16, d_sae=32, batch_size=64, n_rounds=1"
BENCHMARKS = {
    "fit_overhead": (f"{SIZES}, n_steps=7, n_whole=8", "whole_fits"),
    "posterior": (f"{SIZES}, n_steps=6, n_polished=3, n_fitted=10", "shapes"),
    "ensemble": (
        "d_in=16, d_sae=32, batch_sizes=(64,), n_members=2, n_rounds=1, n_steps=5, "
        "n_fit_steps=8, "
        "ks=(3,), with_growth=False",
        "throughput",
    ),
    "tracking": (
        "d_in=16, d_sae=32, batch_size=64, n_features=24, n_steps=16, every=4",
        "tracked",
    ),
    "language_model": (
        "n_harvested=4, n_spliced=2, context_length=8, batch_size=2, n_rounds=1",
        "seconds",
    ),
    "peer_speed": (
        f"{SIZES}, k=3, n_steps=7, libraries=('probsae', 'probsae_eager', 'bare')",
        "tokens a second over it",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_it_runs(name, tmp_path):
    sizes, key = BENCHMARKS[name]
    code = (
        "from pathlib import Path; from benchmarks import fit_overhead; "
        f"fit_overhead.RESULTS = Path({str(tmp_path)!r}); "
        f"from benchmarks import {name}; {name}.main({sizes})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2_000:]
    assert run.stdout.strip()
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(f"{name}-")
    result = json.loads(path.read_text())
    assert result[key]
    assert {"device", "torch", "commit"} <= set(result)
