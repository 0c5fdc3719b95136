"""Weights & Biases as a callback: online when logged in or asked, offline and silent otherwise."""

from __future__ import annotations

import os
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal, TypeAlias

from probsae.inference.callbacks import Callback, FitState

Mode: TypeAlias = Literal["online", "offline", "disabled"]


class WandbLogger(Callback):
    """Log a fit's elbo, fvu, l0 and noise scale to Weights & Biases.

    Parameters
    ----------
    project : str, default "probsae"
        Project to log to.
    every : int, default 50
        Steps between two log lines.
    mode : {"online", "offline", "disabled"}, optional
        Online where a wandb account is configured on this machine, offline otherwise.
    directory : str or Path, optional
        Where wandb writes its files; its own default where None.
    **settings
        Passed on to `wandb.init` (name, group, tags, config...).
    """

    def __init__(
        self,
        project: str = "probsae",
        every: int = 50,
        mode: Mode | None = None,
        directory: str | Path | None = None,
        **settings: Any,
    ):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.project, self.every, self.mode = project, every, mode
        self.directory, self.settings = directory, settings
        self.run: Any = None

    def on_start(self, state: FitState) -> None:
        if not state.processes.is_first:
            return
        import wandb  # slow to import, and only this module needs it

        mode: Mode = self.mode or ("online" if _is_logged_in() else "offline")  # pyright: ignore[reportAssignmentType]
        config = {
            "model": type(state.model).__name__,
            **state.model.hyperparameters(),
            "n_steps": state.n_steps,
            "seed": state.seed,
            **self.settings.get("config", {}),
        }
        if self.directory:
            Path(self.directory).mkdir(parents=True, exist_ok=True)  # wandb warns of none
        self.run = wandb.init(
            project=self.project,
            mode=mode,
            dir=str(self.directory) if self.directory else None,
            config=config,
            settings=wandb.Settings(silent=True),
            **{name: v for name, v in self.settings.items() if name != "config"},
        )

    def on_step(self, state: FitState) -> None:
        is_due = state.step % self.every == 0 or state.step == state.n_steps
        if not is_due or not state.processes.is_first:
            return
        objective = state.objective
        assert objective is not None
        values = {name: float(getattr(objective, name)) for name in ("elbo", "kl", "fvu", "l0")}
        values["loss"] = float(objective.loss)
        values["noise_scale"] = float(state.model.noise_scale.detach())
        self.log(values, state.step)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log values of one's own, between the start of a fit and its end.

        Parameters
        ----------
        values : dict of str to float
            By name.
        step : int
            Steps done so far, as in wandb's own `log`.

        Raises
        ------
        ValueError
            If the fit has not started this logger yet.
        """
        if self.run is None:
            raise ValueError(
                "nothing can be logged before the fit has started this logger: put it before "
                "the callbacks that log to it"
            )
        self.run.log(values, step=step)

    def on_end(self, state: FitState) -> None:
        if self.run is not None:
            self.run.finish()

    def on_failure(self, state: FitState) -> None:
        if self.run is not None:
            self.run.finish(exit_code=1)


def _is_logged_in() -> bool:
    """Whether an API key is at hand, without asking for one or reaching for the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, NetrcParseError):
        return False
