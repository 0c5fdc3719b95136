"""What refined posteriors and the dictionary's own posterior cost, as ratios.

    python -m benchmarks.posterior   # prints, and writes results/posterior-<device>.json

Refining 4,096 tokens is compared with one encode and decode of them; `polish`, in tokens a
second, with the training steps of `fit` on the same batches, both compiled. A step, and a batch of
`polish`, is the median of a run; a whole pass of `polish` holds what it does once too: compiling,
the held-out ELBO, the closed forms. All run in turns in one process with the same threads; a
figure is the median over rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from itertools import pairwise

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
        return seconds(polish_all, len(x) - batch_size)

    def polish_all(times: list[float] | None = None) -> None:
        def stream() -> Iterator[Tensor]:
            for part in x.split(batch_size):
                if times is not None:
                    times.append(now())
                yield part

        ps.polish(
            model, stream(), n_tokens=len(x) - batch_size, batch_size=batch_size, progress=False,
            compile=True,
        )  # fmt: skip

    def stream() -> float:
        """Return the median over batches; the held-out one and the first compile."""
        times: list[float] = []
        polish_all(times)
        return statistics.median(b - a for a, b in pairwise(times[2:])) / batch_size

    return {
        "encode and decode": lambda: seconds(encode, batch_size),
        "refine": lambda: seconds(lambda: ps.refine(model, batch), batch_size),
        "fit": fit,
        "polish": stream,
        "polish, whole": polish,
    }


def main(
    d_in: int = 256,
    d_sae: int = 1_024,
    batch_size: int = 4_096,
    threads: int = 1,
    n_rounds: int = 3,
    n_steps: int = 6,
    n_polished: int = 48,
    n_fitted: int = 100,
) -> None:
    """Measure on a dictionary of `n_fitted` steps, print and write.

    A pass of `polish` is some 200,000 tokens, its default for data without a size.
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
        "the same, a whole pass": seconds["fit"] / seconds["polish, whole"],
    }
    print(f"refine: {result['refine over encode and decode']:.2f} x, bar {MOST_REFINE:g}")
    print(f"polish: {result['polish over fit, tokens a second']:.2f} x, bar {LEAST_POLISH:.2f}")
    print(f"a whole pass of it: {result['the same, a whole pass']:.2f} x")
    write_result("posterior", result)


if __name__ == "__main__":
    tyro.cli(main)
