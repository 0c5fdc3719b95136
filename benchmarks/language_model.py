"""What hooks, writing and splicing add to a language model's forward passes.

    python -m benchmarks.language_model   # prints, and writes results/language_model-<device>.json

SmolLM2-135M. `harvest` (tokenising, hooks, two stores with their statistics and checksums) is
compared with a bare forward of the blocks it needs, `splice` with the bare forwards that it makes:
four to the loss (untouched, spliced, zeros, mean) and one to the hook, for the mean activation.
Its overhead holds the dictionary, the losses and KL of every token, and the edits.
All run in turns in one process with the same threads; a figure is the median over rounds.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import probsae as ps
from benchmarks.fit_overhead import device_name, now, write_result
from experiments.smollm2.model import smollm2_path
from probsae import lm
from probsae.activations.harvest import harvest
from probsae.activations.language_model import LanguageModel, load_language_model

MOST_OVERHEAD = 0.1
# Of `splice`, to the loss: untouched, spliced, zeros, mean.
N_PASSES = 4


def truncated(model: LanguageModel, layer: int) -> torch.nn.Module:
    """Return the network up to and with block `layer`, without its head."""
    network: torch.nn.Module = copy.copy(model.network.get_submodule("model"))
    network._modules = dict(network._modules)
    blocks = network.get_submodule("layers")
    assert isinstance(blocks, torch.nn.ModuleList)
    network.layers = blocks[: layer + 1]
    return network


def methods(
    model: LanguageModel,
    text: Path,
    harvested: Tensor,
    spliced: Tensor,
    layer: int,
    batch_size: int,
) -> dict[str, Callable[[], object]]:
    """Return what is compared, in pairs on the same contexts."""
    hooks = [f"model.layers.{layer}", f"model.layers.{layer}.mlp.down_proj:input"]
    first_blocks = truncated(model, layer)
    x = lm.read_tokens(model, hooks[0], spliced[:4])
    sae = ps.TopKSAE(x.shape[1], 1_536, k=32)

    @torch.no_grad()
    def forward() -> None:
        for ids in harvested.split(batch_size):
            first_blocks(input_ids=ids, use_cache=False)

    def to_stores() -> None:
        with tempfile.TemporaryDirectory() as folder:
            harvest(
                model, text, hooks, Path(folder) / "out", n_tokens=harvested[:, 1:].numel(),
                context_length=harvested.shape[1], batch_size=batch_size, progress=False,
            )  # fmt: skip

    @torch.no_grad()
    def losses() -> None:
        for ids in spliced.split(batch_size):
            first_blocks(input_ids=ids, use_cache=False)
            for _ in range(N_PASSES):
                logits = model.logits(ids)[:, :-1]
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def splice() -> None:
        lm.splice(model, hooks[0], sae, spliced, batch_size=batch_size, progress=False)

    return {"forward": forward, "harvest": to_stores, "losses": losses, "splice": splice}


def main(
    text: Path = Path("tests/data/austen.txt"),
    layer: int = 7,
    n_harvested: int = 256,
    n_spliced: int = 8,
    context_length: int = 128,
    batch_size: int = 8,
    threads: int = 1,
    n_rounds: int = 3,
) -> None:
    """Measure on so many contexts, print and write."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_language_model(smollm2_path(), device=device)
    ids = model.tokenize([text.read_text()])[0]
    contexts = model.contexts(ids, context_length).to(device)
    harvested, spliced = contexts[:n_harvested], contexts[:n_spliced]
    if len(harvested) < n_harvested:
        raise ValueError(f"{text} must have {n_harvested} contexts, got {len(harvested)}")
    runs = methods(model, text, harvested, spliced, layer, batch_size)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(n_rounds), unit="round"):
        for name, run in runs.items():
            start = now()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(now() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "device": device_name(device),
        "threads": threads,
        "model": "SmolLM2-135M",
        "tokens harvested": harvested.numel(),
        "tokens spliced": spliced.numel(),
        "rounds": n_rounds,
        "harvest overhead": seconds["harvest"] / seconds["forward"] - 1,
        "splice overhead": seconds["splice"] / seconds["losses"] - 1,
        "seconds": times,
    }
    for key in ("harvest overhead", "splice overhead"):
        print(f"{key}: {result[key]:.1%}, bar {MOST_OVERHEAD:.0%}")
    write_result("language_model", result)


if __name__ == "__main__":
    tyro.cli(main)
