"""Fit many dictionaries at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probsae.activations.resources import choose_device
from probsae.activations.source import ActivationData
from probsae.inference.callbacks import Callback
from probsae.inference.elbo import require_full_precision
from probsae.inference.ensemble.fits import warn_of_divergence
from probsae.inference.ensemble.stacked import Setup, Wish, check_passes, fit_stacked, steps_taken
from probsae.inference.fit import FitResult, fit
from probsae.inference.guard import NonFiniteElboError
from probsae.inference.schedule import Schedule
from probsae.inference.start import (
    check_callbacks,
    check_counts,
    check_hooks,
    check_model,
    check_rate,
    with_gradients,
)
from probsae.inference.step import Precision
from probsae.models.base import SparseDictionary
from probsae.seeding import check_seed


@with_gradients
def fit_ensemble(
    models: Sequence[SparseDictionary],
    data: ActivationData,
    *,
    n_steps: int = 2_000,
    batch_size: int = 1_024,
    learning_rate: float | Sequence[float | None] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    callbacks: Sequence[Iterable[Callback]] = (),
    schedule: Schedule | Sequence[Schedule | None] | None = None,
    n_tokens: int | None = None,
    precision: Precision = "float32",
    compile: bool | None = None,
    memory: float | None = None,
    resume: Sequence[str | Path | None] | None = None,
    progress: bool | None = None,
) -> list[FitResult]:
    """Fit every model as `fit` would, all on the same batches, in one batched program.

    Models of one class and shape are stacked: their step is one program for all, in which each
    has its own coefficients, k, schedule and learning rate. Others form groups of their own,
    which see the same batches. A sweep, a grid and seeds-as-chains are all this.

    Parameters
    ----------
    models : sequence of SparseDictionary
        Of one `d_in`; fitted in place.
    data : tensor, array, ActivationStore, synthetic source or iterable of batches
        See `fit`.
    n_steps, batch_size, seed, device, n_tokens, precision
        See `fit`; the same for all.
    learning_rate : float or sequence of float, optional
        Of all, or one a model; the model's `default_learning_rate` where None.
    callbacks : sequence of iterables of Callback, optional
        One iterable a model: a callback keeps what it saw, so two members cannot share one. It
        may change its model's tensors and optimiser in place, as in `fit`.
    schedule : Schedule or sequence of Schedule, optional
        Of all, or one a model; the family's own where None.
    compile : bool, optional
        Whether to compile the step; by default where that pays.
    memory : float, optional
        Bytes that may be taken; four fifths of what is free on the device where None. Members
        that do not fit beside the others are fitted after them, on the same batches again.
    resume : sequence of str, Path or None, optional
        One folder a model, of a `Checkpoint` to go on from, with the same data and settings; None
        for a model that begins. Those that are ahead wait until the others have come up to them.
    progress : bool, optional
        Show a bar over all; by default on terminals, for fits longer than two seconds.

    Returns
    -------
    list of FitResult
        In the order of `models`. A member that diverged keeps the parameters of its last good
        step; its result has `n_steps` there, and says why in `failure`.

    Raises
    ------
    ValueError, TypeError
        If an argument or the data are not usable; nothing is changed then.
    MemoryError
        If one member alone does not fit.

    Warns
    -----
    DivergedMemberWarning
        Where a member met NaN or infinity; the others went on.

    Notes
    -----
    A model whose decoder is not linear has a sampled ELBO, which is not stacked: such models are
    fitted by `fit` after the others, one by one, on the same batches.

    Examples
    --------
    >>> import probsae as ps
    >>> data = ps.SyntheticActivations(d_in=16, n_features=24, n_active=2, seed=0)
    >>> models = [ps.TopKSAE(d_in=16, d_sae=32, k=k) for k in (1, 2, 4)]
    >>> results = ps.fit_ensemble(models, data, n_steps=20, batch_size=64)
    >>> [result.n_tokens for result in results]
    [1280, 1280, 1280]
    """
    check_counts(n_steps, batch_size)
    seed = check_seed(seed)
    device = choose_device(device)
    _check_models(models)
    setup = Setup(data, n_steps, batch_size, seed, device, n_tokens, precision, compile, progress)
    schedules = _each(schedule, models, "schedule")
    rates = _each(learning_rate, models, "learning_rate")
    for rate in rates:
        check_rate(1.0 if rate is None else rate)
    own_callbacks = _each(callbacks or [()] * len(models), models, "callbacks")
    checkpoints = _checkpoints(resume, models)
    wishes = [
        Wish(i, model, schedules[i], rates[i], check_callbacks(own_callbacks[i]), checkpoints[i])
        for i, model in enumerate(models)
    ]
    for wish in wishes:
        steps_taken(wish, setup)
    stacked = [wish for wish in wishes if wish.model.has_linear_decoder]
    sampled = [wish for wish in wishes if not wish.model.has_linear_decoder]
    for wish in stacked:
        check_hooks(wish.model)
    check_passes(data, len(sampled) + bool(stacked))
    results = fit_stacked(stacked, setup, memory) if stacked else {}
    results |= {wish.index: _fit_alone(wish, setup) for wish in sampled}
    return [results[i] for i in range(len(models))]


def _check_models(models: Sequence[SparseDictionary]) -> None:
    """Raise ValueError or TypeError unless these are models that can see the same batches."""
    if isinstance(models, SparseDictionary):
        raise TypeError(f"models must be several: pass one as [model], got {type(models).__name__}")
    if len(models) == 0:
        raise ValueError("models must hold at least one dictionary, got none")
    if len({id(model) for model in models}) < len(models):
        raise ValueError("models must be distinct objects, and one came twice; build each anew")
    for model in models:
        check_model(model)
        require_full_precision(model)
    widths = sorted({model.d_in for model in models})
    if len(widths) > 1:
        raise ValueError(f"models must have one d_in, got {widths}; fit them apart")


def _each(value: Any, models: Sequence[SparseDictionary], name: str) -> list[Any]:
    """Return one entry a model of what is either one for all or a sequence."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    if not isinstance(value, Sequence):
        return [value] * len(models)
    if len(value) != len(models):
        raise ValueError(
            f"{name} must hold one entry for each of {len(models)} models, got {len(value)}"
        )
    return list(value)


def _checkpoints(
    resume: Sequence[str | Path | None] | None, models: Sequence[SparseDictionary]
) -> list[Path | None]:
    """Return one folder a model, or None."""
    if isinstance(resume, str | Path):
        raise TypeError(f"resume must hold one folder for each model, got {resume!r} for all")
    folders = _each(resume, models, "resume")
    return [None if folder is None else Path(folder) for folder in folders]


def _fit_alone(wish: Wish, setup: Setup) -> FitResult:
    """Fit a model that cannot be stacked; one that diverges is reported as a member is."""
    try:
        return fit(
            wish.model,
            setup.data,
            n_steps=setup.n_steps,
            batch_size=setup.batch_size,
            learning_rate=wish.learning_rate,
            seed=setup.seed,
            device=setup.device,
            callbacks=wish.callbacks,
            schedule=wish.schedule,
            n_tokens=setup.n_tokens,
            precision=setup.precision,
            compile=setup.compile,
            resume=wish.resume,
            progress=setup.progress,
        )
    except NonFiniteElboError as error:
        state = error.state
        warn_of_divergence(wish.index, wish.model, str(error))
        n_seen = state.step * setup.batch_size
        return FitResult(wish.model, state.history, state.step, n_seen, str(error))
