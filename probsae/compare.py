"""The comparison that `probsae compare` runs: every method on the same synthetic activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from probsae import baselines, models
from probsae.baselines import Baseline
from probsae.comparison import Report
from probsae.dictionary import Dictionary
from probsae.evaluate import evaluate
from probsae.inference.fit import fit
from probsae.models.base import SparseDictionary
from probsae.seeding import seeded
from probsae.synthetic import SyntheticActivations

# 80,000 active codes: F1 to .002, and half the time of `evaluate`'s own default.
_N_EVALUATION_TOKENS = 16_384

Build = Callable[[SyntheticActivations, int], SparseDictionary | Baseline]


def _model(name: str, learning_rate: float | None = None, **options: float | bool) -> Build:
    """Build a model by name; a rate of its own where the family's default is too low here."""

    def build(data: SyntheticActivations, width: int) -> SparseDictionary:
        model = getattr(models, name)(d_in=data.d_in, d_sae=width, **options)
        if learning_rate is not None:
            model.default_learning_rate = learning_rate
        return model

    return build


def _topk(name: str) -> Build:
    """TopK forms are told how many features are active: the others have to find out."""
    return lambda data, width: getattr(models, name)(
        d_in=data.d_in, d_sae=width, k=max(1, round(data.n_active))
    )


def _baseline(name: str, n_tokens: int | None = None) -> Build:
    return lambda data, width: getattr(baselines, name)(width, n_tokens=n_tokens)


STORY: dict[str, Build] = {
    "SpikeSlab": _model("SpikeSlabDictionary"),
    # By trial on seed 100, 800 steps: MMCS .73 for Laplace, .81 for ReLU (.47 at its default rate).
    "Laplace": _model("LaplaceDictionary", learning_rate=0.04, nonnegative=True),
    "ReLU": _model("ReLUSAE", learning_rate=0.03),
    "TopK": _topk("TopKSAE"),
    "KMeans": _baseline("KMeans", 50_000),
    "PCA": _baseline("PCA"),
    "ICA": _baseline("ICA", 10_000),
}
"""The methods that tell the story."""

ALL: dict[str, Build] = {
    **STORY,
    "RectifiedGaussian": _model("RectifiedGaussianDictionary"),
    "SparseVAE": _model("SparseVAE"),
    "BatchTopK": _topk("BatchTopKSAE"),
    "Matryoshka": _topk("MatryoshkaSAE"),
    "JumpReLU": _model("JumpReLUSAE"),
    "Gated": _model("GatedSAE"),
    "KMedoids": _baseline("KMedoids"),
    "NMF": _baseline("NMF"),
    "DictionaryLearning": _baseline("MiniBatchDictionaryLearning"),
    "Random": _baseline("RandomDictionary"),
}


@dataclass(frozen=True)
class Comparison:
    """What a comparison leaves behind.

    Attributes
    ----------
    report : Report
        The table.
    dictionaries : dict
        Fitted models and baselines by name.
    histories : dict
        `FitResult.history` of those that were trained step by step.
    """

    report: Report
    dictionaries: dict[str, Dictionary]
    histories: dict[str, dict[str, list]] = field(default_factory=dict)


def compare(
    data: SyntheticActivations,
    *,
    methods: dict[str, Build] | None = None,
    d_sae: int = 768,
    n_steps: int = 700,
    batch_size: int = 1_024,
    seed: int = 0,
    progress: bool | None = None,
) -> Comparison:
    """Fit every method on `data` with the same width and budget, and evaluate on fresh tokens.

    Parameters
    ----------
    data : SyntheticActivations
        Activations with known features.
    methods : dict of builders, default STORY
        Name to a function of (data, width) that returns a dictionary.
    d_sae : int
        Features of each dictionary.
    n_steps, batch_size : int
        Of every fit by gradient.
    seed : int
        Of initial directions and of the batches' order.
    progress : bool, optional
        Show bars; by default on terminals.

    Returns
    -------
    Comparison
        Report, fitted dictionaries and their histories.
    """
    dictionaries: dict[str, Dictionary] = {}
    histories = {}
    for name, build in (STORY if methods is None else methods).items():
        with seeded(seed):
            dictionary = build(data, d_sae)
        if isinstance(dictionary, Baseline):
            with _spinner(name, progress):
                dictionary.fit(data)
        else:
            result = fit(
                dictionary,
                data,
                n_steps=n_steps,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )
            histories[name] = result.history
        dictionaries[name] = dictionary
    with _spinner("evaluation", progress):
        report = evaluate(
            dictionaries, data, n_tokens=_N_EVALUATION_TOKENS, seed=seed + 1, progress=False
        )
    return Comparison(report, dictionaries, histories)


def _spinner(name: str, progress: bool | None) -> Progress:
    """Show that something without countable steps is running, where the bars are."""
    console = Console(stderr=True)
    is_shown = console.is_terminal if progress is None else progress
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    bar = Progress(*columns, console=console, disable=not is_shown)
    bar.add_task(name, total=None)
    return bar
