"""The dictionaries of the experiment, each kept as it is finished."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

import probsae as ps
from probsae.activations import ActivationStore
from probsae.inference import Checkpoint, TargetL0
from probsae.models.base import SparseDictionary
from probsae.models.files import load, save

# The best of .001, .003, .01 and .03 for TopK, of .003 and .01 for the others (512 features,
# transformer 0, held-out text). SpikeSlab is at its default.
_DETERMINISTIC_RATE = 0.01
# Over a typical code: what leaves ReLU about 16 active codes there.
_RELU_COEFFICIENT = 3.2


@dataclasses.dataclass(frozen=True)
class Plan:
    """One dictionary: of which transformer's MLP, and from which start."""

    family: str
    d_sae: int
    transformer: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.family} {self.d_sae} transformer={self.transformer} seed={self.seed}"


def plans(families: tuple[str, ...], widths: tuple[int, ...], compared: int) -> Iterator[Plan]:
    """Yield every family at every width; one width again, of both transformers."""
    for family in families:
        for d_sae in widths:
            yield Plan(family, d_sae)
        yield again(Plan(family, compared))
        yield of_other(Plan(family, compared))


def again(plan: Plan) -> Plan:
    """Return the same dictionary from another start."""
    return dataclasses.replace(plan, seed=plan.seed + 1)


def of_other(plan: Plan) -> Plan:
    """Return that of the other transformer, from yet another start."""
    return dataclasses.replace(plan, transformer=1 - plan.transformer, seed=plan.seed + 2)


def fitted(
    plan: Plan,
    data: ActivationStore,
    out: Path,
    *,
    n_steps: int,
    batch_size: int,
    l0: int,
    device: str,
) -> SparseDictionary:
    """Fit, go on with a fit that was killed, or read the finished one from `out`."""
    folder = out / plan.name.replace(" ", "-")
    checkpoint = folder.with_name(folder.name + "-checkpoint")
    if not folder.exists():
        model, callbacks = _new(plan, data, l0)
        result = ps.fit(
            model, data, n_steps=n_steps, batch_size=batch_size, seed=plan.seed,
            learning_rate=None if plan.family == "SpikeSlab" else _DETERMINISTIC_RATE,
            device=device, callbacks=[*callbacks, Checkpoint(checkpoint, every=100)],
            resume=checkpoint if checkpoint.exists() else None,
        )  # fmt: skip
        _history(plan, out).write_text(json.dumps(result.history))
        save(model, folder)
        shutil.rmtree(checkpoint, ignore_errors=True)
    return load(folder, device)


def training(plan: Plan, out: Path) -> dict[str, list[float]] | None:
    """Return the curves of a finished fit, where they were kept: at most 50 points."""
    file = _history(plan, out)
    if not file.exists():
        return None
    history = json.loads(file.read_text())
    every = -(-len(history["step"]) // 50)
    return {name: history[name][every - 1 :: every] for name in ("step", "loss", "fvu", "l0")}


def _history(plan: Plan, out: Path) -> Path:
    return out / f"{plan.name.replace(' ', '-')}-history.json"


def _new(
    plan: Plan, data: ActivationStore, l0: int
) -> tuple[SparseDictionary, list[ps.inference.Callback]]:
    with torch.random.fork_rng():
        # Of one seed alone the rows of a narrow dictionary would begin those of a wide one, and
        # every feature would have its family from the start.
        torch.manual_seed(10_000 * plan.seed + plan.d_sae)
        if plan.family == "SpikeSlab":
            slab = ps.SpikeSlabDictionary(data.d_in, plan.d_sae, learn_noise=False)
            return slab, [TargetL0(l0)]
        if plan.family == "ReLU":
            coefficient = _RELU_COEFFICIENT * data.index["scale"]["scale"]
            return ps.ReLUSAE(data.d_in, plan.d_sae, l1_coefficient=coefficient), []
        sae = {"TopK": ps.TopKSAE, "BatchTopK": ps.BatchTopKSAE}[plan.family]
        return sae(data.d_in, plan.d_sae, k=l0), []
