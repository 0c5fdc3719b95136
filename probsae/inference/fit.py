"""Stochastic variational inference of any dictionary, one model at a time."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor
from tqdm.auto import tqdm

from probsae.activations.resources import choose_device
from probsae.activations.source import ActivationData, size_of
from probsae.inference.callbacks import (
    Callback,
    FitState,
    load_checkpoint,
    load_random_state,
    steps_done,
    tell_of_failure,
)
from probsae.inference.elbo import require_full_precision
from probsae.inference.guard import FiniteGuard, NonFiniteElboError
from probsae.inference.loop import Fits, progress_bar, run
from probsae.inference.pyro_objective import check_draws
from probsae.inference.schedule import Schedule
from probsae.inference.start import (
    FirstScales,
    adam,
    check_callbacks,
    check_counts,
    check_divides,
    check_fit_memory,
    check_hooks,
    check_model,
    check_rate,
    open_data,
    with_gradients,
)
from probsae.inference.step import (
    LossFunction,
    Precision,
    Step,
    average_step,
    check_precision,
    piece_tokens,
    products_in,
    shared_by,
    training_step,
)
from probsae.models.base import SparseDictionary
from probsae.models.code_priors import typical_code_size
from probsae.models.files import describe
from probsae.processes import Processes, ProcessGroup
from probsae.seeding import check_seed, seeded, stream_seed

__all__ = ["FitResult", "NoiseFloorWarning", "NonFiniteElboError", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What a fit leaves behind.

    Attributes
    ----------
    model : SparseDictionary
        The model that was passed, fitted in place, in evaluation mode.
    history : dict of lists
        `step`, `loss` and `elbo` (nats per token), `fvu`, `l0` (expected active features a
        token), `kl_weight`, at up to 200 points of the fit; a value is one batch's.
    n_steps, n_tokens : int
        Steps done and tokens seen.
    failure : str, optional
        Why a member of an ensemble stopped at `n_steps`; a fit of its own raises instead.
    """

    model: SparseDictionary
    history: dict[str, list[float | int]] = field(repr=False)  # up to 1,200 numbers
    n_steps: int
    n_tokens: int
    failure: str | None = None


class NoiseFloorWarning(UserWarning):
    """A fit ended with the learned noise scale on its floor."""


@with_gradients
def fit(
    model: SparseDictionary,
    data: ActivationData,
    *,
    n_steps: int = 2_000,
    batch_size: int = 1_024,
    learning_rate: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    callbacks: Iterable[Callback] = (),
    schedule: Schedule | None = None,
    elbo: ELBO | None = None,
    objective: LossFunction | None = None,
    n_tokens: int | None = None,
    precision: Precision = "float32",
    compile: bool | None = None,
    resume: str | Path | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> FitResult:
    """Fit `model` to `data` in place by maximising the ELBO with Adam.

    Parameters
    ----------
    model : SparseDictionary
        Any dictionary, deterministic ones included. One that was never fitted takes its location
        and scales from the first tokens; a fitted one goes on from where it is.
    data : tensor, array, ActivationStore, synthetic source or iterable of batches
        Activations, (token, d_in). Finite ones are reshuffled at each pass. An iterator that
        ends early ends the fit, with a warning.
    n_steps, batch_size : int
        Steps, and tokens in each.
    learning_rate : float, optional
        Adam's, relative to the data's scale for parameters in units of the activations; the
        model's `default_learning_rate` where None.
    seed : int, default 0
        Of the order of the data and of sampled ELBOs. Numbers that an iterator draws from torch's
        generators are the caller's, as if there were no fit.
    device : str or torch.device, optional
        Where to fit; a GPU where there is one, by default.
    callbacks : iterable of Callback
        Run after each step, in order.
    schedule : Schedule, optional
        Warm-up of the KL term, and the course of the learning rate and of the noise floor; the
        family's own where None.
    elbo : pyro.infer.ELBO, optional
        Any Pyro ELBO, on the model's Pyro programs, instead of the closed form. A model whose
        decoder is not linear uses `TraceMeanField_ELBO()`, which takes no spike-and-slab codes:
        their draws have no gradient.
    objective : callable, optional
        (model, x, kl_weight) -> Objective, instead of either: another loss, such as
        `probsae.lm.EndToEnd`. It is given whole batches as `data` deals them out.
    n_tokens : int, optional
        Size of the data set that the batches stand for, which weighs the prior of learned
        parameters; taken from the data where they have a size, else n_steps * batch_size.
    precision : {"float32", "tf32", "bfloat16"}
        Of the encoder's and decoder's products only; everything else stays float32.
    compile : bool, optional
        Whether to run the step through torch.compile; by default where that pays.
    resume : str or Path, optional
        Folder of a `Checkpoint` to go on from, with the same data and settings. Batches that it
        had are drawn again and passed over; `ContextActivations` leaves them out unmade.
    process_group : torch.distributed.ProcessGroup, optional
        Processes that take each step together, each with its rows of the batch: all call `fit`
        with the same arguments, on a device of their own, and end with the same model. Not for
        iterators, nor with an `objective`. The first one writes checkpoints and shows the bar.
    progress : bool, optional
        Show a bar; by default on terminals, for fits longer than two seconds.

    Returns
    -------
    FitResult
        The model, its history, and what was done.

    Raises
    ------
    ValueError, TypeError
        If an argument or the data are not usable; nothing is changed then.
    MemoryError
        If parameters, gradients and codes would not fit; nothing is changed then.
    NonFiniteElboError
        If the loss or a gradient stops being finite: names step and cause, and the model keeps
        the parameters of the last good step.

    Examples
    --------
    >>> import probsae as ps
    >>> data = ps.SyntheticActivations(d_in=16, n_features=24, n_active=2, seed=0)
    >>> model = ps.SpikeSlabDictionary(d_in=16, d_sae=32)
    >>> result = ps.fit(model, data, n_steps=20, batch_size=64)
    >>> result.n_tokens
    1280
    """
    check_model(model)
    require_full_precision(model)
    callbacks = check_callbacks(callbacks)
    if elbo is not None and not isinstance(elbo, ELBO):
        raise TypeError(f"elbo must be a pyro.infer.ELBO, got {type(elbo).__name__}")
    check_counts(n_steps, batch_size, n_tokens)
    # Numpy's integers are whole numbers, but neither torch's generators nor JSON take them.
    n_steps, batch_size, seed = (
        operator.index(n_steps),
        operator.index(batch_size),
        check_seed(seed),
    )
    if elbo is not None and objective is not None:
        raise ValueError("pass either elbo or objective, not both: each is the whole loss")
    device = choose_device(device)
    schedule = schedule or Schedule(**model.schedule_defaults)
    learning_rate = check_rate(
        model.default_learning_rate if learning_rate is None else learning_rate
    )
    check_precision(precision)
    settings = {"batch_size": batch_size, "learning_rate": learning_rate}
    processes = Processes(process_group)
    if processes.size > 1 and objective is not None:
        raise ValueError("an objective takes whole batches, which several processes do not have")
    check_divides(
        processes, data, batch_size, [describe(model), n_steps, seed, settings, schedule], device
    )
    n_own = batch_size // processes.size
    n_done = 0
    if resume is not None:
        n_done = steps_done(resume, model, {"n_steps": n_steps, "seed": seed, **settings})
    check_fit_memory(model, piece_tokens(model, n_own), device)
    first, stream = open_data(
        data, batch_size, n_steps, seed, device, model.d_in, n_done, processes
    )
    if processes.size > 1:
        total = f"{len(first)} first tokens, whose numbers sum to {first.double().sum():.12g}"
        processes.check_same("data", total, device)
    model.to(device)
    is_closed = elbo is None and objective is None and model.has_linear_decoder
    check_hooks(model, is_sampled=not is_closed)
    if objective is None and not is_closed:
        elbo = TraceMeanField_ELBO() if elbo is None else elbo
        check_draws(model, elbo)
    scales = FirstScales(model, first)
    processes.share_(model.state_dict().values())
    model.n_tokens = operator.index(n_tokens or size_of(data) or n_steps * batch_size)
    optimizer = adam(model, unit=typical_code_size(first - model.b_dec.detach()))
    state = FitState(model, optimizer, data, n_steps, device, seed)
    state.settings, state.processes = settings, processes
    own_seed = seed if processes.is_first else stream_seed(f"rank {processes.rank}", seed)
    with (
        seeded(own_seed, device) as numbers,
        products_in(model, precision),
        shared_by(model, processes),
    ):
        step = training_step(model, elbo, compile, n_own, n_steps, objective)
        model.train()
        single = _SingleFit(state, step, schedule, learning_rate, callbacks, scales)
        try:
            if resume is not None:
                load_checkpoint(resume, state)
                load_random_state(resume, device, processes)
            is_shown = progress if processes.is_first else False
            with progress_bar(n_steps, state.step, type(model).__name__, is_shown) as bar:
                run(single, numbers.drawn_outside(stream), bar)
        except BaseException:
            if state.step == 0:
                scales.undo()
            tell_of_failure((callback, state) for callback in single.callbacks)
            raise
        finally:
            model.noise_factor.fill_(1.0)
            model.eval()
    warn_of_binding_floor(model)
    return FitResult(model, state.history, state.step, state.n_tokens)


class _SingleFit(Fits):
    """One model's fit, step by step."""

    def __init__(
        self,
        state: FitState,
        step: Step,
        schedule: Schedule,
        learning_rate: float,
        callbacks: list[Callback],
        scales: FirstScales,
    ):
        self.state, self.take_gradient, self.schedule = state, step, schedule
        self.learning_rate, self.callbacks, self.scales = learning_rate, callbacks, scales
        self.n_steps, self.device = state.n_steps, state.device
        self.kl_weight = torch.ones((), device=state.device)
        self.guard = FiniteGuard(state)

    @property
    def step(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.state.step

    def start(self) -> None:
        for callback in self.callbacks:
            callback.on_start(self.state)

    def prepare(self) -> None:
        state, schedule = self.state, self.schedule
        self.kl_weight.fill_(schedule.kl_weight(state.step, state.n_steps))
        state.is_warm = schedule.is_warm(state.step, state.n_steps)
        _set_rates(state, schedule, self.learning_rate)
        if state.model.learn_noise:
            factor, is_bad = state.model.noise_factor, self.guard.flag
            scheduled = schedule.noise_factor(state.step, state.n_steps)
            factor.copy_(torch.where(is_bad > 0, factor, scheduled))

    def advance(self, x: Tensor) -> None:
        self.state.batch = x
        state = self.state
        shown = self.take_gradient(state.model, x, self.kl_weight, state.objective)
        state.objective = average_step(state.model, shown, state.processes)
        self.state.n_tokens += len(x) * state.processes.size
        self.guard.watch()
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()

    def check(self) -> None:
        self.guard.check()
        self.scales.forget()

    def settle(self) -> None:
        self.state.model.normalize_()
        self.state.step += 1

    def show(self, bar: tqdm) -> None:
        objective = self.state.objective
        assert objective is not None
        row = {name: float(getattr(objective, name)) for name in SHOWN}
        self.state.log(row | {"kl_weight": float(self.kl_weight)})
        bar.set_postfix(elbo=f"{row['elbo']:.1f}", fvu=f"{row['fvu']:.3f}", l0=f"{row['l0']:.1f}")

    def call_back(self) -> None:
        for callback in self.callbacks:
            callback.on_step(self.state)

    def end(self) -> None:
        for callback in self.callbacks:
            callback.on_end(self.state)


SHOWN = ("loss", "elbo", "fvu", "l0")
"""What a history holds of an `Objective`."""


def warn_of_binding_floor(model: SparseDictionary) -> None:
    """Say so where the noise scale ended on its floor: the posterior is then as wide as that."""
    floor = float(model.noise_floor)
    if model.learn_noise and float(model.noise_scale.detach()) <= 1.001 * floor:
        warnings.warn(
            f"the learned noise scale lies on its floor, {floor:.3g}: the dictionary explains the "
            "data better than that, and p_active and intervals are those of noise at the floor; "
            "pass a smaller noise_floor for sharper ones",
            NoiseFloorWarning,
            stacklevel=5,  # the decorator has two frames
        )


def _set_rates(state: FitState, schedule: Schedule, learning_rate: float) -> None:
    rate = learning_rate * schedule.rate(state.step, state.n_steps)
    is_warm = schedule.is_warm(state.step, state.n_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["factor"] if is_warm or not group["waits"] else 0.0
