"""The only training loop; `fit` drives one model with it, `fit_ensemble` many."""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from tqdm.auto import tqdm

from probsae.inference.allocator import kept_memory

# Steps between two looks at the device: rarer than this and a failed run wastes minutes.
CHECK_EVERY = 50


class Fits(ABC):
    """Fits that take their steps together: one model's, or an ensemble's.

    Attributes
    ----------
    step, n_steps : int
        Steps done, and to do.
    device : torch.device
        Where they run.
    """

    step: int
    n_steps: int
    device: torch.device
    has_stopped = False
    """Whether nothing is left to train, so that the loop may end."""

    @abstractmethod
    def start(self) -> None:
        """Tell the callbacks."""

    @abstractmethod
    def prepare(self) -> None:
        """Set KL weights, learning rates and noise floors for the next step."""

    @abstractmethod
    def advance(self, x: Tensor) -> None:
        """Take one step; what is not finite changes nothing, and nothing waits for the device."""

    @abstractmethod
    def check(self) -> None:
        """Look whether all is finite; waits for the device."""

    @abstractmethod
    def settle(self) -> None:
        """Normalise the dictionaries and count the step."""

    @abstractmethod
    def show(self, bar: tqdm) -> None:
        """Write a line of the history; waits for the device."""

    @abstractmethod
    def call_back(self) -> None:
        """Run the callbacks."""

    @abstractmethod
    def end(self) -> None:
        """Tell the callbacks."""


def run(fits: Fits, stream: Iterator[Tensor], bar: tqdm) -> None:
    """Take the steps from `fits.step` to `fits.n_steps`, or as many as there are batches."""
    with kept_memory() if fits.device.type == "cpu" else nullcontext():
        _run(fits, stream, bar)


def _run(fits: Fits, stream: Iterator[Tensor], bar: tqdm) -> None:
    log_every = max(1, fits.n_steps // 200)
    is_shown = True
    fits.start()
    for x in itertools.islice(stream, fits.n_steps - fits.step):
        fits.prepare()
        fits.advance(x)
        is_last = fits.step + 1 == fits.n_steps
        if fits.device.type == "cpu" or (fits.step + 1) % CHECK_EVERY == 0 or is_last:
            fits.check()  # before anything else touches the parameters
            if fits.has_stopped:
                return
        fits.settle()
        bar.update()
        is_shown = fits.step % log_every == 0 or is_last
        if is_shown:
            fits.show(bar)
        fits.call_back()
    if fits.step < fits.n_steps:
        fits.check()  # steps since the last look
        if fits.has_stopped:
            return
        if not is_shown:
            fits.show(bar)
        warnings.warn(
            f"the data ended after {fits.step} of {fits.n_steps} steps, and so did the fit; "
            "pass a tensor or a store to have several passes",
            stacklevel=6,  # two frames are those of `with_gradients`
        )
    fits.end()


def progress_bar(n_steps: int, initial: int, name: str, progress: bool | None) -> tqdm:
    """Return a bar that shows on terminals only, and after two seconds, unless `progress` says."""
    return tqdm(
        total=n_steps,
        initial=initial,
        desc=name,
        unit="step",
        delay=2,
        disable=None if progress is None else not progress,
    )
