"""An accelerator for machines without one: its tensors are real, and lie in the CPU's memory.

`register` makes "emulated" a device of this process, for good: a PyTorch backend (PrivateUse1)
that runs the CPU's kernels on the memory of its tensors, below autograd, so that all of torch
works on it. As on CUDA

- an operation between its tensors and the CPU's raises, but for numbers of the CPU (0-d) in
  pointwise operations, and indices of the CPU;
- an operation that is given a generator of the CPU raises;
- `numpy()` raises, and a backward pass runs in a thread of its own;
- a fit looks at its guard every 50 steps only.

`waits` lists what the host would wait for the device for: values that are read, copies to the
CPU, copies from it that are not `non_blocking`, indices and masks whose number decides a shape.

Unlike on CUDA, random numbers are the CPU's, from the CPU's default generator where none is
given, so results equal the CPU's. Not emulated: `torch.compile`, what the library does where
`is_cuda` or the device's type is "cuda" (generators that are kept and put back, memory that is
free, steps taken whole), a default generator of the device's own, other streams, kernels that
only CUDA has, and waits inside CUDA's own (of `torch.linalg` for one, or of `x[index] = number`,
whose number is copied there). The interface is that of torch 2.13.
"""

from __future__ import annotations

import hashlib
import subprocess
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_suffix(".cpp")


def register(folder: Path) -> None:
    """Compile the backend, 10 s, unless `folder` holds it, and make it a device of this process."""
    torch.utils.rename_privateuse1_backend("emulated")
    torch.ops.load_library(_built(folder))
    torch._register_device_module("emulated", _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def _built(folder: Path) -> Path:
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"emulated_device-{key}.so"
    if not library.exists():
        unfinished = folder / f"{key}.unfinished"
        command = [cpp_extension.get_cxx_compiler(), "-std=c++20", "-O1", "-fPIC", "-shared"]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        command += [f"-isystem{path}" for path in cpp_extension.include_paths()]
        command += [f"-L{path}" for path in cpp_extension.library_paths()]
        command += [str(SOURCE), "-o", str(unfinished), "-lc10", "-ltorch_cpu", "-ltorch"]
        subprocess.run(command, check=True)
        unfinished.replace(library)
    return library


def _module() -> types.ModuleType:
    """What torch asks a device's module for."""
    module = types.ModuleType("torch.emulated")
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda index: nullcontext(),
        # The CPU's generator is its own.
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device: torch.get_rng_state(),
        "set_rng_state": lambda state, device: torch.set_rng_state(state),
        "_is_in_bad_fork": lambda: False,
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def all_waits() -> list[str]:
    """What the host has waited for the device for so far."""
    return torch.ops.emulated_device.waits()


@contextmanager
def waits() -> Iterator[list[str]]:
    """List what the host waits for in a with-block; filled when it ends."""
    found: list[str] = []
    n_before = len(all_waits())
    yield found
    found += all_waits()[n_before:]
