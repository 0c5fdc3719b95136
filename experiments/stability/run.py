"""Do features come back with other seeds and widths, and does one fit know which will?

    python -m experiments.stability.run --out runs/stability            # synthetic activations
    python -m experiments.stability.run --store runs/smollm2/stores/model.layers.7 --k 24 --l1 .6

Each family is fitted once a seed, from an initial dictionary of its own and in an order of the
data of its own, and at half and twice the width with the first seed. The spike-and-slab fits are
polished for the dictionary's posterior. Fits are kept under `out`: a run that was killed goes on.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

import probsae as ps
from benchmarks.fit_overhead import commit
from experiments.stability.measure import THRESHOLD, across_seeds, across_widths
from probsae.activations import ActivationStore

Data = ps.SyntheticActivations | ActivationStore
FAMILIES = ("SpikeSlabDictionary", "BatchTopKSAE", "ReLUSAE")
PROBABILISTIC = FAMILIES[0]


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a fit depends on but its family, width and seed."""

    store: str | None
    """Folder of the activations, or None: the seed benchmark's, noise .05."""
    k: int
    l1: float
    rates: dict[str, float | None]
    n_steps: int
    batch_size: int
    n_polish: int

    def data(self) -> Data:
        """Return what all fits share."""
        if self.store is None:
            return ps.SyntheticActivations(noise_scale=0.05, seed=0)
        return ActivationStore(Path(self.store))


@dataclasses.dataclass(frozen=True)
class Fit:
    """One dictionary."""

    family: str
    d_sae: int
    seed: int

    def folder(self, out: Path) -> Path:
        """Where it is kept."""
        return out / "fits" / f"{self.family}-{self.d_sae}-seed={self.seed}"

    def run(self, settings: Settings, data: Data, out: Path) -> None:
        """Fit, polish where there is a posterior to be had, and write."""
        options = {"BatchTopKSAE": {"k": settings.k}, "ReLUSAE": {"l1_coefficient": settings.l1}}
        torch.manual_seed(self.seed)
        model = getattr(ps, self.family)(
            d_in=data.d_in, d_sae=self.d_sae, **options.get(self.family, {})
        )
        ps.fit(
            model, data, n_steps=settings.n_steps, batch_size=settings.batch_size,
            learning_rate=settings.rates[self.family], seed=self.seed,
        )  # fmt: skip
        folder = self.folder(out)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if self.family == PROBABILISTIC:
            ps.save(model, folder.with_name(folder.name + "-unpolished"))
            posterior = ps.polish(model, data, n_tokens=settings.n_polish, seed=self.seed)
            posterior.save(folder.with_name(folder.name + "-posterior"))
        ps.save(model, folder)


def main(
    out: Path = Path("runs/stability"),
    store: Path | None = None,
    d_sae: int | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    n_steps: int | None = None,
    k: int = 12,
    l1: float = 0.2,
    spike_slab_rate: float | None = None,
    batch_top_k_rate: float = 0.01,
    relu_rate: float | None = None,
    n_polish: int = 100_000,
) -> None:
    """Fit what is missing, and print and write the figures.

    Parameters
    ----------
    out
        Folder of the fits and of results.json.
    store
        Folder of harvested activations; the seed benchmark's synthetic ones where there is none.
    d_sae
        Width; 768 on synthetic activations, 1,536 on a store. Half of it and twice it are fitted
        with the first seed.
    seeds
        Of fits; at least two.
    n_steps
        Of each fit; 2,000 batches of 1,024 on synthetic activations, 1,500 of 512 on a store.
    k, l1
        Of BatchTopK and of ReLU; the defaults are the best of the seed benchmark.
    spike_slab_rate, batch_top_k_rate, relu_rate
        Learning rates; the family's default where None (ReLU on synthetic activations: .03).
    n_polish
        Tokens of the closed-form pass.
    """
    if len(seeds) < 2:
        raise ValueError(f"stability needs at least two seeds, got {seeds}")
    is_synthetic = store is None
    d_sae = d_sae or (768 if is_synthetic else 1_536)
    settings = Settings(
        store=None if store is None else str(store.resolve()),
        k=k,
        l1=l1,
        rates={
            "SpikeSlabDictionary": spike_slab_rate,
            "BatchTopKSAE": batch_top_k_rate,
            "ReLUSAE": relu_rate or (0.03 if is_synthetic else None),
        },
        n_steps=n_steps or (2_000 if is_synthetic else 1_500),
        batch_size=1_024 if is_synthetic else 512,
        n_polish=n_polish,
    )
    _claim(out, settings)
    data = settings.data()
    fits = [
        Fit(family, width, seed)
        for seed in seeds
        for width in ((d_sae, d_sae // 2, 2 * d_sae) if seed == seeds[0] else (d_sae,))
        for family in FAMILIES
    ]
    for fit in tqdm([fit for fit in fits if not fit.folder(out).exists()], unit="fit"):
        fit.run(settings, data, out)
    result = {
        "settings": dataclasses.asdict(settings),
        "seeds": list(seeds),
        "threshold": THRESHOLD,
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "commit": commit(),
        "families": measure_all(out, data, d_sae, seeds),
    }
    (out / "results.json").write_text(json.dumps(result, indent=1))
    print(table(result))


def _claim(out: Path, settings: Settings) -> None:
    """Write the settings into `out`, or see that the fits there were made with the same ones."""
    file, wanted = out / "settings.json", dataclasses.asdict(settings)
    if file.exists():
        if (kept := json.loads(file.read_text())) != wanted:
            differing = sorted(name for name in wanted if kept.get(name) != wanted[name])
            raise ValueError(
                f"{out} holds fits with other settings ({', '.join(differing)}): "
                "give another --out, or the same settings"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=1))


def measure_all(
    out: Path, data: Data, d_sae: int, seeds: tuple[int, ...]
) -> dict[str, dict[str, Any]]:
    """Measure every family over seeds and over widths."""
    found: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        folders = [Fit(family, d_sae, seed).folder(out) for seed in seeds]
        posteriors = None
        if family == PROBABILISTIC:
            unpolished = [ps.load(f.with_name(f.name + "-unpolished")) for f in folders]
            found["SpikeSlab, as fitted"] = across_seeds(unpolished, None, data)
            posteriors = [
                ps.DictionaryPosterior.load(f.with_name(f.name + "-posterior")) for f in folders
            ]
        name = "SpikeSlab, polished" if posteriors else family.removesuffix("SAE")
        found[name] = across_seeds([ps.load(f) for f in folders], posteriors, data)
        widths = [Fit(family, w, seeds[0]).folder(out) for w in (d_sae // 2, d_sae, 2 * d_sae)]
        found[name]["widths"] = across_widths([ps.load(f) for f in widths], data)
    return found


ROWS = {
    "alive": "alive",
    "real": "taken for real (p_real > .5)",
    "reappear": "come back in the other seeds, share of the alive",
    "reappear_real": "of those taken for real",
    "by_chance": "random directions",
    "auroc_direction_variance": "AUROC, direction variance",
    "auroc_not_real": "AUROC, 1 - p_real",
    "auroc_minus_rate": "AUROC, minus the firing rate",
    "spearman_direction_variance": "Spearman with 1 - cosine, direction variance",
    "spearman_not_real": "Spearman, 1 - p_real",
    "spearman_minus_rate": "Spearman, minus the firing rate",
    "rhat_cosine_above_1.1": "real features with R-hat of the cosine above 1.1",
    "rhat_norm_above_1.1": "of the norm",
}


def table(result: dict[str, Any]) -> str:
    """Lay the figures out as Markdown; mean ± standard deviation over which fit is the one."""
    families = result["families"]
    lines = [f"| | {' | '.join(families)} |", "|" + " --- |" * (len(families) + 1)]
    for key, label in ROWS.items():
        cells = [_cell(family.get(key)) for family in families.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    pairs = [key for f in families.values() for key in f.get("widths", {}) if "_in_" in key]
    for key in dict.fromkeys(pairs):
        cells = [_cell(family.get("widths", {}).get(key)) for family in families.values()]
        narrow, wide = key.split("_in_")
        lines.append(f"| of {narrow} wide, found again {wide} wide | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | list[float] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"{value[0]:.3g} ± {value[1]:.2g}"
    return f"{value:.3g}"


if __name__ == "__main__":
    tyro.cli(main)
