"""What a long loop computed of each batch, kept in a folder: a loop that was killed goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from probsae.activations.shards import write_bytes

_SETTINGS = "settings.json"


class KeptBatches:
    """Tensors by name, in a folder that keeps to the settings it was begun with.

    Parameters
    ----------
    path : Path or None
        The folder; None keeps nothing.
    settings : dict
        What the batches depend on, JSON-ready.

    Raises
    ------
    ValueError
        If the folder was begun with other settings.
    FileExistsError
        If the folder holds anything else.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path = path
        if path is None:
            return
        settings = json.loads(json.dumps(settings))
        if (path / _SETTINGS).exists():
            _check_settings(path, settings)
            return
        # A kill may have left an unfinished file of its own.
        if path.exists() and any(file.suffix != ".tmp" for file in path.iterdir()):
            raise FileExistsError(
                f"{path} is not empty and holds no checkpoint; choose another folder"
            )
        path.mkdir(parents=True, exist_ok=True)
        write_bytes(path / _SETTINGS, json.dumps(settings, indent=1).encode())

    def once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what is kept under `name`; make and keep it where nothing is."""
        if self.path is None:
            return make()
        if not self._file(name).exists():
            self.keep(name, make())
        return load_file(self._file(name))

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors; at any moment the file is absent or whole."""
        if self.path is not None:
            cpu = {key: value.cpu().contiguous() for key, value in tensors.items()}
            write_bytes(self._file(name), save(cpu))

    def first(self, name: str) -> list[dict[str, Tensor]]:
        """Return what is kept under `name`-0, `name`-1, ... up to the first that is not there."""
        found = []
        while self.path is not None and self._file(f"{name}-{len(found)}").exists():
            found.append(load_file(self._file(f"{name}-{len(found)}")))
        return found

    def _file(self, name: str) -> Path:
        assert self.path is not None
        return self.path / f"{name}.safetensors"


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    before = json.loads((path / _SETTINGS).read_text())
    others = [
        f"{key} {before.get(key)} and not {settings.get(key)}"
        for key in {**before, **settings}
        if before.get(key) != settings.get(key)
    ]
    if others:
        raise ValueError(
            f"{path} was begun with other settings ({'; '.join(others)}); go on with the same "
            "ones, or choose another folder"
        )


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the values of tensors behind each other, one at a time."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
