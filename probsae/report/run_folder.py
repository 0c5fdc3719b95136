"""From a run folder to its page: what `probsae fit` and `probsae compare` leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probsae.activations.resources import choose_device
from probsae.activations.store import ActivationStore
from probsae.comparison import Report
from probsae.inference.dictionary_posterior import DictionaryPosterior
from probsae.metrics.calibration import Reliability
from probsae.models.base import SparseDictionary
from probsae.models.files import load
from probsae.progress import shown
from probsae.report.effects import CANNOT_READ, NO_EFFECTS, effects_of
from probsae.report.features import DirectionUncertainty, FeatureData, LogitEffects, gather_features
from probsae.report.html import Page, load_template, write_browser
from probsae.report.run_files import (
    DATA,
    PAGE,
    POSTERIOR,
    RELIABILITY,
    method_of,
    read_json,
)
from probsae.report.stability import read_stability, write_stability
from probsae.report.token_text import Decode, TokenText, token_text
from probsae.synthetic import SyntheticActivations

# Of fresh synthetic tokens: none that a fit or its evaluation has seen.
_SEED = 4
# Tokens read at a time.
_ROWS = 16_384
# Instead of a tokenizer's name: show token ids.
NO_TOKENIZER = "none"


def held_out_share(
    runs: Sequence[str | Path], store: str | Path, share: float | None = None
) -> float:
    """Return the share at a store's end that no run was fitted to, or check the one that is given.

    Raises
    ------
    ValueError
        If `share` holds tokens of the same store that a run was fitted to.
    """
    facts = [read_json(Path(run) / DATA) for run in runs]
    place = str(Path(store).resolve())
    unseen = {
        str(run): float(fact["held_out"])
        for run, fact in zip(runs, facts, strict=True)
        if fact.get("store") == place
    }
    if not unseen:
        return 0.1 if share is None else share
    run, least = min(unseen.items(), key=lambda item: item[1])
    if share is not None and share > least:
        raise ValueError(
            f"held_out must be at most {least}, got {share}: {run} was fitted to the rest of "
            f"{store}"
        )
    return least if share is None else share


def report_run(
    run: str | Path,
    *,
    store: str | Path | None = None,
    tokenizer: str | None = None,
    n_tokens: int = 16_384,
    level: float = 0.9,
    posterior: DirectionUncertainty | None = None,
    logit_effects: LogitEffects | str | None = None,
    others: Sequence[str | Path] = (),
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Path:
    """Write the feature browser of a run folder.

    Parameters
    ----------
    run : str or Path
        Folder that `probsae fit` or `probsae compare` wrote. Read from it are model/, data.json,
        and, where they are there, history.json, report.json, reliability.json and
        stability.safetensors (a tensor `stability` of shape (d_sae,)).
    store : str or Path, optional
        Activations to show features on; by default those of the fit. Their held-out end is used.
    tokenizer : str, optional
        Language model whose tokenizer reads the store's tokens, by default the store's own, or
        token ids where that is not at hand; "none" shows token ids.
    n_tokens : int, default 16,384
        Tokens to look at, from the beginning of the held-out text.
    level : float, default 0.9
        Of the rates' intervals.
    posterior : DirectionUncertainty, optional
        See `gather_features`; by default what `probsae polish` left in the folder.
    logit_effects : str or LogitEffects, optional
        Language model to read each feature's effects on the next token from, by default the
        store's own where it is here; "none" shows none. Or the effects, see `gather_features`.
    others : sequence of str or Path, optional
        Folders of other runs, from other seeds, to look for the features in first: what is found
        is kept in the folder (`probsae.report.stability.write_stability`).
    out : str or Path, optional
        The page, by default report.html in the run folder.
    device : str or torch.device, optional
        Where to encode and to read effects; a GPU where there is one, by default.
    progress : bool, optional
        Show bars; by default on terminals, for what takes longer than two seconds.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    FileNotFoundError
        If the folder has neither dictionary nor comparison, or store or tokenizer are missing.
    ValueError
        If a file is damaged, the store does not fit the dictionary, one of `others` is not
        another fit of activations as wide, or there is no such device.
    """
    run, device = Path(run), choose_device(device)
    load_template()  # jinja2 and Vega: fail before the work, not after it
    facts: dict[str, str] = {}
    features = None
    if others:
        write_stability(run, others)
    if (run / "model").exists():
        features, facts = gather_run(
            run, store=store, tokenizer=tokenizer, n_tokens=n_tokens,
            level=level, posterior=posterior, logit_effects=logit_effects, device=device,
            progress=progress,
        )  # fmt: skip
    elif not (run / "report.json").exists():
        raise FileNotFoundError(
            f"{run} holds neither a dictionary (model/) nor a comparison (report.json); pass a "
            "folder that `probsae fit` or `probsae compare` wrote"
        )
    page = Page(
        title=facts.pop("title", run.resolve().name),
        facts=facts,
        features=features,
        report=_report(run / "report.json"),
        reliability={
            name: Reliability(**{key: torch.from_numpy(np.array(v)) for key, v in bins.items()})
            for name, bins in read_json(run / RELIABILITY).items()
        },
        history=read_json(run / "history.json"),
    )
    return write_browser(page, out or run / PAGE)


def gather_run(
    run: str | Path,
    *,
    store: str | Path | None = None,
    tokenizer: str | None = None,
    n_tokens: int = 16_384,
    level: float = 0.9,
    posterior: DirectionUncertainty | None = None,
    logit_effects: LogitEffects | str | None = NO_EFFECTS,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> tuple[FeatureData, dict[str, str]]:
    """Gather the features of a run folder, and the facts of what they were looked at on.

    Parameters and errors are those of `report_run`, but effects are left out unless asked for.
    """
    run = Path(run)
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
    if not (run / "model").exists():
        raise FileNotFoundError(
            f"{run} holds no dictionary (model/); pass what `probsae fit` wrote"
        )
    model = load(run / "model", choose_device(device))
    facts = {
        "dictionary": method_of(run, model),
        "size": f"{model.d_sae:,} features in {model.d_in:,} dimensions",
    }
    x, text = _tokens_to_show(run, model, store, tokenizer, n_tokens, facts, progress)
    if logit_effects is None or isinstance(logit_effects, str):
        logit_effects = _logit_effects(run, store, model, logit_effects, facts, progress)
    stability, description = read_stability(run, model.d_sae)
    if description:
        facts["stability"] = description
    features = gather_features(
        model,
        x,
        text=text,
        posterior=posterior or read_posterior(run),
        stability=stability,
        logit_effects=logit_effects,
        level=level,
        progress=progress,
    )
    return features, facts


def read_posterior(run: str | Path) -> DictionaryPosterior | None:
    """Return what `probsae polish` left in a run folder, or None."""
    folder = Path(run) / POSTERIOR
    return DictionaryPosterior.load(folder) if folder.exists() else None


def activations_of(run: str | Path, store: str | Path | None = None) -> tuple[Any, Any]:
    """Return what a run was fitted to and what is held out: two stores, or one synthetic source.

    Raises
    ------
    FileNotFoundError
        If the folder does not say, and no store is given.
    """
    data = read_json(Path(run) / DATA)
    if store is None and "synthetic" in data:
        source = SyntheticActivations(**_arguments(data["synthetic"]))
        return source, source
    if store is None and "store" not in data:
        raise FileNotFoundError(f"{run} does not say what it was fitted to; pass --store")
    return ActivationStore(store or data["store"]).split(data.get("held_out", 0.1))


def synthetic_source(runs: Sequence[str | Path]) -> SyntheticActivations:
    """Return the activations with known features that all `runs` were fitted to.

    Raises
    ------
    ValueError
        If a run was fitted to others, or to a store.
    """
    facts: list[Any] = [read_json(Path(run) / DATA).get("synthetic") for run in runs]
    for run, fact in zip(runs, facts, strict=True):
        if fact is None or fact != facts[0]:
            state = "not fitted to synthetic activations" if fact is None else "fitted to others"
            raise ValueError(f"{run} was {state}; pass --store, the activations to compare runs on")
    return SyntheticActivations(**_arguments(facts[0]))


def _logit_effects(
    run: Path,
    store: str | Path | None,
    model: SparseDictionary,
    name: str | None,
    facts: dict[str, str],
    progress: bool | None,
) -> LogitEffects | None:
    """Return the effects, or add to `facts` why there are none."""
    source, _ = activations_of(run, store)
    if not isinstance(source, ActivationStore):
        return None
    effects, remark = effects_of(source, model.dictionary(), name, progress=progress)
    if effects is None:
        facts["effects on logits"] = f"none: {remark}"
    return effects


def _tokens_to_show(
    run: Path,
    model: SparseDictionary,
    store: str | Path | None,
    tokenizer: str | None,
    n_tokens: int,
    facts: dict[str, str],
    progress: bool | None,
) -> tuple[Tensor, TokenText | None]:
    """Return held-out or fresh tokens and their text, and add to `facts` what they are."""
    source, rest = activations_of(run, store)
    if isinstance(source, SyntheticActivations):
        arguments = read_json(run / DATA)["synthetic"]
        facts["activations"] = ", ".join(f"{k} {v}" for k, v in arguments.items())
        facts["tokens"] = f"{n_tokens:,}, fresh"
        return source.sample(n_tokens, seed=_SEED)[0], None
    if source.d_in != model.d_in:
        raise ValueError(
            f"the store must have the dictionary's d_in={model.d_in}, got {source.d_in}: {source}"
        )
    n_tokens = min(n_tokens, rest.n_tokens)
    facts |= {"language model": Path(source.index["model"]).name, "hook": source.index["hook"]}
    facts |= {"store": str(source.path), "tokens": f"{n_tokens:,}, held out"}
    facts["title"] = " ".join(filter(None, [facts["language model"], facts["hook"]])) or run.name
    text = token_text(rest, n_tokens, _decode(source, tokenizer, facts))
    return _first_tokens(rest, n_tokens, progress), text


def _first_tokens(store: ActivationStore, n_tokens: int, progress: bool | None) -> Tensor:
    x = torch.empty(n_tokens, store.d_in)
    rows = torch.arange(n_tokens).split(_ROWS)
    for part in shown(rows, "activations", "batch", progress):
        x[part] = store.gather(part)
    return x


def _decode(store: ActivationStore, tokenizer: str | None, facts: dict[str, str]) -> Decode | None:
    """Return what turns the store's token ids into text, or add to `facts` why nothing does."""
    name = tokenizer or store.index["model"]
    if name in ("", NO_TOKENIZER):
        return None
    from probsae.activations.language_model import check_at_hand, load_tokenizer

    try:
        if tokenizer is None:
            check_at_hand(name)
        found = load_tokenizer(name)
    except CANNOT_READ as error:
        if tokenizer is None:
            facts["text"] = f"token ids: {error}; --tokenizer MODEL names a tokenizer"
            return None
        if not isinstance(error, FileNotFoundError):
            raise
        raise FileNotFoundError(
            f"{error}; pass --tokenizer MODEL, or --tokenizer none to show token ids"
        ) from error
    return lambda ids: [found.decode([i]) for i in ids]


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Undo JSON, which has no tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _report(path: Path) -> Report | None:
    if not path.exists():
        return None
    try:
        return Report.from_json(path.read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no readable comparison: {error!r}") from error
