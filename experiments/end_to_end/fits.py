"""The dictionaries of the experiment, each kept as it is finished."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch

import probsae as ps
from probsae.activations import take
from probsae.inference import Callback, Checkpoint, FitState, TargetL0
from probsae.lm import ContextActivations, EndToEnd
from probsae.models.base import SparseDictionary
from probsae.models.files import load, save

Family: TypeAlias = Literal["TopK", "ReLU", "SpikeSlab"]
ObjectiveName: TypeAlias = Literal["local", "end to end", "with downstream"]
FAMILIES: tuple[Family, ...] = get_args(Family)
OBJECTIVES: tuple[ObjectiveName, ...] = get_args(ObjectiveName)

# The best of .003, .01 and .03 for TopK, of .003 to .3 for ReLU (l0 = 8, 500 steps, seed 100, by
# the increase of the cross-entropy, local and end to end). SpikeSlab is at its default,
# .007, which is better than .02.
_RATES: dict[tuple[Family, ObjectiveName], float] = {
    ("TopK", "local"): 0.03,
    ("TopK", "end to end"): 0.01,
    ("TopK", "with downstream"): 0.01,
    ("ReLU", "local"): 0.1,
    ("ReLU", "end to end"): 0.03,
    ("ReLU", "with downstream"): 0.03,
}
_CHECKPOINT_EVERY = 100
# Of the log error a step, as TargetL0's.
_GAIN = 0.03
# What the penalty is at first, as a share of the error that a dictionary without features makes.
_FIRST_PENALTY = 0.05


@dataclasses.dataclass(frozen=True)
class Plan:
    """One dictionary to fit; `learning_rate` None is the family's default."""

    family: Family
    objective: ObjectiveName
    target_l0: int
    seed: int
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        rate = "default" if self.learning_rate is None else f"{self.learning_rate:g}"
        return (
            f"{self.family}, {self.objective}, l0={self.target_l0}, rate={rate}, seed={self.seed}"
        )


def plans(
    families: Sequence[Family],
    objectives: Sequence[ObjectiveName],
    l0s: Sequence[int],
    seeds: Sequence[int],
    rates: Sequence[float],
) -> Iterator[Plan]:
    """Yield every family under every objective at every l0, seed by seed.

    Each at the learning rates asked for, or the one found best where none is.
    """
    for seed, l0, family, name in itertools.product(seeds, l0s, families, objectives):
        for rate in rates or (tuned_rate(family, name),):
            yield Plan(family, name, l0, seed, rate)


def tuned_rate(family: Family, objective: ObjectiveName) -> float | None:
    """Return the learning rate that was found best, None for the family's default."""
    return None if family == "SpikeSlab" else _RATES[family, objective]


class TargetL0ByPenalty(Callback):
    """Steer a ReLU SAE's penalty to where `target` codes are active: `TargetL0` for the baseline.

    log l1_coefficient += gain (log l0 - log target). A sweep of penalties would meet each l0 only
    nearly, at another penalty for each objective.
    """

    def __init__(self, target: float):
        self.target = target

    def on_step(self, state: FitState) -> None:
        assert state.objective is not None
        assert isinstance(state.model, ps.ReLUSAE)
        error = math.log(max(float(state.objective.l0), 1e-6) / self.target)
        state.model.l1_coefficient *= math.exp(_GAIN * min(1.0, max(-1.0, error)))


def fitted(
    plan: Plan,
    contexts: ContextActivations,
    later: Sequence[str],
    out: Path,
    *,
    d_sae: int,
    n_steps: int,
    batch_size: int,
    later_weight: float,
    device: str,
) -> SparseDictionary:
    """Fit, go on with a fit that was killed, or read the finished one from `out`."""
    folder = out / plan.name.replace(", ", "-").replace(" ", "-")
    checkpoint = folder.with_name(folder.name + "-checkpoint")
    if not folder.exists():
        model, callbacks = _new(plan, contexts, d_sae)
        # Of the same weight in squared units: every objective steers its own noise or penalty.
        weight = weight_of_errors(model, contexts)
        objective = None
        if plan.objective != "local":
            hooks = later if plan.objective == "with downstream" else ()
            objective = EndToEnd(
                contexts, later=hooks, output_weight=weight, later_weight=later_weight * weight
            )
        if checkpoint.exists():
            model = load(checkpoint, device)  # a penalty that was steered is none of its tensors
        ps.fit(
            model, contexts, objective=objective, n_steps=n_steps, batch_size=batch_size,
            seed=plan.seed, learning_rate=plan.learning_rate, device=device, compile=False,
            callbacks=[*callbacks, Checkpoint(checkpoint, every=_CHECKPOINT_EVERY)],
            resume=checkpoint if checkpoint.exists() else None,
        )  # fmt: skip
        save(model, folder)
        shutil.rmtree(checkpoint, ignore_errors=True)
    return load(folder, device)


def weight_of_errors(model: SparseDictionary, contexts: ContextActivations) -> float:
    """Return the weight of the output's and the later layers' errors.

    Deterministic SAEs have no other error to weigh them against. A probabilistic dictionary's stand
    against the codes' nats, where a nat or all of a later layer's variance counts as half of the
    variance of x does in the local error: `TargetL0` then begins near the noise scale it needs.
    """
    return 1.0 if model.is_deterministic else 0.5 * _variance(contexts)


def _variance(contexts: ContextActivations) -> float:
    x = take(contexts, 4_096, seed=0, device="cpu")
    return float((x - x.mean(0)).square().sum(1).mean())


def _new(
    plan: Plan, contexts: ContextActivations, d_sae: int
) -> tuple[SparseDictionary, list[Callback]]:
    d_in = contexts.d_in
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        if plan.family == "TopK":
            return ps.TopKSAE(d_in, d_sae, k=plan.target_l0), []
        if plan.family == "SpikeSlab":
            return ps.SpikeSlabDictionary(d_in, d_sae, learn_noise=False), [
                TargetL0(plan.target_l0)
            ]
        variance = _variance(contexts)
        error = variance if plan.objective == "local" else 1.0
        size = math.sqrt(
            plan.target_l0 * variance
        )  # the sum of l0 equal codes of orthogonal features
        sae = ps.ReLUSAE(d_in, d_sae, l1_coefficient=_FIRST_PENALTY * error / size)
        return sae, [TargetL0ByPenalty(plan.target_l0)]
