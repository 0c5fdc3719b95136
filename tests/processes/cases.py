"""Fits that one process does alone, and two together: what comes of them must be the same.

Run by `torchrun`: each process writes what it had into the folder that it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from pyro.infer import Trace_ELBO
from safetensors.torch import save_file
from torch import Tensor

import probsae as ps
from probsae import inference
from probsae.activations import StoreWriter
from probsae.processes import ProcessGroup, launched
from tests.processes.errors import ERRORS

D_IN, D_SAE, N_STEPS, BATCH_SIZE = 12, 24, 30, 64
DATA = ps.SyntheticActivations(d_in=D_IN, n_features=20, n_active=3, noise_scale=0.05, seed=5)

Outcome = dict[str, Tensor]
Case = Callable[[ProcessGroup | None, Path], Outcome]


def fitted(model: ps.SparseDictionary, data=DATA, **settings) -> Outcome:
    """Fit, and return all that a user may look at."""
    settings = {"n_steps": N_STEPS, "batch_size": BATCH_SIZE, "seed": 3, **settings}
    result = ps.fit(model, data, **settings)
    history = {
        f"history.{name}": torch.tensor(values, dtype=torch.float64)
        for name, values in result.history.items()
    }
    history["n_tokens"] = torch.tensor(result.n_tokens)
    return {name: value.clone() for name, value in model.state_dict().items()} | history


def built(name: str, **arguments) -> ps.SparseDictionary:
    """Build a model from one seed, the same in all processes."""
    torch.manual_seed(11)
    return getattr(ps, name)(d_in=D_IN, d_sae=D_SAE, **arguments)


def of_model(name: str, **arguments) -> Case:
    return lambda group, _: fitted(built(name, **arguments), process_group=group)


def unlike_seeds(group: ProcessGroup | None, _: Path) -> Outcome:
    """Models of other processes begin from other directions, which do not count."""
    torch.manual_seed(11 if group is None else 11 + group.rank())
    return fitted(ps.SpikeSlabDictionary(D_IN, D_SAE), process_group=group)


def a_tensor(group: ProcessGroup | None, _: Path) -> Outcome:
    x = DATA.sample(1_000, seed=2)[0]  # a pass ends within a batch
    return fitted(built("SpikeSlabDictionary"), x, process_group=group)


def a_store(group: ProcessGroup | None, folder: Path) -> Outcome:
    store = ps.ActivationStore(folder / "store")
    return fitted(built("SpikeSlabDictionary"), store, process_group=group)


def target_l0(group: ProcessGroup | None, _: Path) -> Outcome:
    model = built("SpikeSlabDictionary", learn_noise=False)
    return fitted(model, callbacks=[inference.TargetL0(4.0)], process_group=group)


def resampled(group: ProcessGroup | None, _: Path) -> Outcome:
    model = built("ReLUSAE", l1_coefficient=5.0)
    resampling = inference.ResampleDeadFeatures([10, 20], dead_after=5, n_tokens=512)
    outcome = fitted(model, callbacks=[resampling], process_group=group)
    return outcome | {"n_resampled": torch.tensor(resampling.history)}


def tracked(group: ProcessGroup | None, _: Path) -> Outcome:
    tracker = inference.FeatureTracker(DATA.features, every=10, dead_after_tokens=500)
    outcome = fitted(built("ReLUSAE"), callbacks=[tracker], process_group=group)
    rows = {f"tracked.{k}": torch.tensor(v).double() for k, v in tracker.history.items()}
    return outcome | rows


def resumed(group: ProcessGroup | None, folder: Path) -> Outcome:
    """The way to step 30 in two parts; draws go on too."""
    where = folder / f"checkpoint-{'alone' if group is None else 'shared'}"
    settings = {"process_group": group, "elbo": Trace_ELBO()}

    class Stop(inference.Callback):
        def on_step(self, state: inference.FitState) -> None:
            if state.step == 20:
                raise KeyboardInterrupt

    checkpoint = inference.Checkpoint(where, every=10)
    with suppress(KeyboardInterrupt):
        fitted(built("LaplaceDictionary"), callbacks=[Stop(), checkpoint], **settings)
    if group is not None:
        dist.barrier(group)  # the first one has written it
    return fitted(built("LaplaceDictionary"), resume=where, **settings)


def uninterrupted(group: ProcessGroup | None, _: Path) -> Outcome:
    return fitted(built("LaplaceDictionary"), process_group=group, elbo=Trace_ELBO())


def polished(group: ProcessGroup | None, _: Path, **settings) -> Outcome:
    model = built("SpikeSlabDictionary")
    ps.fit(model, DATA, n_steps=100, batch_size=BATCH_SIZE, seed=3)
    settings = {"n_tokens": 1_000, "batch_size": 128, "compile": False, **settings}
    posterior = ps.polish(model, DATA, process_group=group, **settings)
    outcome = {name: value.clone() for name, value in model.state_dict().items()}
    return outcome | {
        "direction_variance": posterior.direction_variance,
        "p_real": posterior.p_real,
        "mean": posterior.mean,
        "held_out_elbo": torch.tensor(posterior.held_out_elbo),
        "dof": posterior.variance_dof.clamp(max=1e6),
        "rate": posterior.rate.mean,
    }


CASES: dict[str, Case] = {
    "spike-and-slab": of_model("SpikeSlabDictionary"),
    "rectified Gaussian": of_model("RectifiedGaussianDictionary"),
    "Laplace": of_model("LaplaceDictionary"),
    "ReLU": of_model("ReLUSAE"),
    "TopK": of_model("TopKSAE", k=3, dead_after_tokens=200),
    "BatchTopK": of_model("BatchTopKSAE", k=3, dead_after_tokens=200),
    "Matryoshka": of_model("MatryoshkaSAE", k=3, dead_after_tokens=200),
    "JumpReLU": of_model("JumpReLUSAE"),
    "Gated": of_model("GatedSAE"),
    "unlike seeds": unlike_seeds,
    "a tensor": a_tensor,
    "a store": a_store,
    "TargetL0": target_l0,
    "resampled": resampled,
    "tracked": tracked,
    "polished": polished,
    "polished twice": lambda group, folder: polished(
        group,
        folder,
        n_passes=2,
        block_size=8,
        batch_size=90,  # an odd number for each
    ),
}
"""What is the same, up to rounding, however many processes share it."""

SAMPLED: dict[str, Case] = {
    "resumed": resumed,
    "uninterrupted": uninterrupted,
    "sparse VAE": of_model("SparseVAE"),
}
"""What draws: each process its own numbers, so that more of them are others than one's."""


def write_store(folder: Path) -> None:
    """Write a store whose shards end within batches, in pieces that a pass ends within."""
    writer = StoreWriter(folder, D_IN, dtype="float32", shard_tokens=300)
    writer.append(DATA.sample(1_000, seed=2)[0])
    writer.finish()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with launched() as group:
        assert group is not None
        for name, case in {**CASES, **SAMPLED}.items():
            outcome = case(group, folder)
            save_file(
                {k: v.detach().contiguous().clone() for k, v in outcome.items()},
                folder / f"{name}.{group.rank()}.safetensors",
            )
        for name, wrong in ERRORS.items():
            (folder / f"{name}.{group.rank()}.txt").write_text(wrong(group))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
