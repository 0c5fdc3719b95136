"""What may watch a fit, or act on it, between two steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from probsae.inference.elbo import Objective
from probsae.models.base import SparseDictionary
from probsae.models.files import (
    DICTIONARY_FILES,
    atomic_write,
    check_replaceable,
    describe,
    save_dictionary,
)
from probsae.processes import ALONE, Processes

CHECKPOINT_FILES = (*DICTIONARY_FILES, "optimizer.safetensors", "fit.json")
"""Names of a checkpoint's files."""
_KEPT, _OBJECTIVE = "kept.", "objective."
_CPU_RANDOM, _GPU_RANDOM = "rng", "cuda_rng"


@dataclass
class FitState:
    """Where a fit stands; callbacks read it and may change the model or the optimiser in place."""

    model: SparseDictionary
    optimizer: torch.optim.Optimizer
    data: Any
    n_steps: int
    device: torch.device
    seed: int
    step: int = 0
    """Steps done so far."""
    n_tokens: int = 0
    """Tokens they took."""
    is_warm: bool = False
    """Whether the KL weight has reached 1."""
    batch: Float[Tensor, "token d_in"] | None = None
    """The step's activations."""
    objective: Objective | None = None
    """The last step's losses, detached tensors on the device: reading one waits for the device."""
    is_bad: Tensor | None = None
    """On the device: 1 from the first step on whose loss or gradient was not finite, else 0. The
    host looks at it every 50 steps on a GPU; a callback that changes the model at each step must
    leave it alone where this is 1."""
    settings: dict[str, float | int] = field(default_factory=dict)
    """What else a fit depends on beside model and data: a resumed one must have the same."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """What callbacks count on the way, by name; a checkpoint holds it for the fit that goes on."""
    history: dict[str, list[float | int]] = field(default_factory=dict)
    """Values logged so far; see `FitResult.history`."""
    processes: Processes = ALONE
    """Those that share the fit. Each runs the callbacks: with the same model and objective, with
    its rows of the batch. What writes is for the one that `is_first`."""

    def has_failed(self) -> bool:
        """Whether a step was not finite, and the host has yet to see it; waits for the device."""
        return self.is_bad is not None and bool(self.is_bad)

    def log(self, values: dict[str, float]) -> None:
        """Add a line to the history, under the number of steps done.

        Parameters
        ----------
        values : dict of str to float
            By name; the same names at each call, or the history's lists differ in length.
        """
        for name, value in {"step": self.step, **values}.items():
            self.history.setdefault(name, []).append(value)


class Callback:
    """Base of callbacks; override what you need.

    Each method is given the fit's `FitState`.
    """

    def on_start(self, state: FitState) -> None:
        """Run before the first step."""

    def on_step(self, state: FitState) -> None:
        """Run after each step; keep it cheap, and do not read tensors at every step on a GPU."""

    def on_end(self, state: FitState) -> None:
        """Run after the last step; not run when the fit fails."""

    def on_failure(self, state: FitState) -> None:
        """Run when the fit ends by an error or is interrupted, before the error goes on."""


def tell_of_failure(listeners: Iterable[tuple[Callback, FitState]]) -> None:
    """Run `on_failure` of every callback, also after one that raises itself."""
    error = None
    for callback, state in listeners:
        try:
            callback.on_failure(state)
        except BaseException as raised:
            raised.__context__ = error or raised.__context__
            error = raised
    if error is not None:
        raise error


class Checkpoint(Callback):
    """Write model and optimiser every so many steps; `fit(..., resume=path)` goes on from there.

    It runs after all other callbacks, wherever it stands among them: what they do in its step is
    then in it.

    Parameters
    ----------
    path : str or Path
        Folder to write to. It holds either the last complete checkpoint or none: each one is
        written beside it and moved into place.
    every : int, default 500
        Steps between two checkpoints.

    Raises
    ------
    FileExistsError
        At the start of a fit, if the folder holds anything else.
    """

    def __init__(self, path: str | Path, every: int = 500):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.path, self.every = Path(path), every

    def on_start(self, state: FitState) -> None:
        check_replaceable(self.path, CHECKPOINT_FILES)

    def on_step(self, state: FitState) -> None:
        is_due = state.step % self.every == 0 or state.step == state.n_steps
        if is_due and not state.has_failed():
            save_checkpoint(self.path, state)


def save_checkpoint(path: Path, state: FitState) -> None:
    """Write everything that the next step depends on, as one folder, atomically.

    Of several processes the first one does.
    """
    random_states = _random_states(state.device, state.processes)
    if not state.processes.is_first:
        return
    optimizer = state.optimizer.state_dict()["state"]
    tensors = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, moments in optimizer.items()
        for name, value in moments.items()
    }
    # Parameters of an ensemble's member share one count of steps, and a file takes each on its own.
    tensors = {name: v.clone() if v.ndim == 0 else v for name, v in tensors.items()}
    tensors |= {f"{_KEPT}{name}": value.cpu() for name, value in state.kept.items()}
    if state.objective is not None:  # which way a step is taken depends on the one before
        shown = state.objective._asdict()
        tensors |= {f"{_OBJECTIVE}{name}": value.cpu() for name, value in shown.items()}
    tensors |= random_states
    settings = {"n_steps": state.n_steps, "seed": state.seed, **state.settings}
    factors = [group["factor"] for group in state.optimizer.param_groups]
    progress = {
        "step": state.step,
        "n_tokens": state.n_tokens,
        "settings": settings,
        "factors": factors,
    }
    with atomic_write(path, CHECKPOINT_FILES) as folder:
        save_dictionary(state.model, folder)
        save_file(tensors, folder / "optimizer.safetensors")
        (folder / "fit.json").write_text(json.dumps({**progress, "history": state.history}))


def check_checkpoint(path: str | Path) -> Path:
    """Return the path if there is a complete checkpoint.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    if not (Path(path) / "fit.json").exists():
        raise FileNotFoundError(f"no checkpoint at {path}: it needs fit.json; check the path")
    return Path(path)


def steps_done(
    path: str | Path, model: SparseDictionary, settings: Mapping[str, float | int]
) -> int:
    """Return the steps after which a checkpoint was made that a fit of `model` can go on from.

    Raises
    ------
    FileNotFoundError
        If there is no complete checkpoint at `path`.
    ValueError
        If it belongs to another model, seed, number of steps, batch size or rate.
    """
    path = check_checkpoint(path)
    saved = json.loads((path / "fit.json").read_text())
    for name, value in settings.items():
        if saved["settings"].get(name) != value:
            raise ValueError(
                f"the checkpoint at {path} was made with {name}={saved['settings'].get(name)}, "
                f"this fit has {value}; resume with the same settings"
            )
    config = json.loads((path / "config.json").read_text())
    own = json.loads(json.dumps(describe(model)))  # lists for tuples, as the file has them
    saved_arguments = config["hyperparameters"]  # older files lack what was added since
    own["hyperparameters"] = {
        k: v for k, v in own["hyperparameters"].items() if k in saved_arguments
    }
    for name in ("class", "hyperparameters"):
        if config[name] != own[name]:
            raise ValueError(
                f"the checkpoint at {path} is of a model whose {name} is {config[name]}, "
                f"and this one's is {own[name]}; resume with the same model"
            )
    return int(saved["step"])


def _random_states(device: torch.device, processes: Processes) -> dict[str, Tensor]:
    """Return where the processes' generators are, by the names that files have for them."""
    own = {_CPU_RANDOM: torch.get_rng_state()}
    if device.type == "cuda":
        own[_GPU_RANDOM] = torch.cuda.get_rng_state(device)
    return {
        _of_rank(name, rank): state.cpu()
        for name, value in own.items()
        for rank, state in enumerate(processes.gather(value.to(device)))
    }


def _of_rank(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name


def load_random_state(path: str | Path, device: torch.device, processes: Processes = ALONE) -> None:
    """Set torch's generators to where they were when a checkpoint was made.

    Those of a process that the checkpoint does not know are left where they are.
    """
    cpu, gpu = (_of_rank(name, processes.rank) for name in (_CPU_RANDOM, _GPU_RANDOM))
    with safe_open(Path(path) / "optimizer.safetensors", framework="pt") as tensors:
        known = set(tensors.keys())
        if cpu in known:
            torch.set_rng_state(tensors.get_tensor(cpu))
        if device.type == "cuda" and gpu in known:
            torch.cuda.set_rng_state(tensors.get_tensor(gpu), device)


def load_checkpoint(path: str | Path, state: FitState) -> None:
    """Set model, optimiser, step and history of `state` to those of a checkpoint that fits it."""
    path = Path(path)
    saved = json.loads((path / "fit.json").read_text())
    state.model.load_state_dict(load_file(path / "model.safetensors"))
    tensors = load_file(path / "optimizer.safetensors")
    tensors = {
        k: v for k, v in tensors.items() if k.split(".")[0] not in (_CPU_RANDOM, _GPU_RANDOM)
    }
    state.kept = _take_out(tensors, _KEPT, state.device)
    shown = _take_out(tensors, _OBJECTIVE, state.device)
    state.objective = Objective(**shown) if shown else None
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        moments.setdefault(int(index), {})[name] = value
    groups = state.optimizer.state_dict()["param_groups"]
    for group, factor in zip(groups, saved["factors"], strict=True):
        group["factor"] = factor  # in units of the data that the fit began with
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for parameter, values in state.optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                # Fused Adam pairs elements by their place in memory: strides must agree.
                values[name] = torch.empty_like(parameter).copy_(value)
    state.step, state.n_tokens = saved["step"], saved["n_tokens"]
    state.history = saved["history"]


def _take_out(tensors: dict[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    """Take what has this prefix out of `tensors`, and return it under the names without."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name).to(device) for name in names}
