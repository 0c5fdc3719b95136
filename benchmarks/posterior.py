"""What refined posteriors and the dictionary's own posterior cost, as ratios.

    python -m benchmarks.posterior   # prints, and writes results/posterior-<device>.json

Refining 4,096 tokens is compared with one encode and decode of them; `polish`, in tokens a second,
with the training steps of `fit` on the same batches. All run in turns in one process with the same
threads; a figure is the median over rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import tyro
from torch import Tensor

import probsae as ps
from benchmarks.fit_overhead import Stopwatch, device_name, now, write_result

MOST_REFINE, LEAST_POLISH = 10.0, 1 / 3


def methods(
    model: ps.SpikeSlabDictionary, x: Tensor, batch_size: int, n_steps: int
) -> dict[str, Callable[[], float]]:
    """Return what is compared; each returns seconds a token."""
    batch = x[:batch_size]

    def encode() -> None:
        model.decode(model.encode(batch).mean)

    def seconds(run: Callable[[], object], n_tokens: int) -> float:
        start = now()
        run()
        if x.is_cuda:
            torch.cuda.synchronize()
        return (now() - start) / n_tokens

    def fit() -> float:
        stopwatch = Stopwatch()
        ps.fit(
            model, x, n_steps=n_steps, batch_size=batch_size, compile=True, callbacks=[stopwatch],
            progress=False, device=x.device,
        )  # fmt: skip
        return stopwatch.median(n_warm=3) / batch_size

    def polish() -> float:
        n_tokens = len(x) - batch_size
        return seconds(
            lambda: ps.polish(
                model, x, n_tokens=n_tokens, batch_size=batch_size, progress=False
            ),
            n_tokens,
        )  # fmt: skip

    return {
        "encode and decode": lambda: seconds(encode, batch_size),
        "refine": lambda: seconds(lambda: ps.refine(model, batch), batch_size),
        "fit": fit,
        "polish": polish,
    }


def main(
    d_in: int = 256,
    d_sae: int = 1_024,
    batch_size: int = 4_096,
    threads: int = 1,
    n_rounds: int = 3,
    n_steps: int = 6,
    n_polished: int = 24,
    n_fitted: int = 100,
) -> None:
    """Measure on a dictionary of `n_fitted` steps, print and write.

    A pass of `polish` is some 100,000 tokens; what it does once, such as looking at the held-out
    ELBO, is in the time.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = ps.SyntheticActivations(d_in=d_in, noise_scale=0.05, device=device)
    x, _ = data.sample((n_polished + 1) * batch_size)
    model = ps.SpikeSlabDictionary(d_in, d_sae)
    ps.fit(model, data, n_steps=n_fitted, progress=False)
    runs = methods(model, x, batch_size, n_steps)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(n_rounds):
        for name, run in runs.items():
            times[name].append(run())
    seconds = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "device": device_name(device),
        "threads": threads,
        "shapes": {"d_in": d_in, "d_sae": d_sae, "batch_size": batch_size},
        "refine over encode and decode": seconds["refine"] / seconds["encode and decode"],
        "polish over fit, tokens a second": seconds["fit"] / seconds["polish"],
    }
    print(f"refine: {result['refine over encode and decode']:.2f} x, bar {MOST_REFINE:g}")
    print(f"polish: {result['polish over fit, tokens a second']:.2f} x, bar {LEAST_POLISH:.2f}")
    write_result("posterior", result)


if __name__ == "__main__":
    tyro.cli(main)
