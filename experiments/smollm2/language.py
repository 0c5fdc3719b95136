"""Features of SmolLM2 as hypotheses of language, and the automata that they make.

    python -m experiments.smollm2.language --text english=novel.txt english=glosses.txt \\
        french=manual_fr.txt german=manual_de.txt --out runs/smollm2_language

Harvests one MLP's hidden layer on the texts and on Python's standard library, fits the
dictionaries, and asks of held-out text as in experiments/one_layer_transformer: which feature
stands for a language, what follows when it is taken out or pinned, and which features call
themselves on the next token. Each row is kept as it is finished.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.fit_overhead import commit
from experiments.one_layer_transformer.automata import automata
from experiments.one_layer_transformer.fits import Plan, fitted
from experiments.one_layer_transformer.language import check_kinds, hypotheses
from experiments.one_layer_transformer.run import HELD_OUT
from experiments.one_layer_transformer.tables import automata as automata_table
from experiments.one_layer_transformer.tables import kinds, strongest_loops
from experiments.one_layer_transformer.texts import (
    Contexts,
    Text,
    contexts,
    python_code,
    split_text,
    texts,
)
from experiments.rows import Rows
from experiments.smollm2.model import smollm2_path
from probsae.activations import ActivationStore
from probsae.activations.harvest import harvest
from probsae.activations.language_model import LanguageModel, load_language_model
from probsae.activations.shards import checksum


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is harvested, fitted and measured.

    Attributes
    ----------
    text : tuple of str
        Text files, each as `kind=file` or alone; the last tenth of each is held out.
    model : str, optional
        SmolLM2 by default.
    layer : int
        Block whose MLP's hidden layer is read. (In the residual stream some tokens are a hundred
        times the size of others, and a short fit is about them.) Effects on the logits leave out
        what later blocks do.
    n_held_out : int
        Contexts to measure on, as many of each kind.
    """

    text: tuple[str, ...]
    out: Path = Path("runs/smollm2_language")
    model: str | None = None
    layer: int = 26
    n_code_bytes: int = 600_000
    n_tokens: int = 24_000
    context_length: int = 64
    families: tuple[str, ...] = ("SpikeSlab", "BatchTopK")
    d_sae: int = 1_024
    l0: int = 32
    n_steps: int = 400
    batch_size: int = 512
    n_held_out: int = 64
    threads: int = 1


def balanced(held_out: Contexts, n_contexts: int) -> tuple[Tensor, Tensor]:
    """Take as many contexts of each kind, spread over its text, and their kinds."""
    n = n_contexts // len(held_out.sizes)
    parts = []
    for own in held_out.by_kind().values():
        places = torch.linspace(0, len(own) - 1, min(n, len(own))).long()
        parts.append(own[places].long())
    labels = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts]))
    return torch.cat(parts), labels


def main(settings: Settings) -> None:
    """Harvest, fit, measure, print; everything finished is kept under `out`."""
    torch.set_num_threads(settings.threads)
    of, hook = settings, f"model.layers.{settings.layer}.mlp.down_proj:input"
    given = texts(of.text)
    values = dataclasses.asdict(of) | {"out": str(of.out)}
    values["text"] = [f"{kind}={file.name} {checksum(file)[:16]}" for kind, file in given]
    rows = Rows(of.out, values, free=("out", "threads", "families"))
    model = load_language_model(of.model or smollm2_path())
    files, (train, held_out) = _texts(of, given, model)
    measured = balanced(held_out, of.n_held_out)
    check_kinds(train, measured)
    if not (of.out / "store" / "index.json").exists():
        harvest(
            model, files, hook, of.out / "store", n_tokens=of.n_tokens,
            context_length=of.context_length,
        )  # fmt: skip
    machine = f"{platform.machine()}, {of.threads} thread, torch {torch.__version__}"
    rows.make("run", lambda: {"machine": machine, "commit": commit(), "settings": values})
    store = ActivationStore(of.out / "store")
    for family in of.families:
        dictionary = fitted(
            Plan(family, of.d_sae), store, of.out / "dictionaries", n_steps=of.n_steps,
            batch_size=of.batch_size, l0=of.l0, device="cpu",
        )  # fmt: skip
        name = f"{family} {of.d_sae}"
        rows.make(
            f"language {name}",
            lambda d=dictionary: hypotheses(d, model, hook, train, measured),
        )
        rows.make(
            f"automata {name}",
            lambda d=dictionary: automata(d, model, hook, train.ids, measured[0]),
        )
    tables = "\n\n".join([kinds(rows), automata_table(rows), strongest_loops(rows)])
    (of.out / "tables.md").write_text(tables + "\n")
    print(tables)


def _texts(
    of: Settings, given: list[Text], model: LanguageModel
) -> tuple[list[Path], tuple[Contexts, Contexts]]:
    """Return the files to train on, and the contexts of training and held-out text."""
    if of.n_code_bytes:
        given = [*given, Text("code", python_code(of.out / "python_code.txt", of.n_code_bytes))]
    parts = split_text([text.file for text in given], of.out / "text", HELD_OUT)
    tokenize: Any = model.tokenizer
    train, held_out = (
        contexts(
            [Text(text.kind, file) for text, file in zip(given, files, strict=True)],
            tokenize, of.context_length, of.out / "contexts" / name,
        )
        for name, files in zip(("train", "held_out"), parts, strict=True)
    )  # fmt: skip
    return parts[0], (train, held_out)


if __name__ == "__main__":
    main(tyro.cli(Settings))
