"""Local, end-to-end, and end-to-end with downstream reconstruction, over a range of l0.

    python -m experiments.end_to_end.run --text book.txt --out runs/end_to_end
    python -m experiments.end_to_end.run --text book.txt --model MODEL --device cuda \
        --hook model.layers.7 --later model.layers.11 model.layers.19 --d-sae 4096 \
        --l0s 16 32 64 128 --n-steps 5000 --batch-size 4032

Everything finished is kept under --out, and trainings and fits go on from their last checkpoint: a
run that was killed goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from benchmarks.fit_overhead import commit
from experiments.calibration.measure import finite
from experiments.end_to_end import plots
from experiments.end_to_end.fits import (
    FAMILIES,
    OBJECTIVES,
    Family,
    ObjectiveName,
    Plan,
    fitted,
    plans,
)
from experiments.end_to_end.measure import measure
from experiments.end_to_end.model import character_model, split_contexts
from experiments.end_to_end.tables import markdown
from probsae.activations.language_model import LanguageModel, load_language_model
from probsae.activations.shards import checksum
from probsae.lm import ContextActivations

HELD_OUT = 0.1
# Folder of the text's token ids.
CONTEXTS = "contexts"
# Settings that a row's own name holds, or that no figure depends on.
_NOT_SHARED = ("out", "families", "objectives", "l0s", "seeds", "rates", "threads", "device")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained, fitted and measured.

    Every family is fitted under every objective at every l0 with every seed, on the same batches.

    Attributes
    ----------
    text : Path
        A text file; its last tenth is held out.
    out : Path
        Language model, token ids, dictionaries, results.json, tables.md and frontier.png.
    model : str, optional
        Folder of a Hugging Face model, .gguf file or name on the hub; a language model of
        characters is trained where none is given.
    hook : str
        Where the dictionaries stand.
    later : tuple of str
        Hooks behind it whose reconstruction is measured, and trained for "with downstream".
    families : tuple of str
        TopK, ReLU (its penalty steered to the l0), SpikeSlab (through TargetL0).
    objectives : tuple of str
        What is minimised: the error at the hook, the output's, that and the later layers'.
    l0s : tuple of int
        Active features a token.
    seeds : tuple of int
        Starts and orders of the batches.
    rates : tuple of float
        Learning rates, each a row of its own; none for those that were found best.
    d_sae : int
        Features of each dictionary.
    n_steps, batch_size : int
        Of each fit; a batch counts tokens and is rounded down to whole contexts.
    later_weight : float
        Weight of later layers' errors, a share of their variance, in nats of the output.
    context_length : int
        Tokens of a context, the one that begins texts included where the model has one.
    language_model_steps : int
        Training of the language model of characters.
    n_held_out : int
        Contexts to measure on.
    n_draws : int
        Posterior draws to splice in.
    device : str
        Of the language model and the fits.
    threads : int
        Of the processor.
    """

    text: Path
    out: Path = Path("runs/end_to_end")
    model: str | None = None
    hook: str = "model.layers.1"
    later: tuple[str, ...] = ("model.layers.2", "model.layers.3")
    families: tuple[Family, ...] = FAMILIES
    objectives: tuple[ObjectiveName, ...] = OBJECTIVES
    l0s: tuple[int, ...] = (2, 4, 8, 16)
    seeds: tuple[int, ...] = (0,)
    rates: tuple[float, ...] = ()
    d_sae: int = 256
    n_steps: int = 400
    batch_size: int = 504
    later_weight: float = 1.0
    context_length: int = 64
    language_model_steps: int = 800
    n_held_out: int = 200
    n_draws: int = 5
    device: str = "cpu"
    threads: int = 1


def shared_settings(settings: Settings) -> dict[str, Any]:
    """Return, JSON-ready, what all rows of a file have in common; of the text, what it says."""
    values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(settings).items()
        if key not in _NOT_SHARED
    }
    digest = checksum(settings.text)[:16]
    return values | {"text": f"{settings.text.name} {digest}", "held_out": HELD_OUT}


class Results:
    """Rows on disk, under the settings that they share.

    Raises
    ------
    ValueError
        If the file's rows were made with other settings.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file, self.settings = file, settings
        self.rows: dict[str, dict[str, Any]] = {}
        if file.exists():
            saved = json.loads(file.read_text())
            before = saved.get("settings", {})
            for key in sorted(before.keys() | settings.keys()):
                if before.get(key) != settings.get(key):
                    raise ValueError(
                        f"{file} was made with {key}={before.get(key)!r}, this run has "
                        f"{settings.get(key)!r}; pass the same settings, or another --out"
                    )
            self.rows = saved["rows"]
        self._write()

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows[name] = finite(row)
        self._write()

    def _write(self) -> None:
        content = {"settings": self.settings, "rows": self.rows}
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(new, self.file)


def open_language_model(settings: Settings) -> LanguageModel:
    """Load the language model, or train it."""
    if settings.model is not None:
        return load_language_model(settings.model, device=settings.device)
    return character_model(
        settings.text, settings.out / "language_model", settings.out / CONTEXTS,
        context_length=settings.context_length, held_out=HELD_OUT,
        n_steps=settings.language_model_steps, device=settings.device,
    )  # fmt: skip


def main(settings: Settings) -> None:
    """Fit, measure, print the tables, and draw the plot under `out`."""
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    results = Results(settings.out / "results.json", shared_settings(settings))
    of = settings
    every = plans(of.families, of.objectives, of.l0s, of.seeds, of.rates)
    todo = [plan for plan in every if plan.name not in results.rows]
    if todo:
        _fit_and_measure(settings, todo, results)
    tables = markdown(results.rows)
    (settings.out / "tables.md").write_text(tables)
    plots.frontier(results.rows).savefig(settings.out / "frontier.png", dpi=110)
    print(tables)


def _fit_and_measure(settings: Settings, todo: list[Plan], results: Results) -> None:
    language_model = open_language_model(settings)
    train, held_out = split_contexts(
        language_model, settings.text, settings.context_length, HELD_OUT, settings.out / CONTEXTS
    )
    held_out = held_out[: settings.n_held_out].long()
    contexts = ContextActivations(language_model, settings.hook, train)
    machine = f"{platform.machine()}, {settings.threads} thread, {settings.device}"
    code = commit()  # that which runs, whatever is committed meanwhile
    for plan in tqdm(todo, desc="dictionaries"):
        start = time.perf_counter()
        model = fitted(
            plan, contexts, settings.later, settings.out / "dictionaries", d_sae=settings.d_sae,
            n_steps=settings.n_steps, batch_size=settings.batch_size,
            later_weight=settings.later_weight, device=settings.device,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        row = measure(
            model, language_model, settings.hook, settings.later, held_out, settings.n_draws
        )
        of_run = {"seconds": seconds, "commit": code, "machine": machine}
        results.add(plan.name, dataclasses.asdict(plan) | row | of_run)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
