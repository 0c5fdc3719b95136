"""Memory that a step frees is there for the next one, and afterwards the system's again."""

import platform
import subprocess
import sys

import pytest
import torch

import probsae as ps

# In a process of its own: what a heap keeps depends on what lies in it.
SCRIPT = """
import resource
import torch
from probsae.inference.allocator import kept_memory

MEGABYTE = 1 << 20

def faults(n_rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n_rounds):
        blocks = [torch.ones(16 * MEGABYTE) for _ in range(3)]  # 64 MB each, above every threshold
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / MEGABYTE

outside, before = faults(4), resident()
with kept_memory():
    faults(1)
    inside, held = faults(4), resident()
print(outside, inside, held - before, resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_kept_inside_the_block_only():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    outside, inside, held, left = map(float, run.stdout.split())
    assert inside < 0.3 * outside
    assert held > 150  # MB
    assert left < 50


def test_a_failed_fit_gives_it_back(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "probsae.inference.allocator._set", lambda libc, values: seen.append(values)
    )

    class Fails(ps.inference.Callback):
        def on_step(self, state):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ps.fit(
            ps.ReLUSAE(4, 6), torch.randn(64, 4), n_steps=2, batch_size=8, device="cpu",
            callbacks=[Fails()], progress=False,
        )  # fmt: skip
    assert len(seen) == (2 if platform.libc_ver()[0] == "glibc" else 0)
