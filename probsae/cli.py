"""`probsae`: compare | fit | polish | evaluate | inspect | report | harvest | study."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from probsae import models
from probsae.activations.store import ActivationStore
from probsae.compare import ALL, STORY
from probsae.compare import compare as run_comparison
from probsae.evaluate import evaluate as run_evaluation
from probsae.inference.callbacks import Checkpoint
from probsae.inference.fit import NonFiniteElboError
from probsae.inference.fit import fit as run_fit
from probsae.inference.polish import polish as run_polish
from probsae.models.files import check_replaceable, load, save
from probsae.report.inspect import feature_page
from probsae.report.run_folder import (
    DATA,
    POSTERIOR,
    activations_of,
    describe_store,
    gather_run,
    report_run,
)
from probsae.synthetic import SyntheticActivations

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
# What a user can put right, by the command's arguments or by its files.
_USER_ERRORS = (ValueError, TypeError, OSError, MemoryError, ModuleNotFoundError)


def compare(
    out: Path = Path("runs/compare"),
    n_steps: int = 700,
    d_sae: int = 768,
    d_in: int = 256,
    n_features: int = 512,
    n_active: float = 5,
    noise_scale: float = 0.05,
    correlation: Literal["none", "copula", "per_batch", "hierarchy"] = "none",
    all: bool = False,
    seed: int = 0,
) -> None:
    """Compare dictionaries on synthetic activations with known features.

    Args:
        out: Folder for report.md, report.json, posterior.nc and plots.
        n_steps: Steps of every fit by gradient, at 1,024 tokens.
        d_sae: Features of each dictionary.
        d_in: Width of the activations.
        n_features: True features.
        n_active: Features active on a token, on average.
        noise_scale: Standard deviation of the noise in each dimension.
        correlation: How features fire together.
        all: Every method, not only those that tell the story.
        seed: Of the data, the initial directions and the batches.
    """
    data = SyntheticActivations(
        d_in=d_in,
        n_features=n_features,
        n_active=n_active,
        noise_scale=noise_scale,
        correlation=None if correlation == "none" else correlation,
        seed=seed,
    )
    # Fail before the work, not after it: without matplotlib, or where files would be deleted.
    from probsae.report import write_comparison
    from probsae.report.markdown import RUN_FILES

    check_replaceable(out, RUN_FILES)

    comparison = run_comparison(
        data, methods=ALL if all else STORY, d_sae=d_sae, n_steps=n_steps, seed=seed
    )
    facts = {"command": " ".join(["probsae", *sys.argv[1:]]), "steps": n_steps, "seed": seed}
    comparison = dataclasses.replace(
        comparison, report=dataclasses.replace(comparison.report, facts=facts)
    )
    Console().print(comparison.report.rich_table())
    print(f"written: {write_comparison(comparison, data, out)}")


def fit(
    store: Annotated[Path, tyro.conf.Positional],
    out: Path,
    model: ModelName = "SpikeSlabDictionary",
    d_sae: int = 4_096,
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

    Args:
        store: Folder that `probsae harvest` wrote.
        out: Folder for the model, its history and checkpoints.
        model: Family of dictionaries.
        d_sae: Number of features.
        options: The dictionary's other arguments, as JSON: '{"k": 32}'.
        n_steps: Steps.
        batch_size: Tokens of a step.
        learning_rate: The model's default where not given.
        held_out: Share of the tokens, at the end of the text, that is left for `evaluate`.
        seed: Of the initial directions and of the batches.
        device: A GPU where there is one, by default.
        wandb: Log to Weights & Biases, offline where there is no account.
        resume: Go on from the checkpoint in `out`.
        verify: Read the store through first, and compare its checksums.
    """
    if (out / "model").exists() and not resume:
        raise FileExistsError(f"{out} holds a fitted model; choose another folder, or --resume")
    if (out / "checkpoint").exists() and not resume:
        raise FileExistsError(
            f"{out} holds the checkpoint of a fit that did not end; --resume, or choose another "
            "folder"
        )
    activations = ActivationStore(store)
    if verify:
        activations.verify()
    train, _ = activations.split(held_out)
    torch.manual_seed(seed)
    dictionary = getattr(models, model)(d_in=train.d_in, d_sae=d_sae, **_json_object(options))
    callbacks: list = [Checkpoint(out / "checkpoint")]
    if wandb:
        from probsae.inference.wandb_logger import WandbLogger

        callbacks.append(WandbLogger(directory=out))
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
    )
    save(dictionary, out / "model")
    (out / DATA).write_text(describe_store(store, held_out))
    (out / "history.json").write_text(json.dumps(result.history))
    last = {name: values[-1] for name, values in result.history.items()}
    print(f"step {last['step']}: elbo {last['elbo']:.2f}, fvu {last['fvu']:.4f}", end="")
    print(f", l0 {last['l0']:.1f}; written: {out / 'model'}")


def polish(
    run: Annotated[Path, tyro.conf.Positional],
    store: Path | None = None,
    n_tokens: int | None = None,
    n_passes: int = 1,
    prior_weight: float = 1.0,
    seed: int = 0,
) -> None:
    """Give a fitted dictionary its closed-form optimum, and keep how certain that is.

    Args:
        run: Folder that `probsae fit` wrote; its model is replaced, the posterior lies beside it.
        store: Activations; by default those of the fit.
        n_tokens: Tokens of a pass; all that the fit saw by default.
        n_passes: Passes over the activations.
        prior_weight: Activations that each feature's fitted direction counts as.
        seed: Of the order of the tokens.
    """
    if not (run / "model").exists():
        raise FileNotFoundError(
            f"{run} holds no dictionary (model/); pass what `probsae fit` wrote"
        )
    dictionary = load(run / "model")
    data, _ = activations_of(run, store)
    posterior = run_polish(
        dictionary, data, n_tokens=n_tokens, n_passes=n_passes, prior_weight=prior_weight, seed=seed
    )
    save(dictionary, run / "model")
    posterior.save(run / POSTERIOR)
    (before, _), (after, _) = posterior.held_out_elbo[0], posterior.held_out_elbo[-1]
    print(f"held-out elbo {before:.2f} -> {after:.2f}; written: {run / POSTERIOR}")


def inspect(
    run: Annotated[Path, tyro.conf.Positional],
    feature: int,
    store: Path | None = None,
    tokenizer: str | None = None,
    n_tokens: int = 16_384,
) -> None:
    """Show one feature: rate, uncertainty, neighbours, most certain and most doubtful tokens.

    Args:
        run: Folder that `probsae fit` or `probsae compare` wrote.
        feature: Its row in the dictionary.
        store: Activations to show it on; by default those of the fit, the held-out end.
        tokenizer: Model whose tokenizer reads the store's tokens; "none" shows their ids.
        n_tokens: Tokens to look at, at most.
    """
    features, _ = gather_run(run, store=store, tokenizer=tokenizer, n_tokens=n_tokens)
    try:
        page = feature_page(features, feature)
    except IndexError as error:
        raise ValueError(str(error)) from error
    Console().print(page)


def evaluate(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    store: Path,
    held_out: float = 0.1,
    n_tokens: int = 32_768,
    out: Path | None = None,
) -> None:
    """Compare fitted dictionaries on held-out activations of a store.

    Args:
        runs: Folders that `probsae fit` wrote.
        store: Activations; the share at the end of the text is used.
        held_out: The share that `fit` left out.
        n_tokens: Tokens to evaluate on, at most.
        out: File for the table, .json or .md.
    """
    if not runs:
        raise ValueError("evaluate needs at least one run")
    _, rest = ActivationStore(store).split(held_out)
    dictionaries = {
        str(run): load(run / "model" if (run / "model").exists() else run) for run in runs
    }
    report = run_evaluation(dictionaries, rest, n_tokens=n_tokens)
    Console().print(report.rich_table())
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report.to_json() if out.suffix == ".json" else report.to_markdown() + "\n")


def report(
    run: Annotated[Path, tyro.conf.Positional],
    store: Path | None = None,
    tokenizer: str | None = None,
    n_tokens: int = 16_384,
    effects: str | None = None,
    out: Path | None = None,
) -> None:
    """Write a page to browse a run's features in: one file, no server, no network.

    Args:
        run: Folder that `probsae fit` or `probsae compare` wrote.
        store: Activations to show features on; by default those of the fit, the held-out end.
        tokenizer: Model whose tokenizer reads the store's tokens; "none" shows their ids. By
            default the model that was harvested.
        n_tokens: Tokens to look at, at most.
        effects: Language model to read each feature's effect on the next token from; "none" shows
            none. By default the model that was harvested, where it is a file or folder here.
        out: The page; by default report.html in the run folder.
    """
    page = report_run(
        run, store=store, tokenizer=tokenizer, n_tokens=n_tokens, logit_effects=effects, out=out
    )
    print(f"written: {page}")


def harvest(
    model: Annotated[str, tyro.conf.Positional],
    hook: tuple[str, ...],
    out: Path,
    text: tuple[Path, ...] = (),
    dataset: str | None = None,
    n_tokens: int = 1_000_000,
    context_length: int = 128,
    batch_size: int = 16,
    include_first: bool = False,
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16",
    device: str = "cpu",
) -> None:
    """Store a language model's activations on text.

    Args:
        model: A folder, a .gguf file, or a name on the Hugging Face hub.
        hook: Modules, e.g. model.layers.7 or model.layers.7.mlp.down_proj:input.
        out: Folder of the store, or of one store a hook.
        text: Text files.
        dataset: Instead of files, a `datasets` name, `name:split`, or a folder by save_to_disk.
        n_tokens: Tokens to store.
        context_length: Tokens of a context.
        batch_size: Contexts of a forward pass.
        include_first: Keep first positions, where many models park massive activations.
        dtype: Of the activations on disk.
        device: Where to run the model.
    """
    from probsae.activations.harvest import harvest as run_harvest
    from probsae.activations.scaling import Scale, massive_activation_report

    if bool(text) == (dataset is not None):
        raise ValueError("harvest needs either --text or --dataset")
    source = list(text) if text else _dataset(str(dataset))
    stores = run_harvest(
        model,
        source,
        list(hook),
        out,
        n_tokens=n_tokens,
        context_length=context_length,
        batch_size=batch_size,
        exclude_first=not include_first,
        dtype=dtype,
        device=device,
    )
    for store in stores:
        print(store)
        remark = massive_activation_report(Scale(**store.index["scale"]))
        if remark:
            print(f"  {remark}")


def study(
    out: Path = Path("runs/study"),
    scale: Literal["small", "full"] = "small",
    seed: int = 0,
    device: str | None = None,
    n_processes: int | None = None,
    ray: bool = False,
    ray_address: str | None = None,
) -> None:
    """Run the seed study: data, classical methods, a grid of L1 SAEs, and the answer to it.

    A run that was stopped or killed goes on where it was; what is finished is only drawn again.

    Args:
        out: Folder of the study, which gets one folder a scale.
        scale: small: a quarter of each width; full: the study's own 96 SAEs, for a GPU.
        seed: Of the data and of all fits.
        device: A GPU where there is one, by default.
        n_processes: Groups run at a time; as many as there are processors, by default.
        ray: Run groups of fits as Ray tasks, on this machine or a cluster.
        ray_address: Of a running cluster.
    """
    from probsae.study import FULL, SMALL, run_study

    sizes = SMALL if scale == "small" else FULL
    folder = out / (scale if seed == 0 else f"{scale}-seed={seed}")
    page = run_study(
        folder, sizes, seed=seed, device=device, n_processes=n_processes,
        ray=ray or ray_address is not None, ray_address=ray_address,
    )  # fmt: skip
    print((page.parent / "answer.md").read_text())
    print(f"written: {page}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what a user can put right ends in one line and exit code 2.

    With PROBSAE_TRACEBACK set in the environment, it ends where it was raised.
    """
    verbs = (compare, fit, polish, evaluate, inspect, report, harvest, study)
    commands = {verb.__name__: verb for verb in verbs}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="probsae", args=arguments)
    except (*_USER_ERRORS, NonFiniteElboError) as error:
        if os.environ.get("PROBSAE_TRACEBACK"):
            raise
        print(f"probsae: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--options must be JSON like '{{\"k\": 32}}', got {text!r}") from error
    if not isinstance(value, dict):
        raise ValueError(f"--options must be a JSON object, got {text!r}")
    return value


def _dataset(name: str) -> object:
    import datasets

    if Path(name).is_dir():
        return datasets.load_from_disk(name)
    path, _, split = name.partition(":")
    return datasets.load_dataset(path, split=split or "train", streaming=True)
