"""Which known features a fit has learned, unlearned, kept and moved, and what died."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probsae.inference.callbacks import Callback, FitState
from probsae.inference.wandb_logger import WandbLogger
from probsae.metrics.recovery import Nearest, nearest_features

_TERMS = ("loss", "elbo", "log_likelihood", "kl", "auxiliary", "fvu", "l0")
_COUNTS = ("n_learned", "n_newly_learned", "n_unlearned", "n_kept", "n_moved", "n_dead")
_MEANS = ("mmcs", "cosine_change")


class FeatureTracker(Callback):
    """Follow known features through a fit: learned, unlearned, kept in place, moved; and the dead.

    A known feature is learned where its largest cosine with a dictionary entry is above
    `threshold`; that entry is its place. A look costs one product of the two dictionaries, about
    feature / (5 batch_size) of a step, and waits for the device once.

    Parameters
    ----------
    features : Tensor, shape (feature, d_in)
        Known directions, for instance `SyntheticActivations.features`, or another fit's dictionary.
    every : int, default 100
        Steps between two looks.
    threshold : float, default 0.9
        Cosine from which a known feature counts as learned.
    dead_rate : float, default 1e-5
        Mean p_active below which an entry counts as dead.
    dead_after_tokens : int, default 100,000
        Tokens over which that mean is taken: the last looks that make up as many, or all so far.
    path : str or Path, optional
        NetCDF file to write the history to, with each feature's cosine and place at each look.
        It is written at looks 1, 2, 4, 8... and at the end, each time whole: what stands there is
        always complete.
    logger : WandbLogger, optional
        Also log each look to its run, as `features/<name>`. It must be a callback of the same fit,
        and come before this one.

    Attributes
    ----------
    history : dict of lists, one entry a look
        `step`; of the known features `mmcs`, `n_learned`, and since the last look
        `n_newly_learned`, `n_unlearned`, `n_kept` (learned at both, in the same entry), `n_moved`
        (learned at both, in another entry) and `cosine_change` (mean absolute change of the
        largest cosine: of how far they are represented); of the entries `n_dead`; of the step
        `loss`, `elbo`, `log_likelihood` (reconstruction), `kl` (or minus a log prior, such as an
        L1 term) and `auxiliary`, nats per token, `fvu` and `l0`.

    Raises
    ------
    ValueError
        If an argument is outside its range; at the first look, if the widths differ.

    Examples
    --------
    >>> import probsae as ps
    >>> data = ps.SyntheticActivations(d_in=16, n_features=24, n_active=2, seed=0)
    >>> tracker = FeatureTracker(data.features, every=10)
    >>> result = ps.fit(ps.TopKSAE(16, 32, k=2), data, n_steps=20, callbacks=[tracker])
    >>> tracker.history["step"]
    [10, 20]
    """

    def __init__(
        self,
        features: Float[Tensor, "feature d_in"],
        every: int = 100,
        threshold: float = 0.9,
        dead_rate: float = 1e-5,
        dead_after_tokens: int = 100_000,
        path: str | Path | None = None,
        logger: WandbLogger | None = None,
    ):
        if every < 1 or dead_after_tokens < 1:
            raise ValueError(
                f"every and dead_after_tokens must be at least 1, got {every} and "
                f"{dead_after_tokens}"
            )
        self.features, self.every, self.threshold = features, every, threshold
        self.path, self.logger = None if path is None else Path(path), logger
        self.history: dict[str, list[float | int]] = {
            name: [] for name in ("step", *_COUNTS, *_MEANS, *_TERMS)
        }
        self._firing = _Firing(dead_rate, dead_after_tokens)
        self._last: Nearest | None = None
        self._looks: list[Nearest] = []

    def on_step(self, state: FitState) -> None:
        assert state.objective is not None
        assert state.batch is not None
        n_tokens = len(state.batch) * state.processes.size
        self._firing.add(state.objective.firing_rate, n_tokens)
        if state.step % self.every == 0 or state.step == state.n_steps:
            self._look(state)

    def _look(self, state: FitState) -> None:
        now = nearest_features(state.model.dictionary(), self.features.to(state.device))
        values = self._compare(now, self._last or now)
        values["n_dead"] = self._firing.is_dead().sum()
        values |= {name: getattr(state.objective, name) for name in _TERMS}
        # One tensor, so that the host waits for the device once.
        numbers = torch.stack([v.double() for v in values.values()]).tolist()
        row = {
            name: int(value) if name in _COUNTS else value
            for name, value in zip(values, numbers, strict=True)
        }
        for name, value in {"step": state.step, **row}.items():
            self.history[name].append(value)
        self._last = now
        if not state.processes.is_first:
            return
        if self.logger is not None:
            self.logger.log({f"features/{k}": v for k, v in row.items()}, state.step)
        if self.path is not None:
            self._looks.append(Nearest(*(value.cpu() for value in now)))
            if len(self._looks).bit_count() == 1:
                self._write(self.path)

    def _compare(self, now: Nearest, before: Nearest) -> dict[str, Tensor]:
        is_learned, was_learned = now.cosine > self.threshold, before.cosine > self.threshold
        if not self.history["step"]:
            was_learned = torch.zeros_like(is_learned)
        is_in_place = now.learned == before.learned
        both = is_learned & was_learned
        return {
            "n_learned": is_learned.sum(),
            "n_newly_learned": (is_learned & ~was_learned).sum(),
            "n_unlearned": (was_learned & ~is_learned).sum(),
            "n_kept": (both & is_in_place).sum(),
            "n_moved": (both & ~is_in_place).sum(),
            "mmcs": now.cosine.mean(),
            "cosine_change": (now.cosine - before.cosine).abs().mean(),
        }

    def on_end(self, state: FitState) -> None:
        if self.path is not None and self._looks:
            self._write(self.path)

    def _write(self, path: Path) -> None:
        """Write the file beside its place and move it there."""
        import xarray as xr  # slow to import, and only a file needs it

        looks = {
            "cosine": [k.cosine for k in self._looks],
            "entry": [k.learned for k in self._looks],
        }
        data = xr.Dataset(
            {
                **{name: ("step", v) for name, v in self.history.items() if name != "step"},
                **{n: (("step", "feature"), torch.stack(v).numpy()) for n, v in looks.items()},
            },
            coords={"step": self.history["step"]},
            attrs={"threshold": self.threshold},
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            data.to_netcdf(partial, engine="h5netcdf")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


class _Firing:
    """Mean p_active of each entry over the last tokens, in blocks from look to look."""

    def __init__(self, dead_rate: float, n_tokens: int):
        self.dead_rate, self.n_tokens = dead_rate, n_tokens
        self._blocks: deque[tuple[Tensor, int]] = deque()
        self._open: tuple[Tensor, int] | None = None

    def add(self, rate: Float[Tensor, " d_sae"], n_tokens: int) -> None:
        """Count a step."""
        total = rate * n_tokens
        if self._open is not None:
            total, n_tokens = self._open[0] + total, self._open[1] + n_tokens
        self._open = (total, n_tokens)

    def is_dead(self) -> Bool[Tensor, " d_sae"]:
        """Close the block, forget those that are not needed, and say which entries are dead."""
        assert self._open is not None
        self._blocks.append(self._open)
        self._open = None
        n_seen = sum(n for _, n in self._blocks)
        while n_seen - self._blocks[0][1] >= self.n_tokens:
            n_seen -= self._blocks.popleft()[1]
        return torch.stack([total for total, _ in self._blocks]).sum(0) / n_seen < self.dead_rate
