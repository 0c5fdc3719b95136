"""Features of a one-layer transformer's MLP: families over widths, universality, and neurons.

    python -m experiments.one_layer_transformer.run \
        --text english=novels.txt english=glosses.txt french=manual_fr.txt german=manual_de.txt

Trains two transformers of one layer on the text, harvests their MLPs' hidden layers, fits
dictionaries at several widths and measures them on held-out text. Everything finished is kept under
--out, and fits and trainings go on from their last checkpoint: a run that was killed goes on, with
the same settings.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import platform
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from experiments.one_layer_transformer import plots
from experiments.one_layer_transformer.automata import automata
from experiments.one_layer_transformer.compare import (
    direction_posterior,
    neurons_across,
    splitting,
    universality,
)
from experiments.one_layer_transformer.fits import Plan, again, fitted, of_other, plans, training
from experiments.one_layer_transformer.language import Neurons, check_kinds, hypotheses
from experiments.one_layer_transformer.measure import measure
from experiments.one_layer_transformer.model import HOOK, tokenizer, transformer
from experiments.one_layer_transformer.tables import markdown
from experiments.one_layer_transformer.texts import (
    Contexts,
    Text,
    contexts,
    python_code,
    split_text,
    texts,
)
from experiments.rows import Rows
from probsae.activations import ActivationStore
from probsae.activations.harvest import harvest
from probsae.activations.language_model import LanguageModel
from probsae.activations.shards import checksum
from probsae.inference import DictionaryPosterior
from probsae.models.base import SparseDictionary
from probsae.progress import shown

HELD_OUT = 0.1
# Settings that change no row, or that rows are named by.
_FREE = ("out", "threads", "device", "families", "widths", "compared_width")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained, fitted and measured.

    Attributes
    ----------
    text : tuple of str
        Text files, each as `kind=file` or alone, its name then the kind; several files may be of
        one kind. The last tenth of each is held out.
    out : Path
        Texts, transformers, stores, dictionaries, results.json and plots.
    n_code_bytes : int
        Of Python's standard library, as one more text; 0 for none.
    n_vocabulary, context_length : int
        Byte-level BPE tokens; tokens of a context.
    model_steps, model_batch_size, model_learning_rate
        Training of each transformer; a batch counts contexts.
    n_tokens : int
        Activations harvested from each transformer.
    widths : tuple of int
        Features of the dictionaries, ascending.
    compared_width : int
        At which features of the two transformers are compared.
    l0 : int
        Active features a token of SpikeSlab (expected), TopK and BatchTopK.
    n_steps, batch_size : int
        Of each fit.
    n_held_out : int
        Contexts to measure on.
    n_draws : int
        Posterior draws of codes and of directions.
    """

    text: tuple[str, ...]
    out: Path = Path("runs/one_layer_transformer")
    n_code_bytes: int = 600_000
    n_vocabulary: int = 1_024
    context_length: int = 64
    model_steps: int = 1_500
    model_batch_size: int = 64
    model_learning_rate: float = 3e-3
    n_tokens: int = 300_000
    families: tuple[str, ...] = ("SpikeSlab", "BatchTopK", "TopK", "ReLU")
    widths: tuple[int, ...] = (256, 512, 1_024)
    compared_width: int = 512
    l0: int = 16
    n_steps: int = 1_000
    batch_size: int = 512
    n_held_out: int = 640
    n_draws: int = 8
    threads: int = 1
    device: str = "cpu"


class Run:
    """One run's parts, each made once, and its rows."""

    def __init__(self, settings: Settings):
        self.settings, out = settings, settings.out
        given = texts(settings.text)
        self.plain = plain(settings, given)
        self.rows = Rows(out, self.plain, _FREE, settings.device)
        if settings.n_code_bytes:
            code = python_code(out / "python_code.txt", settings.n_code_bytes)
            given.append(Text("code", code))
        self.train_files, held_out = split_text(
            [text.file for text in given], out / "text", HELD_OUT
        )
        self.tokenizer = tokenizer(self.train_files, out / "tokenizer", settings.n_vocabulary)

        def of(part: str, files: list[Path]) -> Contexts:
            parts = [Text(text.kind, file) for text, file in zip(given, files, strict=True)]
            folder = out / "contexts" / part
            return contexts(parts, self.tokenizer, settings.context_length, folder)

        self.train, self.held_out = of("train", self.train_files), of("held_out", held_out)
        check_kinds(self.train, self.measured)

    @cached_property
    def measured(self) -> tuple[Tensor, Tensor]:
        """Held-out contexts that are measured on, of all texts in their order, and their kinds."""
        n_contexts = len(self.held_out.ids)
        n = min(self.settings.n_held_out, n_contexts)
        chosen = torch.linspace(0, n_contexts - 1, n).long()
        return self.held_out.ids[chosen].long(), self.held_out.labels[chosen]

    @property
    def token_ids(self) -> Tensor:
        """The contexts of `measured`."""
        return self.measured[0]

    @cached_property
    def networks(self) -> list[LanguageModel]:
        """The two transformers."""
        of, out = self.settings, self.settings.out
        train, held_out = self.train.ids, self.held_out.ids
        self.rows.make("text", lambda: text_facts(train, held_out, len(self.tokenizer)))
        return [
            transformer(
                train, self.tokenizer, out / f"transformer-{seed}", n_steps=of.model_steps,
                batch_size=of.model_batch_size, learning_rate=of.model_learning_rate, seed=seed,
                device=torch.device(of.device),
            )
            for seed in (0, 1)
        ]  # fmt: skip

    def store(self, network: int) -> ActivationStore:
        """Harvest one transformer's activations of the training text."""
        folder = self.settings.out / "stores" / str(network)
        if not (folder / "index.json").exists():
            harvest(
                self.networks[network], self.train_files, HOOK, folder,
                n_tokens=self.settings.n_tokens, context_length=self.settings.context_length,
            )  # fmt: skip
        return ActivationStore(folder)

    def dictionary(self, plan: Plan) -> SparseDictionary:
        """Return one dictionary, on the device of the run."""
        of = self.settings
        return fitted(
            plan, self.store(plan.transformer), of.out / "dictionaries", n_steps=of.n_steps,
            batch_size=of.batch_size, l0=of.l0, device=of.device,
        )  # fmt: skip

    def posterior(self, plan: Plan) -> DictionaryPosterior | None:
        """Return the directions' posterior, of a probabilistic dictionary."""
        model = self.dictionary(plan)
        if model.is_deterministic:
            return None
        folder = self.settings.out / "posteriors" / plan.name.replace(" ", "-")
        if not folder.exists():
            data = self.store(plan.transformer)
            direction_posterior(model, data, self.settings.l0).save(folder)
        return DictionaryPosterior.load(folder)


def text_facts(train: Tensor, held_out: Tensor, n_vocabulary: int) -> dict[str, Any]:
    """Return the sizes, and the loss of a prediction that knows the tokens' frequencies alone."""
    counts = torch.bincount(train.flatten(), minlength=n_vocabulary).double() + 1
    seen = torch.bincount(held_out.flatten(), minlength=n_vocabulary).double()
    return {
        "training tokens": train.numel(),
        "held-out tokens": held_out.numel(),
        "unigram nll": float(-(counts / counts.sum()).log() @ (seen / seen.sum())),
        "uniform nll": math.log(n_vocabulary),
    }


def measure_all(run: Run) -> None:
    """Fill the rows: transformers, dictionaries, families, universality."""
    of = run.settings
    machine = f"{platform.machine()}, {of.threads} thread, {of.device}, torch {torch.__version__}"
    run.rows.make("run", lambda: {"machine": machine, "settings": run.plain})
    for seed in range(len(run.networks)):
        losses = json.loads((of.out / f"transformer-{seed}" / "training.json").read_text())
        run.rows.make(f"transformer {seed}", lambda losses=losses: losses)
    run.rows.make("neurons", lambda: neurons_across(run.networks, run.token_ids))
    every_plan = list(plans(of.families, of.widths, of.compared_width))
    for plan in shown(every_plan, "dictionaries", "dictionary", None):
        network = run.networks[plan.transformer]
        run.rows.make(
            plan.name,
            lambda plan=plan, network=network: (
                measure(run.dictionary(plan), network, run.token_ids, of.n_draws)
                | {"training": training(plan, of.out / "dictionaries")}
            ),
        )
    for family in of.families:
        compare(run, family)
    read_language(run)


def compare(run: Run, family: str) -> None:
    """Fill one family's rows of splitting and universality."""
    of = run.settings
    for widths in itertools.pairwise(of.widths):
        pair = [Plan(family, width) for width in widths]
        run.rows.make(
            f"splitting {family} {widths[0]} {widths[1]}",
            lambda pair=pair: splitting(
                run.dictionary(pair[0]), run.dictionary(pair[1]), run.networks[0], run.token_ids,
                posteriors(run, pair), of.n_draws,
            ),
        )  # fmt: skip
    plan = Plan(family, of.compared_width)
    run.rows.make(
        f"universality {family} {of.compared_width}",
        lambda: universality(
            run.dictionary(plan), run.dictionary(again(plan)), run.dictionary(of_other(plan)),
            run.networks, run.token_ids, run.posterior(plan),
        ),
    )  # fmt: skip


def read_language(run: Run) -> None:
    """Fill the rows of kinds of text and of automata, for the first transformer's dictionaries."""
    of, network = run.settings, run.networks[0]
    neurons = Neurons(run.store(0).d_in)
    # One kind of text cannot be told from others.
    readers = of.families if len(run.train.sizes) > 1 else ()
    if readers:
        run.rows.make(
            "language neurons",
            lambda: hypotheses(neurons, network, HOOK, run.train, run.measured),
        )
    for plan in itertools.starmap(Plan, itertools.product(readers, of.widths)):
        run.rows.make(
            f"language {plan.family} {plan.d_sae}",
            lambda plan=plan: hypotheses(
                run.dictionary(plan), network, HOOK, run.train, run.measured
            ),
        )
    for family in of.families:
        plan = Plan(family, of.compared_width)
        run.rows.make(
            f"automata {plan.family} {plan.d_sae}",
            lambda plan=plan: automata(
                run.dictionary(plan), network, HOOK, run.train.ids, run.token_ids
            ),
        )


def posteriors(
    run: Run, pair: list[Plan]
) -> tuple[DictionaryPosterior, DictionaryPosterior] | None:
    """Return both directions' posteriors, or None of deterministic dictionaries."""
    narrow, wide = (run.posterior(plan) for plan in pair)
    return None if narrow is None or wide is None else (narrow, wide)


def plain(settings: Settings, given: list[Text]) -> dict[str, Any]:
    """Return the settings JSON-ready; of the text files kinds, names and checksums."""
    values = dataclasses.asdict(settings) | {"out": str(settings.out)}
    return values | {"text": [f"{kind}={t.name} {checksum(t)[:16]}" for kind, t in given]}


def main(settings: Settings) -> None:
    """Run, print the tables, and draw the plots under `out`."""
    torch.set_num_threads(settings.threads)
    run = Run(settings)
    measure_all(run)
    tables = markdown(run.rows)
    (settings.out / "tables.md").write_text(tables)
    plots.draw(run.rows, settings.out)
    print(tables)


if __name__ == "__main__":
    main(tyro.cli(Settings))
