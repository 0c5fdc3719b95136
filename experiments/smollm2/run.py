"""Dictionaries of SmolLM2-135M's activations, compared on held-out text and inside the model.

    python -m experiments.smollm2.run --text book.txt manual.txt --out runs/smollm2
    python -m experiments.smollm2.run --text book.txt manual.txt --site mlp

Harvests one layer's residual stream and its MLP's hidden layer, fits every method on one of them,
and measures fvu, l0, alive features, held-out ELBO, and the language model's cross-entropy with the
reconstruction spliced in. At equal expected l0 the spike-and-slab dictionary is compared with TopK
and BatchTopK, each at several learning rates. Each row is kept as it is finished, with all settings
that made it: a run that was killed goes on, and one with other settings is refused.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

import probsae as ps
from benchmarks.fit_overhead import commit
from experiments.concept_probing.settings import digest
from experiments.smollm2.model import smollm2_path
from probsae.activations import ActivationStore
from probsae.activations.harvest import fingerprint, harvest
from probsae.activations.language_model import load_language_model
from probsae.activations.shards import write_bytes
from probsae.dictionary import Dictionary
from probsae.inference import Callback, Checkpoint, TargetL0
from probsae.lm import Splicer

HELD_OUT = 0.1
_CHECKPOINT_EVERY = 100
COLUMNS = ("name", "fvu", "fvu_hard", "l0", "alive", "elbo", "loss_recovered", "kl")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One dictionary to fit."""

    name: str
    family: str
    options: dict[str, float | int | bool] = dataclasses.field(default_factory=dict)
    target_l0: float | None = None
    learning_rate: float | None = None
    is_spliced: bool = True


def plans(frontier: tuple[int, ...], rates: tuple[float, ...], l1: float) -> Iterator[Plan]:
    """Yield the methods at one operating point, then the frontier at equal l0.

    Of the frontier only what stands at l0 = 32 is spliced into the language model.
    """
    yield Plan("SpikeSlab", "SpikeSlabDictionary")
    yield Plan("Laplace", "LaplaceDictionary", {"nonnegative": True})
    yield Plan("ReLU", "ReLUSAE", {"l1_coefficient": l1})
    yield Plan("PCA", "PCA")
    yield Plan("KMeans", "KMeans")
    for l0 in frontier:
        is_spliced, name = l0 == 32, f"SpikeSlab l0={l0}"
        yield Plan(name, "SpikeSlabDictionary", {"learn_noise": False}, l0, None, is_spliced)
        for family in ("TopK", "BatchTopK"):
            for rate in rates:
                name = f"{family} k={l0} rate={rate}"
                yield Plan(name, f"{family}SAE", {"k": l0}, None, rate, is_spliced)


def fit_plan(
    plan: Plan,
    data: ActivationStore,
    checkpoint: Path,
    d_sae: int,
    n_steps: int,
    batch_size: int,
    seed: int,
) -> Dictionary:
    """Fit what `plan` describes, or go on from the `checkpoint` of a fit that was killed."""
    if hasattr(ps.baselines, plan.family):
        return getattr(ps.baselines, plan.family)(d_sae, seed=seed).fit(data)
    torch.manual_seed(seed)
    model = getattr(ps, plan.family)(d_in=data.d_in, d_sae=d_sae, **plan.options)
    callbacks: list[Callback] = [] if plan.target_l0 is None else [TargetL0(plan.target_l0)]
    ps.fit(
        model, data, n_steps=n_steps, batch_size=batch_size, learning_rate=plan.learning_rate,
        seed=seed, callbacks=[*callbacks, Checkpoint(checkpoint, _CHECKPOINT_EVERY)],
        resume=checkpoint if checkpoint.exists() else None,
    )  # fmt: skip
    shutil.rmtree(checkpoint)
    return model


def measure(
    dictionary: Dictionary,
    held_out: ActivationStore,
    splicer: Splicer | None,
) -> dict[str, Any]:
    """Evaluate on held-out activations and, given a splicer, inside the language model."""
    row = dataclasses.asdict(ps.evaluate([dictionary], held_out).rows[0])
    if splicer is not None:
        spliced = splicer.splice(dictionary, progress=False)
        row["loss_recovered"], row["kl"] = spliced.loss_recovered, spliced.kl
        row["cross_entropy"] = spliced.cross_entropy
        row["cross_entropy_spliced"] = spliced.cross_entropy_spliced
        row["cross_entropy_zero"] = spliced.cross_entropy_zero
    rates = torch.zeros(row["d_sae"], dtype=torch.float64)
    n_seen = 0
    for x in held_out.sequential(4_096):
        rates += dictionary.encode(x).p_active.double().sum(0).cpu()
        n_seen += len(x)
    counts, edges = ps.metrics.density_histogram((rates / n_seen).float(), n_bins=12)
    row["density_histogram"] = {"counts": counts.tolist(), "log10_rate": edges.tolist()}
    return row


def held_out_contexts(store: ActivationStore, length: int, n_contexts: int) -> Tensor:
    """Rebuild the last contexts' token ids; the first position, left out, gets the id 0.

    The text's own first tokens are not in the store. Id 0 is SmolLM2's end of text, with which it
    begins a document; splicing keeps the first position as it is.
    """
    # The last contexts lie within these tokens of the end, wherever it cuts one.
    end = torch.arange(max(0, len(store) - (n_contexts + 1) * (length - 1)), len(store))
    ids, positions = store.labels("tokens", end).long(), store.labels("positions", end)
    begins = torch.nonzero(positions == 1).flatten()
    begins = begins[begins + length - 1 <= len(ids)][-n_contexts:]
    places = begins[:, None] + torch.arange(length - 1)
    if not torch.equal(positions[places].long(), torch.arange(1, length).expand_as(places)):
        raise ValueError(f"the store's contexts do not have {length} tokens, the first left out")
    contexts = ids[places]
    return torch.cat([torch.zeros(len(contexts), 1, dtype=torch.long), contexts], dim=1)


def open_store(folder: Path, made: dict[str, Any]) -> ActivationStore:
    """Open a store, having checked that it was made with the settings `made`."""
    store = ActivationStore(folder)
    found = store.index["settings"] | {name: store.index[name] for name in ("model", "hook")}
    check_settings({name: found.get(name) for name in made}, made, str(folder))
    return store


def check_settings(found: dict[str, Any] | None, wish: dict[str, Any], what: str) -> None:
    """Raise ValueError where what is there was made with other settings than it would be now."""
    if found is None:
        raise ValueError(f"{what} does not say all the settings that made it; choose another --out")
    other = [name for name in {**wish, **found} if found.get(name) != wish.get(name)]
    if other:
        pairs = ", ".join(f"{name} {found.get(name)!r}, not {wish.get(name)!r}" for name in other)
        raise ValueError(f"{what} was made with {pairs}; choose another --out, or those settings")


def read_rows(file: Path, wishes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Read the finished rows, having checked that each was made as its plan would be now."""
    rows = json.loads(file.read_text()) if file.exists() else {}
    for name, wish in wishes.items():
        if name in rows:
            check_settings(rows[name].get("settings"), wish, f"{name!r} in {file}")
    return rows


def table(rows: dict[str, dict], title: str) -> Table:
    """Lay out the rows for a terminal."""
    out = Table(*COLUMNS, title=title)
    for name, row in rows.items():
        values = [row.get(column) for column in COLUMNS[1:]]
        cells = [
            f"{v:.4g}" if isinstance(v, float) else str(v if v is not None else "-") for v in values
        ]
        out.add_row(name, *cells)
    return out


def main(
    text: tuple[Path, ...],
    out: Path = Path("runs/smollm2"),
    site: Literal["residual", "mlp"] = "residual",
    model: str | None = None,
    layer: int = 7,
    n_tokens: int = 220_000,
    d_sae: int = 1_536,
    n_steps: int = 1_500,
    batch_size: int = 512,
    frontier: tuple[int, ...] = (8, 16, 32, 64),
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2),
    n_contexts: int = 32,
    context_length: int = 128,
    seed: int = 0,
    only: tuple[str, ...] = (),
) -> None:
    """Harvest, fit, measure, print; everything finished is kept under `out`.

    With `only`, names of rows, such as "SpikeSlab l0=64", no others are made.
    """
    language_model = load_language_model(model or smollm2_path())
    hooks = {
        "residual": f"model.layers.{layer}",
        "mlp": f"model.layers.{layer}.mlp.down_proj:input",
    }
    folder = out / "stores" / hooks[site].replace(":", ".")
    if not (folder / "index.json").exists():
        harvest(
            language_model, text, list(hooks.values()), out / "stores", n_tokens=n_tokens,
            context_length=context_length,
        )  # fmt: skip
    made = {
        "model": language_model.name, "hook": hooks[site], "text": fingerprint(text),
        "n_tokens": n_tokens, "context_length": context_length,
    }  # fmt: skip
    store = open_store(folder, made)
    train, held_out = store.split(HELD_OUT)
    token_ids = held_out_contexts(held_out, context_length, n_contexts)
    scale = store.index["scale"]["scale"]
    results_file = out / (f"{folder.name}.json" if seed == 0 else f"{folder.name}.seed-{seed}.json")
    # The language model's file may lie elsewhere on another machine.
    common = made | {
        "model": Path(language_model.name).name, "d_sae": d_sae, "n_steps": n_steps,
        "batch_size": batch_size, "n_contexts": n_contexts, "seed": seed,
    }  # fmt: skip
    # A lone code is pulled down by half the coefficient: a tenth of a typical code's size.
    todo = {plan.name: plan for plan in plans(frontier, rates, l1=2 * scale)}
    if unknown := set(only) - set(todo):
        raise ValueError(f"no rows {sorted(unknown)}; there are {', '.join(todo)}")
    wishes = {name: common | dataclasses.asdict(plan) for name, plan in todo.items()}
    rows = read_rows(results_file, wishes)
    splicer = None
    for name, plan in tqdm(todo.items(), unit="dictionary"):
        if name not in rows and (not only or name in only):
            # Named after all settings: a fit with others begins anew.
            checkpoint = out / f"checkpoint-{digest(wishes[name])}"
            dictionary = fit_plan(plan, train, checkpoint, d_sae, n_steps, batch_size, seed)
            if plan.is_spliced and splicer is None:
                splicer = Splicer(language_model, hooks[site], token_ids)
            row = measure(dictionary, held_out, splicer if plan.is_spliced else None)
            rows[name] = row | {"settings": wishes[name], "commit": commit()}
            write_bytes(results_file, json.dumps(rows, indent=1).encode())
    title = f"{hooks[site]}: {len(train):,} tokens, {len(held_out):,} held out"
    Console().print(table(rows, title))


if __name__ == "__main__":
    tyro.cli(main)
