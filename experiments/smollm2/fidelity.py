"""How well a fitted dictionary stands in for SmolLM2's activations, with both of its intervals.

    python -m experiments.smollm2.fidelity --run run/

Splices the dictionary of a `probsae fit` into the language model that its store was harvested from,
on contexts of the store's held-out end: the posterior mean, its hard codes, and posterior draws,
whose spread is the interval that not knowing the codes gives the fidelity. Prints and writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.fit_overhead import commit, device_name
from experiments.smollm2.run import held_out_contexts
from probsae.activations.language_model import load_language_model
from probsae.activations.shards import write_bytes
from probsae.lm import Splicer
from probsae.models.files import load
from probsae.report.run_folder import activations_of

RESULTS = Path(__file__).parent / "fidelity.json"


def main(
    run: Path,
    n_contexts: int = 4,
    n_draws: int = 10,
    seed: int = 0,
    level: float = 0.9,
    out: Path = RESULTS,
) -> None:
    """Splice, print and write."""
    torch.set_num_threads(1)
    store, held_out = activations_of(run)
    model, index = load(run / "model"), store.index
    length = index["settings"]["context_length"]
    token_ids = held_out_contexts(held_out, length, n_contexts)
    splicer = Splicer(load_language_model(index["model"]), index["hook"], token_ids, batch_size=4)
    whole = splicer.splice(model, n_draws=n_draws, seed=seed)

    def hard(x: Tensor) -> Tensor:
        posterior = model.encode(x)
        return model.decode(posterior.mean * (posterior.p_active > 0.5))

    draws = whole.draw_cross_entropy.double().mean((1, 2)) - whole.cross_entropy
    token_lower, token_upper = whole.token_interval(level)
    result: dict[str, Any] = {
        "model": Path(index["model"]).name,
        "hook": index["hook"],
        "dictionary": type(model).__name__,
        "d_sae": model.d_sae,
        "contexts x tokens": list(token_ids.shape),
        "draws": n_draws,
        "level": level,
        "cross_entropy": whole.cross_entropy,
        "cross_entropy_spliced": whole.cross_entropy_spliced,
        "cross_entropy_zero": whole.cross_entropy_zero,
        "cross_entropy_mean": whole.cross_entropy_mean,
        "kl": whole.kl,
        "loss_recovered": whole.loss_recovered,
        "loss_recovered_hard": splicer.splice(hard).loss_recovered,
        "loss_recovered_from_mean": whole.loss_recovered_from_mean,
        "interval_over_draws": whole.interval(level),
        "ce_increase_of_draws": float(draws.mean()),
        "interval_over_text": whole.context_interval(level, seed),
        "median_token_interval_nats": float((token_upper - token_lower)[:, 1:].median()),
        "seed": seed,
        "machine": f"{device_name(torch.device('cpu'))}, 1 thread",
        "commit": commit(),
    }
    write_bytes(out, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
