"""Does a posterior localise concepts better? Probes of SmolLM2's residual stream and dictionaries.

    python -m experiments.concept_probing.run --store stores/model.layers.7 \\
        --english novels.txt --french manual_fr.txt --code library.py

Fits dictionaries on a store of activations, takes labelled tokens through the same hook, and asks
of every dictionary how few of its features carry a concept and how much of the raw probe's
selectivity they keep. Dictionaries and rows are kept under --out as they are finished, in folders
named after all that made them: a killed run goes on, and one with other settings begins anew beside
it. Prints and writes the tables of README.md.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import tyro

import probsae as ps
from experiments.concept_probing.concepts import (
    Concept,
    last_activations,
    text_concept,
    word_concepts,
)
from experiments.concept_probing.measure import ConceptProbe
from experiments.concept_probing.representations import Representation, representations
from experiments.concept_probing.rows import Probe, RowFolder, fill
from experiments.concept_probing.settings import (
    HELD_OUT,
    TEXTS,
    Settings,
    check_store,
    row_facts,
)
from experiments.concept_probing.tables import markdown
from experiments.smollm2.model import smollm2_path
from probsae.activations import ActivationStore, take
from probsae.activations.language_model import LanguageModel, load_language_model
from probsae.activations.shards import write_bytes

RESULTS = "results.json"


def concepts(settings: Settings, model: LanguageModel) -> Iterator[Concept]:
    """Yield the words' concepts, then French and code against English prose."""
    yield from word_concepts(model, settings.n_words)
    texts = {name: beginning(getattr(settings, name)) for name in TEXTS}
    for name in ("french", "code"):
        yield text_concept(model, name, texts[name], texts["english"], settings.n_windows)


def beginning(file: Path) -> str:
    """Return a million characters, which have many times the windows that are taken."""
    with file.open(encoding="utf-8", errors="replace") as text:
        return text.read(1_000_000)


@torch.no_grad()
def sparsity_and_fidelity(
    settings: Settings, methods: dict[str, Representation], held_out: ActivationStore
) -> dict[str, dict[str, float]]:
    """Return l0 and fvu on held-out activations, by representation."""
    x = take(held_out, 4_096, seed=settings.seed)
    l0, fvu = {}, {}
    for name, method in methods.items():
        z = method.codes(x)
        l0[name] = float((z != 0).float().sum(1).mean())
        if method.decode is not None:
            fvu[name] = ps.metrics.fvu(x, method.decode(z).cpu())
    # Of a posterior, the expected number.
    expected = float(methods["SpikeSlab, p_active"].codes(x).sum(1).mean())
    l0["SpikeSlab, p_active"] = l0["SpikeSlab, mean"] = expected
    return {"l0": l0, "fvu": fvu}


def run(settings: Settings, model: LanguageModel) -> dict[str, Any]:
    """Fit and probe; return the rows, the tables, and what they were made with."""
    store = ActivationStore(settings.store)
    check_store(store, model)
    # Before the fits, so that a text that is too short is known at once.
    asked = list(concepts(settings, model))
    folder = RowFolder(settings.out, row_facts(settings, store, model))
    train, held_out = store.split(HELD_OUT)
    methods = representations(settings, train)

    def probes(number: int, concept: Concept) -> Probe:
        x = last_activations(model, store.index["hook"], concept.contexts)
        # A seed of its own for each concept: resamples of different concepts are independent.
        one = ConceptProbe(settings, concept, x, seed=100 * settings.seed + number)
        return lambda name: one.row(name, methods[name])

    rows, failures = fill(folder, asked, list(methods), probes)
    about = sparsity_and_fidelity(settings, methods, held_out)
    plain = {
        key: value.name if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(settings).items()
    }
    # The draws of the scores, a thousand each, stay with the rows.
    short = [dataclasses.asdict(row) for row in rows]
    for row in short:
        del row["score_draws"]
    return {
        "settings": plain,
        "rows_folder": folder.path.name,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, "
        f"torch {torch.__version__}",
        **about,
        "failures": failures,
        "rows": short,
        "tables": markdown(rows, about["l0"], about["fvu"]),
    }


def main(settings: Settings) -> None:
    """Run, print the tables and write results.json beside the rows."""
    torch.set_num_threads(settings.threads)
    result = run(settings, load_language_model(settings.model or smollm2_path()))
    file = settings.out / result["rows_folder"] / RESULTS
    write_bytes(file, (json.dumps(result, indent=1) + "\n").encode())
    print(result["tables"])
    print(f"Written to {file}.")
    for what, why in result["failures"].items():
        print(f"Without {what}: {why}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
