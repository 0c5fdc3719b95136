"""Does a posterior localise concepts better? Probes of SmolLM2's residual stream and dictionaries.

    python -m experiments.concept_probing.run --store stores/model.layers.7 \\
        --english novels.txt --french manual_fr.txt --code library.py

Fits dictionaries on a store of activations (kept under --out and reused), takes labelled tokens
through the same hook, and asks of every dictionary how few of its features carry a concept and how
much of the raw probe's selectivity they keep. Prints and writes the tables of README.md.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import probsae as ps
from experiments.concept_probing.concepts import (
    Concept,
    last_activations,
    text_concept,
    word_concepts,
)
from experiments.concept_probing.tables import Row, markdown
from experiments.smollm2.model import smollm2_path
from probsae.activations import ActivationStore, take
from probsae.activations.language_model import LanguageModel, load_language_model
from probsae.dictionary import Dictionary
from probsae.inference import TargetL0
from probsae.metrics import probing
from probsae.models.base import SparseDictionary
from probsae.models.files import load, save

HELD_OUT = 0.1
# Tokens of a text concept, as many as the words' in three sentences.
N_WINDOWS = 156
HOLM_LEVEL = 0.05

Map = Callable[[Tensor], Tensor]


class Representation(NamedTuple):
    """What a method makes of activations, and how it reads back."""

    codes: Map
    decode: Map | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fitted and probed.

    Attributes
    ----------
    store : Path
        Activations of the hook at which concepts are probed.
    english, french, code : Path
        Text files.
    out : Path
        Fitted dictionaries and results.json.
    l0 : int
        Active features a token of the sparse dictionaries, expected or fixed.
    n_words : int, optional
        Words of each class; all 52 where None.
    n_draws : int
        Posterior draws of the codes for the posterior's interval.
    """

    store: Path
    english: Path
    french: Path
    code: Path
    out: Path = Path("runs/concept_probing")
    model: str | None = None
    d_sae: int = 1_024
    n_steps: int = 300
    batch_size: int = 512
    l0: int = 32
    n_words: int | None = None
    n_windows: int = N_WINDOWS
    n_controls: int = 10
    n_draws: int = 8
    seed: int = 0
    threads: int = 1


def fitted(settings: Settings, name: str, train: ActivationStore) -> SparseDictionary:
    """Return the dictionary called `name`, from disk where an earlier run left it."""
    of = ("d_sae", "n_steps", "batch_size", "l0", "seed")
    folder = settings.out / "-".join([name, *(f"{key}={getattr(settings, key)}" for key in of)])
    if folder.exists():
        return load(folder)
    torch.manual_seed(settings.seed)
    model = new(settings, name, train)
    callbacks = [TargetL0(settings.l0)] if name == "SpikeSlab" else []
    ps.fit(
        model, train, n_steps=settings.n_steps, batch_size=settings.batch_size,
        seed=settings.seed, callbacks=callbacks,
    )  # fmt: skip
    save(model, folder)
    return model


def new(settings: Settings, name: str, train: ActivationStore) -> SparseDictionary:
    """Return an unfitted dictionary."""
    if name == "SpikeSlab":
        return ps.SpikeSlabDictionary(train.d_in, settings.d_sae, learn_noise=False)
    if name == "TopK":
        return ps.TopKSAE(train.d_in, settings.d_sae, k=settings.l0)
    # A lone code is pulled down by half the coefficient: a tenth of a typical code's size.
    return ps.ReLUSAE(train.d_in, settings.d_sae, l1_coefficient=2 * train.index["scale"]["scale"])


def representations(
    settings: Settings, train: ActivationStore
) -> tuple[dict[str, Representation], SparseDictionary]:
    """Return what each method makes of activations, by name, and the probabilistic dictionary."""
    n_tokens = min(20_000, train.n_tokens)
    plain = {
        "PCA": ps.baselines.PCA(settings.d_sae, n_tokens=n_tokens, seed=settings.seed).fit(train),
        "random directions": ps.baselines.RandomDictionary(settings.d_sae, seed=settings.seed).fit(
            train
        ),
        "ReLU": fitted(settings, "ReLU", train),
        "TopK": fitted(settings, "TopK", train),
    }
    slab = fitted(settings, "SpikeSlab", train)

    def hard(x: Tensor) -> Tensor:
        posterior = slab.encode(x)
        return posterior.mean * posterior.is_active

    return {
        "raw activations": Representation(lambda x: x),
        **{name: Representation(_mean(model), model.decode) for name, model in plain.items()},
        "SpikeSlab, mean": Representation(_mean(slab), slab.decode),
        "SpikeSlab, hard codes": Representation(hard, slab.decode),
        "SpikeSlab, p_active": Representation(lambda x: slab.encode(x).p_active),
    }, slab


def _mean(model: Dictionary) -> Map:
    return lambda x: model.encode(x).mean


def concepts(settings: Settings, model: LanguageModel) -> Iterator[Concept]:
    """Yield the words' concepts, then French and code against English prose."""
    yield from word_concepts(model, settings.n_words)
    # A megabyte has many times the windows that are taken.
    texts = {
        name: getattr(settings, name).read_text(encoding="utf-8", errors="replace")[:1_000_000]
        for name in ("english", "french", "code")
    }
    for name in ("french", "code"):
        yield text_concept(model, name, texts[name], texts["english"], settings.n_windows)


def probe(
    settings: Settings,
    concept: Concept,
    seed: int,
    x: Tensor,
    methods: dict[str, Representation],
    slab: SparseDictionary,
) -> Iterator[tuple[Row, probing.Localisation]]:
    """Yield a row for each representation of one concept."""
    labels, types = torch.tensor(concept.labels), torch.tensor(concept.types)
    task, recurring = (
        probing.concept_task(
            labels, types, n_controls=settings.n_controls, hold_out_types=hold_out, seed=seed
        )
        for hold_out in (True, False)
    )
    raw = probing.selectivity(task, x)
    for name, method in methods.items():
        z = method.codes(x)
        result, draw_interval = probing.localise(z, raw), None
        if name == "SpikeSlab, mean":
            draw_interval = probing.localise_posterior(_draws(settings, slab, x), raw).interval()
        everything = probing.selectivity(task, z)
        memory = probing.selectivity(recurring, z)
        yield Row(
            name, concept.name, result.score, result.interval(), result.chance, draw_interval,
            result.fidelity.tolist(), [p.accuracy for p in result.sparse],
            result.features_for(0.9), n_different(z, labels, types),
            everything.accuracy, everything.interval(),
            memory.accuracy, float(memory.control_accuracies.mean()), memory.interval(),
        ), result  # fmt: skip


def _draws(settings: Settings, slab: SparseDictionary, x: Tensor) -> Iterator[Tensor]:
    posterior = slab.encode(x)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for _ in range(settings.n_draws):
            yield posterior.sample()[0]


def n_different(z: Tensor, labels: Tensor, types: Tensor) -> int:
    """Count features whose means differ by Holm at .05, on the first token of each type."""
    first = {int(t): i for i, t in reversed(list(enumerate(types.tolist())))}
    rows = torch.tensor(sorted(first.values()))
    tests = probing.welch_tests(z[rows], labels[rows])
    return int((probing.adjust_p_values(tests.p_value, "holm") <= HOLM_LEVEL).sum())


@torch.no_grad()
def facts(
    settings: Settings, methods: dict[str, Representation], held_out: ActivationStore
) -> dict[str, Any]:
    """Return how sparse and how faithful the representations are, and what the run was."""
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
    plain = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(settings).items()
    }
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}"
    return {"l0": l0, "fvu": fvu, "settings": plain, "machine": machine}


def run(settings: Settings, model: LanguageModel) -> dict[str, Any]:
    """Fit and probe; return the rows, the tables, and what they were made with."""
    train, held_out = ActivationStore(settings.store).split(HELD_OUT)
    methods, slab = representations(settings, train)
    rows: list[Row] = []
    results: dict[str, dict[str, probing.Localisation]] = {}
    bar = tqdm(list(concepts(settings, model)), desc="concepts", disable=None)
    # A seed of its own for each concept: resamples of different concepts are independent.
    for seed, concept in enumerate(bar, start=100 * settings.seed):
        x = last_activations(model, held_out.index["hook"], concept.contexts)
        for row, result in probe(settings, concept, seed, x, methods, slab):
            rows.append(row)
            results.setdefault(row.dictionary, {})[row.concept] = result
    about = facts(settings, methods, held_out)
    tables = markdown(rows, results, about["l0"], about["fvu"])
    return {**about, "rows": [dataclasses.asdict(row) for row in rows], "tables": tables}


def main(settings: Settings) -> None:
    """Run, print the tables and write results.json under `out`."""
    torch.set_num_threads(settings.threads)
    result = run(settings, load_language_model(settings.model or smollm2_path()))
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result["tables"])


if __name__ == "__main__":
    main(tyro.cli(Settings))
