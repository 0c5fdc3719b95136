"""How long until the dictionary is right: spike-and-slab against TopK and BatchTopK.

    python -m experiments.time_to_quality.run tune      # the spike-and-slab's rate, on seed 100
    python -m experiments.time_to_quality.run compare   # fits of several lengths, seeds 0, 1, 2
    python -m experiments.time_to_quality.run clock     # a step of each, in turns in one process
    python -m experiments.time_to_quality.run table     # README's table from the results

The seed benchmark without noise; TopK and BatchTopK as tuned there (`experiments.seed_benchmark.run
tune`). Each length is a fit of its own, with its learning rate down to
zero at its end: a long fit's middle is worse than the end of a shorter one. Quality does not depend
on the machine's load, and fits may run side by side; finished ones are kept in results/ and not
repeated. A fit's time is its number of steps times the median step of `clock`, in seconds of one
thread, without the drawing of the data and the compiler: that is measured in turns.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import probsae as ps
from benchmarks.fit_overhead import Stopwatch, commit, step_by_step
from experiments.seed_benchmark.run import best_settings
from probsae.inference import Callback, FitState, NoiseFloorWarning

RESULTS = Path(__file__).parent / "results"
CLOCK = "clock.json"
D_SAE, BATCH_SIZE = 768, 1_024
SEEDS, TUNING_SEED, N_TUNING_STEPS = (0, 1, 2), 100, 900
RIVALS, RIVAL_STEPS = ("TopKSAE", "BatchTopKSAE"), (4_000,)
# The default rate (None), which serves wider activations and noise, and higher ones.
OURS, OURS_RATES = "SpikeSlabDictionary", (None, 1e-2, 1.4e-2, 2e-2)
OURS_STEPS = (1_000,)
POLISH_TOKENS, POLISHED_STEPS = 100_000, (750,)
MMCS_BAR, F1_BAR = 0.999, 0.93
IS_COMPILED = True
N_CLOCK_STEPS, N_CLOCK_PASSES = 300, 3


class Clock(Callback):
    """Deals out batches of fresh tokens and takes the time of each step, without the drawing."""

    def __init__(self, data: ps.SyntheticActivations):
        self.data, self.steps, self.began = data, [], 0.0

    def batches(self) -> Iterator[Tensor]:
        """Yield batches without end."""
        while True:
            x, _ = self.data.sample(BATCH_SIZE)
            self.began = time.thread_time()
            yield x

    def on_step(self, state: FitState) -> None:
        self.steps.append(time.thread_time() - self.began)

    @property
    def seconds_a_step(self) -> float:
        """Median of all steps: the first ones hold the compiler."""
        return statistics.median(self.steps)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One fit, polished or not, and its evaluation on 32,768 fresh tokens."""

    model: str
    seed: int
    n_steps: int
    options: dict[str, float | int] = dataclasses.field(default_factory=dict)
    learning_rate: float | None = None
    n_polish: int = 0

    @property
    def name(self) -> str:
        """File name of the result."""
        options = "".join(f"-{key}={value}" for key, value in self.options.items())
        rate = "" if self.learning_rate is None else f"-lr={self.learning_rate}"
        polish = f"-polish={self.n_polish}" if self.n_polish else ""
        return f"{self.model}{options}{rate}-seed={self.seed}-steps={self.n_steps}{polish}.json"

    def run(self) -> None:
        """Fit, evaluate and write the result."""
        data = ps.SyntheticActivations(seed=self.seed)
        model, _ = self.fit(data)
        if self.n_polish:
            ps.polish(model, data, n_tokens=self.n_polish, seed=self.seed, progress=False)
        row = dataclasses.asdict(ps.evaluate([model], data, seed=self.seed + 1).rows[0])
        cosine = ps.metrics.max_cosines(model.dictionary(), data.features)
        row |= {"least_cosine": float(cosine.min())}
        write(self.name, {"trial": dataclasses.asdict(self), "row": row})

    def fit(self, data: ps.SyntheticActivations, *callbacks: Callback) -> tuple[Any, Clock]:
        """Return the fitted model, and the clock that ran beside."""
        torch.manual_seed(self.seed)
        model = getattr(ps, self.model)(d_in=256, d_sae=D_SAE, **self.options)
        clock = Clock(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoiseFloorWarning)  # no noise: the floor binds
            ps.fit(
                model, clock.batches(), n_steps=self.n_steps, batch_size=BATCH_SIZE,
                learning_rate=self.learning_rate, seed=self.seed, callbacks=[clock, *callbacks],
                compile=IS_COMPILED, progress=False,
            )  # fmt: skip
        return model, clock

    def result(self) -> dict[str, Any] | None:
        """Return what `run` wrote, if it did."""
        path = RESULTS / self.name
        return json.loads(path.read_text()) if path.exists() else None


def tuning_trials() -> list[Trial]:
    """Return spike-and-slab fits at several rates, too short to find all at the default one."""
    return [Trial(OURS, TUNING_SEED, N_TUNING_STEPS, learning_rate=rate) for rate in OURS_RATES]


def tuned_rate() -> float | None:
    """Rate of the spike-and-slab with the best MMCS on the tuning seed."""
    done = [(trial, trial.result()) for trial in tuning_trials()]
    found = {t.learning_rate: r["row"]["mmcs"] for t, r in done if r is not None}
    return max(found, key=found.__getitem__, default=None)


def rivals(seed: int, n_steps: int) -> list[Trial]:
    """Fits of the rivals, at the options and rate with their best MMCS on the tuning seed."""
    return [
        Trial(model, seed, n_steps, options, rate)
        for model, (options, rate) in best_settings(noise_scale=0.0, measure="mmcs").items()
        if model in RIVALS
    ]


def comparison_trials() -> list[Trial]:
    """Fits of several lengths, in turns between the methods."""
    trials = []
    for seed in SEEDS:
        for n_steps in RIVAL_STEPS:
            trials += rivals(seed, n_steps)
        trials += [Trial(OURS, seed, n, learning_rate=tuned_rate()) for n in OURS_STEPS]
        trials += [
            Trial(OURS, seed, n, learning_rate=tuned_rate(), n_polish=POLISH_TOKENS)
            for n in POLISHED_STEPS
        ]
    return trials


def write(name: str, result: dict[str, Any]) -> None:
    """Write a result with where it comes from."""
    machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}"
    RESULTS.mkdir(exist_ok=True)
    result |= {"machine": machine, "commit": commit()}
    (RESULTS / name).write_text(json.dumps(result, indent=1))


def run_clock() -> None:
    """Time steps of all methods, taken in turns, and closed-form passes."""
    trials = [*rivals(TUNING_SEED, N_CLOCK_STEPS), Trial(OURS, TUNING_SEED, N_CLOCK_STEPS)]
    data = ps.SyntheticActivations(seed=TUNING_SEED)
    fits: dict[str, tuple[Any, Clock]] = {}

    def timed(trial: Trial) -> Callable[[Stopwatch], None]:
        def run(stopwatch: Stopwatch) -> None:
            fits[trial.model] = trial.fit(data, stopwatch)

        return run

    step_by_step({trial.model: timed(trial) for trial in trials})
    seconds = {name: clock.seconds_a_step for name, (_, clock) in fits.items()}
    polishing = []
    x, _ = data.sample(POLISH_TOKENS)
    model, _ = fits[trials[-1].model]
    for _ in tqdm(range(N_CLOCK_PASSES), unit="pass"):
        began = time.thread_time()
        ps.polish(model, x, progress=False)
        polishing.append(time.thread_time() - began)
    seconds["polish"] = statistics.median(polishing)
    write(CLOCK, {"seconds": seconds})


def seconds_of(trial: Trial) -> float:
    """Return the time of a fit, from what `run_clock` found."""
    seconds = json.loads((RESULTS / CLOCK).read_text())["seconds"]
    return trial.n_steps * seconds[trial.model] + (seconds["polish"] if trial.n_polish else 0)


def reaches(result: dict[str, Any]) -> bool:
    """Whether a fit is good enough."""
    return result["row"]["mmcs"] >= MMCS_BAR and result["row"]["f1"] >= F1_BAR


def table() -> str:
    """Lay out quality and time of each seed's fits, times over that of the best rival's best."""
    columns = ("method", "steps", "time", "MMCS", "least cosine", "F1", "best F1", "fvu")
    lines = [f"| seed | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
    for seed in SEEDS:
        done = [(t, t.result()) for t in comparison_trials() if t.seed == seed]
        results = [(trial, result) for trial, result in done if result is not None]
        theirs = [(t, r) for t, r in results if t.model in RIVALS]
        if not theirs:
            continue
        unit = seconds_of(max(theirs, key=lambda rival: rival[1]["row"]["mmcs"])[0])
        for trial, result in results:
            row, steps = result["row"], f"{trial.n_steps:,}"
            steps += f" + polish ({trial.n_polish:,} tokens)" if trial.n_polish else ""
            settings = "".join(f", {key} {value}" for key, value in trial.options.items())
            settings += "" if trial.learning_rate is None else f", rate {trial.learning_rate}"
            cells = [trial.model + settings, steps, f"{seconds_of(trial) / unit:.2f}"]
            cells += [f"{row['mmcs']:.5f}", f"{row['least_cosine']:.4f}", f"{row['f1']:.3f}"]
            cells += [f"{row['best_f1']:.3f}", f"{row['fvu']:.4f}"]
            lines.append(f"| {seed} | {' | '.join(cells)} |")
        good = [seconds_of(t) / unit for t, r in results if t.model not in RIVALS and reaches(r)]
        first = f"first at {min(good):.2f}" if good else "never"
        lines.append(f"| {seed} | MMCS {MMCS_BAR} and F1 {F1_BAR} | {first} | | | | | | |")
    return "\n".join(lines)


def main(what: Literal["tune", "compare", "clock", "table"]) -> None:
    """Run what is missing, and print the table."""
    torch.set_num_threads(1)
    if what == "clock":
        run_clock()
    trials = {"tune": tuning_trials, "compare": comparison_trials}.get(what, list)()
    for trial in tqdm([t for t in trials if t.result() is None], unit="fit"):
        trial.run()
    if (RESULTS / CLOCK).exists():
        print(table())


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
