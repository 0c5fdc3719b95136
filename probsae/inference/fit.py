"""The only training loop: stochastic variational inference of any dictionary."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor
from tqdm.auto import tqdm

from probsae.activations.source import ActivationData, batches, check_activations, size_of
from probsae.inference.callbacks import Callback, FitState, load_checkpoint
from probsae.inference.running_dictionary import RunningDictionary
from probsae.inference.schedule import Schedule
from probsae.inference.step import LossFunction, Precision, Step, products_in, training_step
from probsae.models.base import SparseDictionary
from probsae.models.code_priors import typical_code_size

# Tokens that set location and scales before the first step: the deviation of a mean over them
# is 1.5% of the data's, well inside what the first hundred steps move.
_N_INITIAL_TOKENS = 4096
# Steps between two looks at the device: rarer than this and a failed run wastes minutes.
_CHECK_EVERY = 50


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
    """

    model: SparseDictionary
    history: dict[str, list[float | int]]
    n_steps: int
    n_tokens: int


class NonFiniteElboError(FloatingPointError):
    """A fit met NaN or infinity; the model keeps its parameters of the last good step."""


class NoiseFloorWarning(UserWarning):
    """A fit ended with the learned noise scale on its floor."""


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
        Of the order of the data and of sampled ELBOs. The caller's generators are not touched.
    device : str or torch.device, optional
        Where to fit; a GPU where there is one, by default.
    callbacks : iterable of Callback
        Run after each step, in order.
    schedule : Schedule, optional
        Warm-up of the KL term, and the course of the learning rate and of the noise floor; the
        family's own where None.
    elbo : pyro.infer.ELBO, optional
        Any Pyro ELBO, on the model's Pyro programs, instead of the closed form. A model whose
        decoder is not linear uses `TraceMeanField_ELBO()`.
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
        Folder of a `Checkpoint` to go on from, with the same data and settings.
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
    for name, value in (("n_steps", n_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if elbo is not None and objective is not None:
        raise ValueError("pass either elbo or objective, not both: each is the whole loss")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    schedule = schedule or Schedule(**model.schedule_defaults)
    learning_rate = model.default_learning_rate if learning_rate is None else learning_rate
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    first, stream = _open(data, batch_size, n_steps, seed, device, model.d_in)
    model.to(device)
    model.initialize_(first)
    model.n_tokens = n_tokens or size_of(data) or n_steps * batch_size
    optimizer = _adam(model, unit=typical_code_size(first - model.b_dec.detach()))
    state = FitState(model, optimizer, data, n_steps, device, seed)
    step = training_step(model, elbo, compile, batch_size, n_steps, objective)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), products_in(model, precision):
        torch.manual_seed(seed)
        if resume is not None:
            load_checkpoint(resume, state)
            stream = itertools.islice(stream, state.step, None)
        model.train()
        try:
            _run(state, stream, step, schedule, learning_rate, list(callbacks), progress)
        finally:
            model.noise_factor.fill_(1.0)
            model.eval()
    _warn_of_binding_floor(model)
    return FitResult(model, state.history, state.step, state.step * batch_size)


def _run(
    state: FitState,
    stream: Iterator[Tensor],
    step: Step,
    schedule: Schedule,
    learning_rate: float,
    callbacks: list[Callback],
    progress: bool | None,
) -> None:
    """Take the steps from `state.step` to `state.n_steps`."""
    guard = _FiniteGuard(state)
    kl_weight = torch.ones((), device=state.device)
    log_every = max(1, state.n_steps // 200)
    for callback in callbacks:
        callback.on_start(state)
    bar = tqdm(
        total=state.n_steps,
        initial=state.step,
        desc=type(state.model).__name__,
        unit="step",
        delay=2,
        disable=None if progress is None else not progress,
    )
    with bar:
        for x in itertools.islice(stream, state.n_steps - state.step):
            kl_weight.fill_(schedule.kl_weight(state.step, state.n_steps))
            state.is_warm = schedule.is_warm(state.step, state.n_steps)
            _set_rates(state, schedule, learning_rate)
            if state.model.learn_noise:
                state.model.noise_factor.fill_(schedule.noise_factor(state.step, state.n_steps))
            state.batch = x
            state.objective = step(state.model, x, kl_weight)
            guard.watch()
            state.optimizer.step()
            state.optimizer.zero_grad()
            is_last = state.step + 1 == state.n_steps
            if state.device.type == "cpu" or (state.step + 1) % _CHECK_EVERY == 0 or is_last:
                guard.check()  # before anything else touches the parameters
            state.model.normalize_()
            if schedule.follows_closed_form(state.step, state.n_steps):
                _update_dictionary(state, schedule, guard.flag == 0)
            state.step += 1
            bar.update()
            if state.step % log_every == 0 or is_last:
                _log(state, kl_weight, bar)
            for callback in callbacks:
                callback.on_step(state)
    if state.step < state.n_steps:
        warnings.warn(
            f"the data ended after {state.step} of {state.n_steps} steps, and so did the fit; "
            "pass a tensor or a store to have several passes",
            stacklevel=3,
        )
    for callback in callbacks:
        callback.on_end(state)


def _update_dictionary(state: FitState, schedule: Schedule, is_good: Tensor) -> None:
    """Let the dictionary follow its closed form, where that is cheap enough."""
    if state.running_dictionary is None:
        state.running_dictionary = RunningDictionary(state.model)
    assert state.batch is not None
    assert state.objective is not None
    rate = schedule.rate(state.step, state.n_steps)
    state.running_dictionary.update(state.step, state.batch, state.objective, rate, is_good)


def _warn_of_binding_floor(model: SparseDictionary) -> None:
    """Say so where the noise scale ended on its floor: the posterior is then as wide as that."""
    floor = float(model.noise_floor)
    if model.learn_noise and float(model.noise_scale.detach()) <= 1.001 * floor:
        warnings.warn(
            f"the learned noise scale lies on its floor, {floor:.3g}: the dictionary explains the "
            "data better than that, and p_active and intervals are those of noise at the floor; "
            "pass a smaller noise_floor for sharper ones",
            NoiseFloorWarning,
            stacklevel=3,
        )


class _FiniteGuard:
    """Keeps the first bad step, and all after it, from changing parameters; no host wait.

    Fused Adam skips its update where `found_inf` is 1, on the device. The flag is sticky, so when
    the host looks, the parameters are still those before the first bad step.
    """

    def __init__(self, state: FitState):
        self.state = state
        self.flag = torch.zeros((), device=state.device)
        self.first_bad_step = torch.zeros((), device=state.device)
        self.good_buffers = self._buffers()
        optimizer: Any = state.optimizer
        optimizer.found_inf = self.flag  # read by fused Adam

    def _buffers(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state.model.named_buffers()}

    def watch(self) -> None:
        """Raise the flag if this step's loss or a gradient is not finite."""
        objective = self.state.objective
        assert objective is not None
        gradients = [p.grad for p in self.state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        is_bad = ~(torch.isfinite(norm) & torch.isfinite(objective.loss))
        self.first_bad_step += (self.flag == 0) * is_bad * (self.state.step + 1)
        torch.maximum(self.flag, is_bad.to(self.flag.dtype), out=self.flag)

    def check(self) -> None:
        """Look at the flag; stop the fit if it is up."""
        if not bool(self.flag):
            if self.state.step % _CHECK_EVERY == 0:
                self.good_buffers = self._buffers()
            return
        step = int(self.first_bad_step)
        cause = _cause(self.state, step)
        for name, value in self.state.model.named_buffers():
            if not bool(torch.isfinite(value).all()):
                value.copy_(self.good_buffers[name])
        self.state.step = step - 1
        raise NonFiniteElboError(
            f"step {step}: {cause}. The model keeps its parameters of step {step - 1}. Look for "
            "extreme values in the data, or try a lower learning_rate or a longer warm-up."
        )


def _cause(state: FitState, step: int) -> str:
    """Name what is not finite, from the batch at hand and the kept parameters."""
    assert state.batch is not None
    assert state.objective is not None
    if not bool(torch.isfinite(state.batch).all()):
        return "the activations hold NaN or infinity"
    for name in ("log_likelihood", "kl", "auxiliary"):
        value = getattr(state.objective, name)
        if not bool(torch.isfinite(value).all()):
            return f"the ELBO is not finite, and the cause is its term {name} = {float(value)}"
    return "the ELBO is finite, but a gradient is not"


def _open(
    data: ActivationData, batch_size: int, n_steps: int, seed: int, device: torch.device, d_in: int
) -> tuple[Tensor, Iterator[Tensor]]:
    """Return the first tokens, and a stream of batches that still begins with them."""
    stream = batches(data, batch_size, seed=seed, device=device)
    n_first = min(n_steps, -(-_N_INITIAL_TOKENS // batch_size))
    head = list(itertools.islice(stream, n_first))
    if not head:
        raise ValueError("data must hold at least one batch, got an empty iterator")
    return check_activations(torch.cat(head), d_in), itertools.chain(head, stream)


def _adam(model: SparseDictionary, unit: float) -> torch.optim.Adam:
    """Group parameters by unit and by whether they wait for the KL warm-up.

    `unit` is a code's likely size, that of dimensional parameters' learning rates.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    factors = model.learning_rate_factors
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = factors.get(name, 1.0) * (unit if name in model.dimensional else 1.0)
            key = (factor, name in model.frozen_in_warmup)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.Adam(
        [
            {"params": parameters, "factor": factor, "waits": waits}
            for (factor, waits), parameters in groups.items()
        ],
        lr=1.0,
        betas=model.adam_betas,
        fused=True,
    )


def _set_rates(state: FitState, schedule: Schedule, learning_rate: float) -> None:
    rate = learning_rate * schedule.rate(state.step, state.n_steps)
    is_warm = schedule.is_warm(state.step, state.n_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["factor"] if is_warm or not group["waits"] else 0.0


def _log(state: FitState, kl_weight: Tensor, bar: tqdm) -> None:
    objective = state.objective
    assert objective is not None
    row = {
        "step": state.step,
        "loss": float(objective.loss),
        "elbo": float(objective.elbo),
        "fvu": float(objective.fvu),
        "l0": float(objective.l0),
        "kl_weight": float(kl_weight),
    }
    for name, value in row.items():
        state.history.setdefault(name, []).append(value)
    bar.set_postfix(elbo=f"{row['elbo']:.1f}", fvu=f"{row['fvu']:.3f}", l0=f"{row['l0']:.1f}")
