"""Memory that a step frees is there for the next one, and afterwards the system's again."""

import platform
import resource

import pytest
import torch

import probsae as ps
from probsae.inference.allocator import kept_memory

MEGABYTE = 1 << 20


def faults(n_rounds: int) -> int:
    """Count the pages that the system hands out while blocks are filled and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n_rounds):
        blocks = [torch.ones(16 * MEGABYTE) for _ in range(3)]  # 64 MB each, above every threshold
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_kept_inside_the_block_only():
    outside = faults(4)
    before = resident()
    with kept_memory():
        faults(1)
        inside = faults(4)
        held = resident()
    assert inside < 0.1 * outside
    assert held - before > 150 * MEGABYTE
    assert resident() - before < 50 * MEGABYTE
    assert faults(4) > 0.9 * outside


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
