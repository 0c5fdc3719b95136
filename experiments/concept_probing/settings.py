"""What is fitted and probed, and the facts that tell one run's rows from another's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import probsae
from experiments.concept_probing.concepts import TEMPLATES, WINDOW, WORDS
from probsae.activations import ActivationStore
from probsae.activations.language_model import LanguageModel
from probsae.activations.shards import checksum
from probsae.metrics import probing

# Tokens of a text concept, as many as the words' in three sentences.
N_WINDOWS = 156
HELD_OUT = 0.1
TEXTS = ("english", "french", "code")
# Whose code makes dictionaries and rows; tables are made of rows afresh.
FIT_SOURCE = "representations.py"
ROW_SOURCES = ("concepts.py", "measure.py", FIT_SOURCE)


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
        Fitted dictionaries, rows and results.json.
    l0 : int
        Active features a token of the sparse dictionaries, expected or fixed.
    n_words : int, optional
        Words of each class; all 52 where None.
    n_draws : int
        Posterior draws of the codes for the posterior's score and interval.
    seed : int
        Of folds, controls, resamples and draws.
    fit_seed : int
        Of the dictionaries.
    """

    store: Path
    english: Path
    french: Path
    code: Path
    out: Path = Path("runs/concept_probing")
    model: str | None = None
    d_sae: int = 1_024
    n_steps: int = 1_000
    batch_size: int = 512
    l0: int = 32
    n_words: int | None = None
    n_windows: int = N_WINDOWS
    n_controls: int = 10
    n_draws: int = 20
    seed: int = 0
    fit_seed: int = 0
    threads: int = 1


def dictionary_facts(settings: Settings, store: ActivationStore) -> dict[str, Any]:
    """Return everything that makes the dictionaries: their data, sizes, seed, and the library."""
    own = ("d_sae", "n_steps", "batch_size", "l0", "fit_seed")
    index = store.index
    return {
        "store": {
            "model": Path(index["model"]).name,
            "hook": index["hook"],
            "settings": index["settings"],
            "shards": [shard["sha256"] for shard in index["shards"]],
        },
        "held_out": HELD_OUT,
        **{name: getattr(settings, name) for name in own},
        "fits": checksum(Path(__file__).parent / FIT_SOURCE),
        "library": source_digest(Path(probsae.__file__).parent),
    }


def row_facts(settings: Settings, store: ActivationStore, model: LanguageModel) -> dict[str, Any]:
    """Return everything that makes a row: the dictionaries, the concepts' tokens, the probes."""
    own = ("n_words", "n_windows", "n_controls", "n_draws", "seed")
    return {
        "dictionaries": dictionary_facts(settings, store),
        "model": Path(model.name).name,
        "bos_token_id": model.bos_token_id,
        "words": checksum(WORDS),
        "templates": list(TEMPLATES),
        "window": WINDOW,
        "texts": {name: checksum(getattr(settings, name)) for name in TEXTS},
        **{name: getattr(settings, name) for name in own},
        "budgets": list(probing.BUDGETS),
        "penalty": probing.PENALTY,
        "experiment": {name: checksum(Path(__file__).parent / name) for name in ROW_SOURCES},
    }


def digest(facts: dict[str, Any]) -> str:
    """Return twelve hex digits that name the facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def source_digest(folder: Path) -> str:
    """Return a digest of a folder's Python files: other code makes other rows."""
    files = sorted(folder.rglob("*.py"))
    return digest({str(file.relative_to(folder)): checksum(file) for file in files})


def check_store(store: ActivationStore, model: LanguageModel) -> None:
    """Raise ValueError where the store is of another model, or of contexts begun otherwise."""
    names = Path(store.index["model"]).name, Path(model.name).name
    # Stores of before the token that begins texts was written down have contexts without one.
    begins = store.index["settings"].get("bos_token_id"), model.bos_token_id
    if names[0] != names[1] or begins[0] != begins[1]:
        raise ValueError(
            f"the store must be of the model that is probed, begun as its contexts are: it is of "
            f"{names[0]} with first token {begins[0]}, the model is {names[1]} with {begins[1]}; "
            "harvest again"
        )
