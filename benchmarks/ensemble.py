"""Throughput of `fit_ensemble` beside separate loops, and how its time grows.

    python -m benchmarks.ensemble            # prints, and writes results/ensemble-<device>.json

The bar: over a fit, an ensemble of 8 SAEs, ReLU or TopK, takes 1.5 times as many member steps a
second as 8 bare eager loops of the same architecture run one after the other, both with products of
the same precision (a bare loop's bfloat16 is torch's autocast). All methods run in turns in one
process with the same threads; a figure is the median over rounds. The ceiling is the five matrix
products that a member's dense step cannot do without, measured on the spot in the same turns and
precision; a member that knows which codes it keeps can do without four of them. A bare loop does a
sixth, for the decoder bias.

Steps are measured twice: the first ones, whose codes are dense, by their median; and over a fit of
`n_fit_steps`, in which codes become sparse and a member's step goes through those that are left, by
their mean. A gain is over the bare loops' like: median over median, mean over mean. Of the bare
loops' whole fits one is run for all, since their steps are all alike.

Growth is that of a compiled step, with everything else held: the exponent is the slope of log time
over log size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import probsae as ps
from benchmarks.fit_overhead import (
    BareLoop,
    Stopwatch,
    device_name,
    product_seconds,
    write_result,
)

BAR = 1.5
Run = Callable[[], float]
"""Takes some steps; returns the seconds of one."""
Precision = Literal["float32", "bfloat16"]
"""Of the products, in every method."""


def members(d_in: int, d_sae: int, n_members: int, k: int | None) -> list[ps.SparseDictionary]:
    """Return ReLU SAEs that differ in their L1 coefficient or, with `k`, TopK SAEs around it."""
    if k is None:
        coefficients = np.geomspace(0.02, 0.5, n_members)
        return [ps.ReLUSAE(d_in, d_sae, l1_coefficient=float(c)) for c in coefficients]
    ks = np.rint(np.geomspace(max(k / 2, 1), min(2 * k, d_sae), n_members)).astype(int)
    return [ps.TopKSAE(d_in, d_sae, k=int(value)) for value in ks]


def ensemble(
    x: Tensor,
    d_sae: int,
    batch_size: int,
    n_members: int,
    n_steps: int,
    compile: bool,
    whole_fit: bool = False,
    k: int | None = None,
    precision: Precision = "float32",
) -> Run:
    """Return a run of an ensemble of `members`.

    With `whole_fit` its seconds are the mean over all steps, else the median.
    """

    def run() -> float:
        models = members(x.shape[1], d_sae, n_members, k)
        stopwatch = Stopwatch()
        callbacks = [[stopwatch]] + [[] for _ in models[1:]]
        ps.fit_ensemble(
            models, x, n_steps=n_steps, batch_size=batch_size, compile=compile,
            callbacks=callbacks, progress=False, device=x.device, precision=precision,
        )  # fmt: skip
        return stopwatch.mean(n_warm=3) if whole_fit else stopwatch.median(n_warm=3)

    return run


def bare(
    x: Tensor,
    d_sae: int,
    batch_size: int,
    n_members: int,
    n_steps: int,
    whole_fit: bool = False,
    k: int | None = None,
    precision: Precision = "float32",
) -> Run:
    """Return a run of as many bare eager loops, one after the other.

    With `whole_fit` of one of them, for all, by its mean step.
    """

    def seconds() -> float:
        stopwatch = Stopwatch()
        loop = BareLoop(x.shape[1], d_sae, k).to(x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loop.run(x, batch_size, n_steps, stopwatch)
        return stopwatch.mean(n_warm=3) if whole_fit else stopwatch.median(n_warm=3)

    def run() -> float:
        return n_members * seconds() if whole_fit else sum(seconds() for _ in range(n_members))

    return run


def in_turns(runs: dict[str, Run], n_rounds: int) -> dict[str, float]:
    """Median seconds of each, over rounds in which each has its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(n_rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return {name: statistics.median(values) for name, values in seconds.items()}


def throughput(
    x: Tensor,
    d_sae: int,
    batch_size: int,
    n_members: int,
    n_rounds: int,
    n_steps: int,
    n_fit_steps: int,
    k: int | None,
    precision: Precision,
) -> dict[str, Any]:
    """Compare an ensemble with bare loops and with the ceiling."""
    shape = (x, d_sae, batch_size, n_members)
    kind: dict[str, Any] = {"k": k, "precision": precision}

    def ceiling() -> float:
        dtype = getattr(torch, precision)
        return 5 * n_members * product_seconds(batch_size, x.shape[1], d_sae, x.device, dtype)

    runs = {
        "bare loops": bare(*shape, n_steps, **kind),
        "bare loops, whole fit": bare(*shape, n_fit_steps, whole_fit=True, **kind),
        "ensemble eager": ensemble(*shape, n_steps, False, **kind),
        "ensemble compiled": ensemble(*shape, n_steps, True, **kind),
        "ensemble compiled, whole fit": ensemble(*shape, n_fit_steps, True, whole_fit=True, **kind),
        "ceiling": ceiling,
    }
    seconds = in_turns(runs, n_rounds)
    whole = ", whole fit"
    gain = {
        name: seconds["bare loops" + whole * name.endswith(whole)] / value
        for name, value in seconds.items()
    }
    return {
        "architecture": "relu" if k is None else "topk",
        **kind,
        "batch_size": batch_size,
        "d_sae": d_sae,
        "n_members": n_members,
        "throughput over bare loops": gain,
        "share of ceiling": seconds["ceiling"] / seconds["ensemble compiled"],
        "steps of the whole fit": n_fit_steps,
        "reaches the bar": gain["ensemble compiled, whole fit"] >= BAR,
    }


def growth(device: torch.device, n_rounds: int, n_steps: int) -> dict[str, Any]:
    """Fit how a compiled step's time grows with each of four sizes."""
    base = {"d_in": 256, "d_sae": 512, "n_members": 4, "batch_size": 512}
    sizes = {
        "d_in": (128, 256, 512, 1024),
        "d_sae": (256, 512, 1024, 2048),
        "n_members": (1, 2, 4, 8),
        "batch_size": (256, 512, 1024, 2048),
    }
    result = {}
    for name, values in sizes.items():
        runs = {str(value): _sized(device, n_steps, **(base | {name: value})) for value in values}
        seconds = in_turns(runs, n_rounds)
        times = np.array(list(seconds.values()))
        slope = float(np.polyfit(np.log(values), np.log(times), 1)[0])
        relative = {size: value / float(times[0]) for size, value in seconds.items()}
        result[name] = {"time over the smallest": relative, "exponent": slope, "others": base}
    return result


def _sized(
    device: torch.device, n_steps: int, *, d_in: int, d_sae: int, n_members: int, batch_size: int
) -> Run:
    x, _ = ps.SyntheticActivations(d_in=d_in, device=device).sample(16_384)
    return ensemble(x, d_sae, batch_size, n_members, n_steps, compile=True)


def main(
    d_in: int = 256,
    d_sae: int = 512,
    batch_sizes: tuple[int, ...] = (256, 512, 1024, 4096),
    n_members: int = 8,
    threads: int = 1,
    n_rounds: int = 3,
    n_steps: int = 10,
    n_fit_steps: int = 300,
    ks: tuple[int, ...] = (5, 32),
    precisions: tuple[Precision, ...] = ("float32", "bfloat16"),
    with_growth: bool = True,
) -> None:
    """Measure, print and write: ReLU SAEs, and TopK ones around each of `ks`.

    bfloat16 products are fast where the processor has instructions for them (AMX, say).
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, _ = ps.SyntheticActivations(d_in=d_in, device=device).sample(16_384)
    result: dict[str, Any] = {
        "device": device_name(device),
        "threads": threads,
        "d_in": d_in,
        "throughput": [],
    }
    for k, batch_size, precision in product((None, *ks), batch_sizes, precisions):
        sizes = (d_sae, batch_size, n_members, n_rounds, n_steps, n_fit_steps)
        row = throughput(x, *sizes, k, precision)
        result["throughput"].append(row)
        gains = ", ".join(f"{n} {v:.2f}" for n, v in row["throughput over bare loops"].items())
        name = "ReLU" if k is None else f"TopK around {k}"
        print(f"{name}, batch {batch_size}, {precision}: {gains}", flush=True)
        write_result("ensemble", result)
    if with_growth:
        result["growth"] = growth(device, n_rounds, n_steps)
        for size, row in result["growth"].items():
            times = ", ".join(f"{k}: {v:.2f}" for k, v in row["time over the smallest"].items())
            print(f"{size}: exponent {row['exponent']:.2f} ({times})", flush=True)
        write_result("ensemble", result)


if __name__ == "__main__":
    tyro.cli(main)
