"""`probsae evaluate`, `inspect` and `report`: what fitted dictionaries are worth, and hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from probsae.activations.resources import choose_device
from probsae.activations.store import ActivationStore
from probsae.evaluate import evaluate as run_evaluation
from probsae.models.files import load
from probsae.report.inspect import feature_page
from probsae.report.reliability import evaluate_reliability
from probsae.report.run_files import MODEL
from probsae.report.run_folder import gather_run, held_out_share, report_run, synthetic_source


def evaluate(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")],
    store: Path | None = None,
    held_out: float | None = None,
    n_tokens: int = 32_768,
    out: Path | None = None,
    device: str | None = None,
) -> None:
    """Compare fitted dictionaries on held-out activations of a store, or on known features.

    Args:
        runs: Folders that `probsae fit` or `probsae compare` wrote.
        store: Activations; the share at the end of the text is used. Without one, runs on synthetic
            activations are compared on fresh tokens, and what is active there is known: the
            reliability of each probabilistic run goes into its folder, for `probsae report`.
        held_out: That share; by default what every one of the runs left out.
        n_tokens: Tokens to evaluate on, at most.
        out: File for the table, .json or .md.
        device: A GPU where there is one, by default.
    """
    if not runs:
        raise ValueError("evaluate needs at least one run")
    if out is not None and out.suffix not in (".json", ".md"):
        raise ValueError(f"--out must end in .json or .md, got {out}")
    place = choose_device(device)
    dictionaries = {
        str(run): load(run / MODEL if (run / MODEL).exists() else run, place) for run in runs
    }
    if store is None:
        data = synthetic_source(runs)
        evaluate_reliability(dictionaries, data)
    else:
        _, data = ActivationStore(store).split(held_out_share(runs, store, held_out))
    report = run_evaluation(dictionaries, data, n_tokens=n_tokens)
    Console().print(report.rich_table())
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report.to_json() if out.suffix == ".json" else report.to_markdown() + "\n")


def inspect(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    feature: int,
    store: Path | None = None,
    tokenizer: str | None = None,
    n_tokens: int = 16_384,
    device: str | None = None,
) -> None:
    """Show one feature: rate, uncertainty, neighbours, most certain and most doubtful tokens.

    Args:
        run: Folder that `probsae fit` or `probsae compare` wrote.
        feature: Its row in the dictionary.
        store: Activations to show it on; by default those of the fit, the held-out end.
        tokenizer: Model whose tokenizer reads the store's tokens; "none" shows their ids.
        n_tokens: Tokens to look at, at most.
        device: A GPU where there is one, by default.
    """
    features, facts = gather_run(
        run, store=store, tokenizer=tokenizer, n_tokens=n_tokens, device=device
    )
    try:
        page = feature_page(features, feature)
    except IndexError as error:
        raise ValueError(str(error)) from error
    Console().print(page)
    if "text" in facts:
        print(f"text: {facts['text']}")


def report(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    store: Path | None = None,
    tokenizer: str | None = None,
    n_tokens: int = 16_384,
    effects: str | None = None,
    others: tuple[Path, ...] = (),
    out: Path | None = None,
    device: str | None = None,
) -> None:
    """Write a page to browse a run's features in: one file, no server, no network.

    Args:
        run: Folder that `probsae fit` or `probsae compare` wrote.
        store: Activations to show features on; by default those of the fit, the held-out end.
        tokenizer: Model whose tokenizer reads the store's tokens; "none" shows their ids. By
            default the model that was harvested, where it is at hand.
        n_tokens: Tokens to look at, at most.
        effects: Language model to read each feature's effect on the next token from; "none" shows
            none. By default the model that was harvested, where it is a file or folder here.
        others: Folders of fits from other seeds, to see whether each feature comes back there; what
            is found is kept in the run folder.
        out: The page; by default report.html in the run folder.
        device: A GPU where there is one, by default.
    """
    page = report_run(
        run, store=store, tokenizer=tokenizer, n_tokens=n_tokens, logit_effects=effects,
        others=others, out=out, device=device,
    )  # fmt: skip
    print(f"written: {page}")
