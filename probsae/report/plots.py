"""The figures of a comparison; the only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probsae.metrics import calibration, recovery

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Features in a bin of the recovery plot: the mean over 32 is steady, 512 features give 16 points.
_FEATURES_IN_BIN = 32


def recovery_by_rate(
    dictionaries: Mapping[str, Tensor], features: Tensor, firing_probability: Tensor
) -> Figure:
    """Draw each true feature's best cosine against its firing probability, binned by rank.

    Parameters
    ----------
    dictionaries : mapping from name to Tensor, shape (d_sae, d_in)
        Learned unit directions.
    features : Tensor, shape (feature, d_in)
        True ones.
    firing_probability : Tensor, shape (feature,)
        How often each is active.
    """
    figure, axes = new_figure(7, 4.5)
    order = firing_probability.argsort(descending=True)
    bins = order.split(_FEATURES_IN_BIN)
    rates = [float(firing_probability[index].mean()) for index in bins]
    for i, (name, learned) in enumerate(dictionaries.items()):
        cosine = recovery.max_cosines(learned, features)
        means = [float(cosine[index].mean()) for index in bins]
        # The first method's line is broad: it shows where another one covers it.
        axes.plot(rates, means, marker="o", linewidth=1.5 if i else 6, label=name)
    d_sae = max(len(learned) for learned in dictionaries.values())
    chance = recovery.chance_level(d_sae, len(features), features.shape[1])["mmcs"]
    axes.axhline(chance, color="grey", linestyle="--", label="chance")
    axes.set(
        xscale="log",
        xlabel="firing probability of the true feature",
        ylabel="cosine with the nearest learned feature",
        ylim=(0, 1.02),
        title="Which features are found",
    )
    axes.legend(fontsize="small")
    return figure


def reliability_diagram(predictions: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """Draw stated against observed frequency, with 95% binomial intervals.

    Parameters
    ----------
    predictions : mapping from name to (p_active, is_true)
        Matched columns: probabilities and events of the same shape.
    """
    figure, axes = new_figure(5.5, 5)
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    for name, (p_active, is_true) in predictions.items():
        bins = calibration.reliability(p_active.cpu(), is_true.cpu())
        error = torch.stack([bins.observed - bins.lower, bins.upper - bins.observed])
        axes.errorbar(
            bins.predicted, bins.observed, error.clamp(min=0), marker="o", capsize=2, label=name
        )
    axes.set(
        xlabel="p_active, as stated",
        ylabel="share that is truly active",
        xlim=(0, 1),
        ylim=(0, 1),
        title="Are the probabilities true?",
    )
    axes.legend(fontsize="small")
    return figure


def loss_curves(histories: Mapping[str, Mapping[str, list]]) -> Figure:
    """Draw each fit's minus ELBO, fvu and expected l0 on its batches against steps.

    ELBOs are nats or squared errors, each family's own: each is drawn from its least loss, 0, to
    its largest, 1. The KL term has its full weight in all of them: the annealed one would show the
    warm-up of the constants in it, some 1,800 nats of a ReLU SAE's prior, and nothing else.
    """
    labels = {
        "elbo": "minus the ELBO, from its least to its largest",
        "fvu": "fraction of variance unexplained",
        "l0": "expected active features a token",
    }
    figure, panels = new_figure(14, 4, columns=3)
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for name, history in histories.items():
            values = np.asarray(history[key])
            if key == "elbo":
                values = (values.max() - values) / max(np.ptp(values), 1e-12)
            axes.plot(history["step"], values, label=name)
        axes.set(yscale="linear" if key == "elbo" else "log", xlabel="step", ylabel=label)
    panels[0].legend(fontsize="small")
    return figure


def tsne(x: Tensor, z: Tensor, seed: int = 0) -> Figure:
    """Draw a t-SNE of activations, coloured by the strongest true feature's rank of frequency.

    Parameters
    ----------
    x : Tensor, shape (token, d_in)
        Some thousand activations.
    z : Tensor, shape (token, feature)
        Their true codes.
    """
    from sklearn.manifold import TSNE

    x, z = x.cpu(), z.cpu()
    points = TSNE(random_state=seed, init="pca", perplexity=30).fit_transform(x.numpy())
    frequency = (z != 0).sum(0).argsort(descending=True).argsort()
    figure, axes = new_figure(6, 5)
    is_any = (z != 0).any(1).numpy()
    axes.scatter(*points[~is_any].T, s=4, color="lightgrey", label="no active feature")
    drawn = axes.scatter(
        *points[is_any].T, s=4, c=frequency[z.abs().argmax(1)].numpy()[is_any], cmap="viridis"
    )
    figure.colorbar(drawn, label="rank of the strongest feature, by frequency")
    axes.set(xticks=[], yticks=[], title=f"t-SNE of {len(x):,} activations")
    return figure


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """Return a figure that belongs to no window, and its axes."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install '.[report]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)
