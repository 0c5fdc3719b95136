"""Local, end-to-end, and end-to-end with downstream reconstruction, at equal l0.

    python -m experiments.end_to_end.run --text book.txt --out runs/end_to_end
    python -m experiments.end_to_end.run --text book.txt --model MODEL --hook model.layers.7 \
        --later model.layers.11 model.layers.19 --l0 32 --d-sae 4096 \
        --n-steps 5000 --batch-size 4032

Without --model a language model of characters is trained first. Each row is kept as it is
finished: a run that was killed goes on.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

import probsae as ps
from experiments.end_to_end.model import CharacterTokenizer, train_language_model
from experiments.language_models import contexts_of
from probsae.activations import take
from probsae.activations.language_model import LanguageModel, load_language_model
from probsae.inference import TargetL0
from probsae.lm import ContextActivations, EndToEnd, downstream_fvu, read_tokens, splice

HELD_OUT = 0.1
OBJECTIVES = ("local", "end to end", "with downstream")
COLUMNS = {
    "l0": "l0",
    "alive": "alive",
    "ce_increase": "CE +",
    "ce_increase_draws": "of draws",
    "kl": "KL",
    "fvu": "fvu",
    "downstream_fvu": "later fvu",
}


def weight_of_errors(model: ps.SparseDictionary, contexts: ContextActivations) -> float:
    """Return the weight of the output's and the later layers' errors.

    Deterministic SAEs have no other error to weigh them against. A probabilistic dictionary's stand
    against the codes' nats, where a nat or all of a later layer's variance counts as half of the
    variance of x does in the local error: `TargetL0` then begins near the noise scale it needs.
    """
    if model.is_deterministic:
        return 1.0
    x = take(contexts, 4_096, seed=0, device="cpu")
    return 0.5 * float((x - x.mean(0)).square().sum(1).mean())


def fit(
    family: str,
    name: str,
    contexts: ContextActivations,
    later: tuple[str, ...],
    l0: int,
    d_sae: int,
    n_steps: int,
    batch_size: int,
    seed: int,
) -> ps.SparseDictionary:
    """Fit one family under one objective, from the same start."""
    torch.manual_seed(seed)
    model: ps.SparseDictionary
    if family == "TopKSAE":
        model, callbacks = ps.TopKSAE(d_in=contexts.d_in, d_sae=d_sae, k=l0), []
    else:
        model = ps.SpikeSlabDictionary(d_in=contexts.d_in, d_sae=d_sae, learn_noise=False)
        callbacks = [TargetL0(l0)]
    objective = None
    if name != "local":
        hooks = later if name == "with downstream" else ()
        weight = weight_of_errors(model, contexts)
        objective = EndToEnd(contexts, later=hooks, output_weight=weight, later_weight=weight)
    ps.fit(
        model, contexts, objective=objective, n_steps=n_steps, batch_size=batch_size, seed=seed,
        callbacks=callbacks,
    )  # fmt: skip
    return model


def measure(
    model: ps.SparseDictionary,
    language_model: LanguageModel,
    hook: str,
    later: tuple[str, ...],
    token_ids: Tensor,
    n_draws: int,
) -> dict[str, float | int]:
    """Measure on held-out contexts."""
    x = read_tokens(language_model, hook, token_ids)
    here = ps.evaluate([model], x).rows[0]
    result = splice(language_model, hook, model, token_ids, n_draws=n_draws, progress=False)
    errors = downstream_fvu(language_model, hook, model, token_ids, later)
    drawn = float(result.draw_cross_entropy.double().mean())
    lower, upper = result.context_interval()
    return {
        "l0": here.l0,
        "alive": here.alive,
        "fvu": here.fvu,
        "cross_entropy": result.cross_entropy,
        "ce_increase": result.cross_entropy_spliced - result.cross_entropy,
        "ce_increase_draws": drawn - result.cross_entropy,
        "loss_recovered": result.loss_recovered,
        "loss_recovered_low": lower,
        "loss_recovered_high": upper,
        "kl": result.kl,
        "downstream_fvu": sum(errors.values()) / len(errors),
        **{f"fvu {name}": error for name, error in errors.items()},
    }


def table(rows: dict[str, dict], title: str) -> Table:
    """Lay out the rows for a terminal."""
    out = Table("fit", *COLUMNS.values(), title=title)
    for name, row in rows.items():
        out.add_row(name, *(f"{row[column]:.3g}" for column in COLUMNS))
    return out


def main(
    text: Path,
    out: Path = Path("runs/end_to_end"),
    model: str | None = None,
    hook: str = "model.layers.1",
    later: tuple[str, ...] = ("model.layers.2", "model.layers.3"),
    families: tuple[str, ...] = ("TopKSAE", "SpikeSlabDictionary"),
    l0: int = 6,
    d_sae: int = 256,
    n_steps: int = 500,
    batch_size: int = 1_008,
    context_length: int = 64,
    language_model_steps: int = 800,
    n_held_out: int = 200,
    n_draws: int = 5,
    seeds: tuple[int, ...] = (0, 1),
) -> None:
    """Fit every family under every objective, measure, print; rows are kept under `out`."""
    words = text.read_text(encoding="utf-8")
    if model is None:
        tokenizer = CharacterTokenizer(words)
        token_ids = contexts_of(tokenizer([words])["input_ids"][0], context_length)
        n_train = int((1 - HELD_OUT) * len(token_ids))
        language_model = train_language_model(
            tokenizer, token_ids[:n_train], n_steps=language_model_steps
        )
    else:
        language_model = load_language_model(model)
        token_ids = contexts_of(language_model.tokenize([words])[0], context_length)
        n_train = int((1 - HELD_OUT) * len(token_ids))
    held_out = token_ids[n_train:][:n_held_out]
    contexts = ContextActivations(language_model, hook, token_ids[:n_train])
    out.mkdir(parents=True, exist_ok=True)
    results_file = out / "results.json"
    rows = json.loads(results_file.read_text()) if results_file.exists() else {}
    for seed in seeds:
        for family in families:
            for name in OBJECTIVES:
                key = f"{family} {name} {seed}"
                if key not in rows:
                    fitted = fit(
                        family, name, contexts, later, l0, d_sae, n_steps, batch_size, seed
                    )
                    row = measure(fitted, language_model, hook, later, held_out, n_draws)
                    rows[key] = row
                    results_file.write_text(json.dumps(rows, indent=1))
    Console().print(table(rows, f"{language_model.name}, {hook}, {held_out.numel():,} held out"))


if __name__ == "__main__":
    tyro.cli(main)
