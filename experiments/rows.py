"""Rows of results, each kept as it is made, in a folder that keeps to its settings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from experiments.calibration.measure import finite


class Rows(dict[str, Any]):
    """What results.json of a folder holds; a run that was killed goes on from there.

    Parameters
    ----------
    out, settings, free
        As for `keep_settings`.
    device : str, default "cpu"
        Whose generator is left alone.
    """

    def __init__(
        self, out: Path, settings: dict[str, Any], free: Collection[str] = (), device: str = "cpu"
    ):
        keep_settings(out, settings, free)
        self.file = out / "results.json"
        self.cuda = [device] if device.startswith("cuda") else []
        super().__init__(json.loads(self.file.read_text()) if self.file.exists() else {})

    def make(self, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """Make and keep a row that is not there yet; its draws do not depend on other rows'."""
        if name in self:
            return
        with torch.random.fork_rng(devices=self.cuda):
            torch.manual_seed(0)
            self[name] = finite(make())
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self, indent=1) + "\n")
        os.replace(new, self.file)


def keep_settings(out: Path, values: dict[str, Any], free: Collection[str] = ()) -> None:
    """Write the settings to a folder that has none yet; refuse others than it was begun with.

    Parameters
    ----------
    out : Path
        The folder, with results.json and settings.json.
    values : dict
        Settings, JSON-ready.
    free : collection of str
        Those that change no row, or that rows are named by.

    Raises
    ------
    ValueError
        If rows of the folder would not be what these settings give.
    """
    file = out / "settings.json"
    if not file.exists():
        if (out / "results.json").exists():
            raise ValueError(f"{out} does not say its settings; pass another --out")
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values, indent=1) + "\n")
    before = json.loads(file.read_text())
    others = [
        f"{key} {before.get(key)} and not {value}"
        for key, value in json.loads(json.dumps(values)).items()
        if key not in free and before.get(key) != value
    ]
    if others:
        raise ValueError(
            f"{out} was begun with other settings ({'; '.join(others)}): its rows would not be "
            "comparable; pass the same ones, or another --out"
        )
