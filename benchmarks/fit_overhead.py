"""What a step of `fit` costs, as ratios to a bare eager torch loop of a ReLU SAE.

    python -m benchmarks.fit_overhead   # prints, and writes results/fit_overhead-<device>.json

All methods run in one process with the same threads and take their steps in turns, so that what a
neighbour on the machine does to one it does to all; a figure is the median step. The bare loop is
what one writes by hand: Adam, unit decoder rows with the gradient's parallel part removed, nothing
logged, nothing checked. The ceiling is the matrix product of the same shapes, measured on the spot.

These are a fit's first steps, whose codes are dense. Whole fits follow, as mean steps over a bare
loop's of as many: when codes have become sparse, a step goes through those that are left.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

import probsae as ps
from probsae.inference import Callback, FitState

RESULTS = Path(__file__).parent / "results"
# Products of the batch with a dictionary that each method cannot do without. Bare and ReLU: two
# forward, and backward the gradients of W_enc, W_dec and the codes (the bare loop lets autograd
# take one more, of the centred input, for b_dec). SpikeSlab: forward encoder and
# decoder, and the same in each of two lateral steps; backward W_dec's and the codes', W_enc's three
# times, and the last lateral step's, of its residual and its means.
PRODUCTS = {
    "bare": 5,
    "ReLUSAE eager": 5,
    "ReLUSAE compiled": 5,
    "SpikeSlab compiled": 13,
    "SpikeSlab normal slab compiled": 13,
}
BARS = {"ReLUSAE eager": 1.05, "ReLUSAE compiled": 0.8, "SpikeSlab compiled": 2.6}


def commit() -> str:
    """Return the short hash of what is measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's kind."""
    return torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()


def write_result(benchmark: str, result: dict[str, Any]) -> None:
    """Write results/<benchmark>-<device>.json, with torch's version and the commit."""
    RESULTS.mkdir(exist_ok=True)
    result = result | {"torch": torch.__version__, "commit": commit()}
    name = f"{benchmark}-{result['device'].replace(' ', '-')}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1))


def now() -> float:
    """Seconds; on one CPU thread those that it ran, for other processes have their turns too."""
    is_alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.thread_time() if is_alone else time.perf_counter()


class Stopwatch(Callback):
    """Records how long each step took."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.began = now()

    def on_step(self, state: FitState) -> None:
        self.end_step(is_on_gpu=state.device.type == "cuda")

    def end_step(self, is_on_gpu: bool) -> None:
        """Record a step, and begin the next one."""
        if is_on_gpu:
            torch.cuda.synchronize()
        self.steps.append(now() - self.began)
        self.began = now()

    def median(self, n_warm: int) -> float:
        """Median step in seconds, without the first ones."""
        return statistics.median(self.steps[n_warm:])

    def mean(self, n_warm: int) -> float:
        """Mean step in seconds, without the first ones: for steps that change as a fit goes on."""
        return statistics.fmean(self.steps[n_warm:])


class Turns:
    """Whose turn it is among loops that each run in a thread of their own."""

    def __init__(self, names: list[str]) -> None:
        self._order, self._changed = deque(names), threading.Condition()

    def wait(self, name: str) -> None:
        """Return when it is this one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == name)

    def pass_on(self) -> None:
        """Let the next one go."""
        with self._changed:
            self._order.rotate(-1)
            self._changed.notify_all()

    def leave(self, name: str) -> None:
        """Let the others go on alone."""
        with self._changed:
            self._order.remove(name)
            self._changed.notify_all()


class _InTurns(Stopwatch):
    """Times a loop's steps, and after each lets the other loops take theirs."""

    def __init__(self, name: str, turns: Turns):
        super().__init__()
        self.name, self.turns = name, turns

    def end_step(self, is_on_gpu: bool) -> None:
        super().end_step(is_on_gpu)
        self.turns.pass_on()
        self.turns.wait(self.name)
        self.began = now()


def step_by_step(runs: Mapping[str, Callable[[Stopwatch], object]]) -> dict[str, Stopwatch]:
    """Run loops side by side, a step of each in turn; return each one's stopwatch."""
    turns, n_threads = Turns(list(runs)), torch.get_num_threads()

    def take_part(name: str) -> Stopwatch:
        torch.set_num_threads(n_threads)  # OpenMP's holds for the thread that says it
        turns.wait(name)
        try:
            stopwatch = _InTurns(name, turns)
            runs[name](stopwatch)
            return stopwatch
        finally:
            turns.leave(name)

    with ThreadPoolExecutor(len(runs)) as pool:
        return dict(zip(runs, pool.map(take_part, runs), strict=True))


class BareLoop(nn.Module):
    """A ReLU SAE, or with `k` a TopK one, and its loop, by hand."""

    def __init__(self, d_in: int, d_sae: int, k: int | None = None):
        super().__init__()
        self.k = k
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(d_sae, d_in), dim=1))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.contiguous())
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_in))

    def run(self, x: Tensor, batch_size: int, n_steps: int, stopwatch: Stopwatch) -> None:
        """Train for `n_steps`."""
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        for _ in range(n_steps):
            batch = x[torch.randint(len(x), (batch_size,), device=x.device)]
            z = torch.relu((batch - self.b_dec) @ self.W_enc + self.b_enc)
            if self.k is not None:
                kept = z.topk(self.k, dim=1, sorted=False)
                z = torch.zeros_like(z).scatter(1, kept.indices, kept.values)
            x_hat = z @ self.W_dec + self.b_dec
            loss = (batch - x_hat).square().sum(1).mean()
            if self.k is None:
                loss = loss + 0.1 * z.sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            with torch.no_grad():
                gradient = self.W_dec.grad
                assert gradient is not None
                gradient -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec
            optimizer.step()
            with torch.no_grad():
                self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
            stopwatch.end_step(x.is_cuda)


def methods(
    x: Tensor, d_sae: int, batch_size: int, n_steps: int
) -> dict[str, Callable[[Stopwatch], None]]:
    """Return what is compared; each runs `n_steps` and records them."""
    d_in = x.shape[1]

    def through_fit(model: ps.SparseDictionary, is_compiled: bool) -> Callable[[Stopwatch], None]:
        def run(stopwatch: Stopwatch) -> None:
            ps.fit(
                model, x, n_steps=n_steps, batch_size=batch_size, compile=is_compiled,
                callbacks=[stopwatch], progress=False, device=x.device,
            )  # fmt: skip

        return run

    bare = BareLoop(d_in, d_sae).to(x.device)
    return {
        "bare": lambda stopwatch: bare.run(x, batch_size, n_steps, stopwatch),
        "ReLUSAE eager": through_fit(ps.ReLUSAE(d_in, d_sae), False),
        "ReLUSAE compiled": through_fit(ps.ReLUSAE(d_in, d_sae), True),
        "SpikeSlab compiled": through_fit(ps.SpikeSlabDictionary(d_in, d_sae), True),
        "SpikeSlab normal slab compiled": through_fit(
            ps.SpikeSlabDictionary(d_in, d_sae, slab="normal"), True
        ),
    }


def whole_fits(x: Tensor, d_sae: int, batch_size: int, n_steps: int) -> dict[str, float]:
    """Return the mean step, in seconds, of fits that begin afresh and take `n_steps`."""
    runs = methods(x, d_sae, batch_size, n_steps)
    compared = {name: runs[name] for name in ("bare", "ReLUSAE eager", "ReLUSAE compiled")}
    return {name: watch.mean(n_warm=4) for name, watch in step_by_step(compared).items()}


def product_seconds(
    batch_size: int,
    d_in: int,
    d_sae: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Seconds of one encoder product."""
    a = torch.randn(batch_size, d_in, device=device, dtype=dtype)
    b = torch.randn(d_in, d_sae, device=device, dtype=dtype)
    times = []
    for _ in range(20):
        start = now()
        _ = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(now() - start)
    return statistics.median(times)


def main(
    d_in: int = 256,
    d_sae: int = 1_024,
    batch_size: int = 4_096,
    threads: int = 1,
    n_rounds: int = 3,
    n_steps: int = 16,
    n_whole: int = 300,
) -> None:
    """Measure, print and write."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, _ = ps.SyntheticActivations(d_in=d_in, device=device).sample(4 * batch_size)
    runs = methods(x, d_sae, batch_size, n_steps)
    steps: dict[str, list[float]] = {name: [] for name in runs}
    products: list[float] = []
    for _ in range(n_rounds):
        products.append(product_seconds(batch_size, d_in, d_sae, device))
        for name, stopwatch in step_by_step(runs).items():
            steps[name] += stopwatch.steps[4:]
    seconds = {name: statistics.median(values) for name, values in steps.items()}
    product = statistics.median(products)
    result: dict[str, Any] = {
        "device": device_name(device),
        "threads": threads,
        "shapes": {"d_in": d_in, "d_sae": d_sae, "batch_size": batch_size},
        "ratio": {key: value / seconds["bare"] for key, value in seconds.items()},
        "products_a_step": {key: value / product for key, value in seconds.items()},
        "share_of_ceiling": {key: PRODUCTS[key] * product / v for key, v in seconds.items()},
    }
    for key, ratio in result["ratio"].items():
        bar = f", bar {BARS[key]}" if key in BARS else ""
        share = result["share_of_ceiling"][key]
        print(f"{key:32s} {ratio:5.2f} x bare, {share:4.0%} of the matrix-product ceiling{bar}")
    whole = whole_fits(x, d_sae, batch_size, n_whole)
    result["whole_fits"] = {"n_steps": n_whole, "mean_step_seconds": whole}
    result["whole_fits"]["ratio"] = {key: value / whole["bare"] for key, value in whole.items()}
    for key, ratio in result["whole_fits"]["ratio"].items():
        bar = f", bar {BARS[key]}" if key in BARS else ""
        print(f"{key:32s} {ratio:5.2f} x bare, mean of {n_whole} steps{bar}")
    write_result("fit_overhead", result)


if __name__ == "__main__":
    tyro.cli(main)
