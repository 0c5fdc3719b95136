"""`probsae fit` and `probsae polish`: dictionaries of harvested activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import tyro

from probsae import models
from probsae.activations.resources import choose_device
from probsae.activations.store import ActivationStore
from probsae.inference.callbacks import Callback, Checkpoint, steps_done
from probsae.inference.fit import fit as run_fit
from probsae.inference.polish import polish as run_polish
from probsae.inference.target_l0 import TargetL0
from probsae.models.files import load
from probsae.processes import Processes, launched
from probsae.report.run_files import DATA, MODEL, POSTERIOR, describe_store, replace_model
from probsae.report.run_folder import activations_of

ModelName = Literal[
    "SpikeSlabDictionary",
    "LaplaceDictionary",
    "RectifiedGaussianDictionary",
    "SparseVAE",
    "ReLUSAE",
    "TopKSAE",
    "BatchTopKSAE",
    "JumpReLUSAE",
    "GatedSAE",
    "MatryoshkaSAE",
]
# Families whose prior `TargetL0` can steer: they have a firing rate a feature.
Steerable = Literal["SpikeSlabDictionary", "SparseVAE"]


def fit(
    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")],
    out: Path,
    model: ModelName = "SpikeSlabDictionary",
    d_sae: int = 4_096,
    target_l0: float | None = None,
    options: str = "{}",
    n_steps: int = 5_000,
    batch_size: int = 1_024,
    learning_rate: float | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    device: str | None = None,
    wandb: bool = False,
    resume: bool = False,
    verify: bool = True,
) -> None:
    """Fit a dictionary to harvested activations.

    Started by `torchrun -m probsae fit ...`, its processes share each step.

    Args:
        store: Folder that `probsae harvest` wrote.
        out: Folder for the model, its history and checkpoints.
        model: Family of dictionaries.
        d_sae: Number of features.
        target_l0: Features active a token, on average, that a spike-and-slab prior is steered to;
            by default what the activations' evidence says.
        options: The dictionary's other arguments, as JSON: '{"k": 32}'.
        n_steps: Steps.
        batch_size: Tokens of a step.
        learning_rate: The model's default where not given.
        held_out: Share of the tokens, at the end of the text, that is left for `evaluate`.
        seed: Of the initial directions and of the batches.
        device: A GPU where there is one, by default.
        wandb: Log to Weights & Biases, offline where there is no account.
        resume: Go on from the checkpoint in `out`; a fit that has ended is left as it is.
        verify: Read the store through first, and compare its checksums.
    """
    if (out / MODEL).exists() and not resume:
        raise FileExistsError(f"{out} holds a fitted model; choose another folder")
    if (out / "checkpoint").exists() and not resume:
        raise FileExistsError(
            f"{out} holds the checkpoint of a fit that did not end; --resume, or choose another "
            "folder"
        )
    if (out / "index.json").exists():
        raise FileExistsError(f"{out} is an activation store; choose another folder for the run")
    activations = ActivationStore(store)
    train, _ = activations.split(held_out)
    arguments = _json_object(options)
    callbacks: list[Callback] = []
    if target_l0 is not None:
        if model not in get_args(Steerable):
            raise ValueError(
                f"--target-l0 steers the prior of {' or '.join(get_args(Steerable))}, not of "
                f"{model}; a TopK form takes --options '{{\"k\": 32}}'"
            )
        arguments = {"learn_noise": False, **arguments}
        callbacks.append(TargetL0(target_l0))
    torch.manual_seed(seed)
    dictionary = getattr(models, model)(d_in=train.d_in, d_sae=d_sae, **arguments)
    if (out / MODEL).exists():
        rate = dictionary.default_learning_rate if learning_rate is None else learning_rate
        settings = {"n_steps": n_steps, "seed": seed, "batch_size": batch_size}
        n_done = steps_done(out / "checkpoint", dictionary, {**settings, "learning_rate": rate})
        print(f"{out / MODEL} is of a fit that ended after {n_done:,} steps: nothing to resume")
        return
    if wandb:
        from probsae.inference.wandb_logger import WandbLogger

        callbacks.append(WandbLogger(directory=out))
    callbacks.append(Checkpoint(out / "checkpoint"))
    with launched() as group:
        is_first = Processes(group).is_first
        if verify and is_first:
            activations.verify()
        result = run_fit(
            dictionary,
            train,
            n_steps=n_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            device=device,
            callbacks=callbacks,
            resume=out / "checkpoint" if resume else None,
            process_group=group,
        )
    if not is_first:
        return
    (out / DATA).write_text(describe_store(store, held_out, seed))
    (out / "history.json").write_text(json.dumps(result.history))
    replace_model(out, dictionary)  # the last word: where it is, nothing is left to resume
    last = {name: values[-1] for name, values in result.history.items()}
    print(f"step {last['step']}: elbo {last['elbo']:.2f}, fvu {last['fvu']:.4f}", end="")
    print(f", l0 {last['l0']:.1f}; written: {out / MODEL}")


def polish(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    store: Path | None = None,
    n_tokens: int | None = None,
    n_passes: int = 1,
    prior_weight: float = 1.0,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Give a fitted dictionary its closed-form optimum, and keep how certain that is.

    Started by `torchrun -m probsae polish ...`, its processes share each pass.

    Args:
        run: Folder that `probsae fit` wrote; its model is replaced, the posterior lies beside it,
            and what was made of the former model (stability, reliability, page) is deleted.
        store: Activations; by default those of the fit.
        n_tokens: Tokens of a pass; all that the fit saw by default.
        n_passes: Passes over the activations.
        prior_weight: Activations that each feature's fitted direction counts as.
        seed: Of the order of the tokens.
        device: A GPU where there is one, by default.
    """
    if not (run / MODEL).exists():
        raise FileNotFoundError(
            f"{run} holds no dictionary (model/); pass what `probsae fit` wrote"
        )
    data, _ = activations_of(run, store)
    with launched() as group:
        dictionary = load(run / MODEL, device=choose_device(device))
        posterior = run_polish(
            dictionary,
            data,
            n_tokens=n_tokens,
            n_passes=n_passes,
            prior_weight=prior_weight,
            seed=seed,
            process_group=group,
        )
        is_first = Processes(group).is_first
    if not is_first:
        return
    replace_model(run, dictionary)
    posterior.save(run / POSTERIOR)
    (before, _), (after, _) = posterior.held_out_elbo[0], posterior.held_out_elbo[-1]
    print(f"held-out elbo {before:.2f} -> {after:.2f}; written: {run / POSTERIOR}")


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--options must be JSON like '{{\"k\": 32}}', got {text!r}") from error
    if not isinstance(value, dict):
        raise ValueError(f"--options must be a JSON object, got {text!r}")
    return value
