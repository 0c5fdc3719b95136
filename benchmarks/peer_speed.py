"""Training steps of the libraries that users would pick instead, side by side.

    make peers                       # once: each library in an environment of its own
    python -m benchmarks.peer_speed  # prints, and writes results/peer_speed-<device>.json

Every library's own trainer on the same activations, architecture, batch and learning rate, with
the same threads: all stay loaded in processes of their own, and have their turns one after the
other. A figure is the median over rounds of the median step. The bars: probsae takes 1.5 times as
many tokens a second as SAELens, and no fewer than any other.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save_file

import probsae as ps
from benchmarks.fit_overhead import device_name, product_seconds, write_result

ROOT = Path(__file__).parent.parent
PEERS: tuple[str, ...] = ("saelens", "dictionary_learning", "sparsify", "overcomplete")
OURS: tuple[str, ...] = ("probsae", "probsae_eager", "bare")
PACKAGES = ("sae-lens", "dictionary-learning", "eai-sparsify", "overcomplete")
BARS = {"saelens": 1.5, "dictionary_learning": 1.0, "sparsify": 1.0, "overcomplete": 1.0}
# Products of the batch with the dictionary in a step, see benchmarks/fit_overhead.py.
N_PRODUCTS = 5


class Library:
    """A process that runs a library's training steps on request."""

    def __init__(self, name: str, activations: Path, threads: int):
        python = sys.executable
        if name in PEERS:
            python = str(ROOT / ".peers" / name / "bin" / "python")
            if not Path(python).exists():
                raise FileNotFoundError(f"{name} has no environment; run `make peers`")
        environment = os.environ | {"PYTHONPATH": "" if name in PEERS else str(ROOT)}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        script = str(ROOT / "benchmarks" / "peer_steps.py")
        self.name, self.log = name, activations.with_name(f"{name}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, script, name, str(activations), str(threads)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment, cwd=activations.parent,
            )  # fmt: skip

    def seconds(self, request: dict[str, Any]) -> float | None:
        """Return the median seconds of a step, or None where the library has no such dictionary."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended:\n{self.log.read_text()[-2000:]}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def main(
    d_in: int = 256,
    d_sae: int = 1_024,
    k: int = 32,
    batch_size: int = 4_096,
    threads: int = 1,
    n_rounds: int = 3,
    n_steps: int = 16,
    libraries: tuple[str, ...] = OURS + PEERS,
) -> None:
    """Measure, print and write."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, _ = ps.SyntheticActivations(d_in=d_in).sample(4 * batch_size)
    result: dict[str, Any] = {
        "device": device_name(device),
        "threads": threads,
        "shapes": {"d_in": d_in, "d_sae": d_sae, "batch_size": batch_size, "k": k},
        "tokens a second over it": {},
        "share of ceiling": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file({"x": x}, path)
        running = {name: Library(name, path, threads) for name in libraries}
        try:
            for architecture in ("relu", "topk"):
                request = {"architecture": architecture, "d_sae": d_sae, "k": k}
                request |= {"batch_size": batch_size, "n_steps": n_steps}
                seconds = in_turns(running, request, n_rounds)
                product = product_seconds(batch_size, d_in, d_sae, device)
                ratios = {name: value / seconds["probsae"] for name, value in seconds.items()}
                result["tokens a second over it"][architecture] = ratios
                result["share of ceiling"][architecture] = {
                    name: N_PRODUCTS * product / value for name, value in seconds.items()
                }
                for name, ratio in ratios.items():
                    bar = f", bar {BARS[name]}" if name in BARS else ""
                    print(f"{architecture}: probsae over {name:20s} {ratio:5.2f}{bar}", flush=True)
        finally:
            for library in running.values():
                library.close()
    result["versions"] = {name: peer_version(name) for name in PEERS if name in libraries}
    result["versions"]["probsae"] = version("probsae")
    write_result("peer_speed", result)


def in_turns(
    libraries: dict[str, Library], request: dict[str, Any], n_rounds: int
) -> dict[str, float]:
    """Return each library's median over rounds; those without such a dictionary are left out."""
    seconds: dict[str, list[float]] = {}
    for _ in range(n_rounds):
        for name, library in libraries.items():
            value = library.seconds(request)
            if value is not None:
                seconds.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peer_version(name: str) -> str:
    """Return the version that is pinned for a library."""
    package = dict(zip(PEERS, PACKAGES, strict=True))[name]
    lines = (ROOT / "benchmarks" / "peers" / f"{name}.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.lower().startswith(package))


if __name__ == "__main__":
    tyro.cli(main)
