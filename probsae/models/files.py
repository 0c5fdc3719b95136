"""A dictionary on disk: model.safetensors and config.json; nothing is unpickled."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from probsae.activations.shards import sync
from probsae.models.base import SparseDictionary
from probsae.seeding import seeded

DICTIONARY_FILES = ("model.safetensors", "config.json")
"""Names of a saved dictionary's files."""


def check_replaceable(path: str | Path, names: Collection[str]) -> None:
    """Raise FileExistsError where `path` holds more than `names`, which replacing it would lose."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; choose a folder")
    others = sorted(p.name for p in path.iterdir() if p.name not in names) if path.exists() else []
    if others:
        more = ", ..." if len(others) > 3 else ""
        raise FileExistsError(
            f"{path} holds {', '.join(others[:3])}{more}, which writing it anew would delete; "
            "choose another folder"
        )


@contextmanager
def atomic_write(path: str | Path, names: Collection[str] | None = None) -> Iterator[Path]:
    """Yield a new folder that takes the place of `path` when the block ends well.

    After an error, or a kill before the block ends, `path` is what it was before; a kill between
    the two renames that replace it leaves the old folder in a hidden one beside it. What takes its
    place is on the disk then, so that a machine may stop at any time. An existing folder is
    replaced only if it holds nothing but `names`; None is for folders nobody else writes to.
    """
    path = Path(path)
    if names is not None:
        check_replaceable(path, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    folder = beside / "new"
    folder.mkdir()  # with the caller's permissions; mkdtemp's own are the user's alone
    try:
        yield folder
        for written in (*folder.rglob("*"), folder):
            sync(written)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if path.exists():
        os.replace(path, beside / "old")
    os.replace(folder, path)
    sync(path.parent)
    shutil.rmtree(beside)


def describe(model: SparseDictionary) -> dict[str, Any]:
    """Return what `rebuild` needs beside the tensors, JSON-ready."""
    return {
        "class": type(model).__name__,
        "probsae_version": version("probsae"),
        "hyperparameters": model.hyperparameters(),
        "n_tokens": model.n_tokens,
    }


def save_tensors(model: SparseDictionary, file: Path) -> None:
    """Write the model's tensors as safetensors."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)


def save_dictionary(model: SparseDictionary, folder: Path) -> None:
    """Write the two files of `model` into an existing folder."""
    save_tensors(model, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(describe(model), indent=2))


def save(model: SparseDictionary, path: str | Path) -> None:
    """Write `model` to the folder `path`, atomically.

    Parameters
    ----------
    model : SparseDictionary
        Any exported dictionary, fitted or not.
    path : str or Path
        Folder; replaced as a whole if it holds a saved dictionary.

    Raises
    ------
    FileExistsError
        If it holds anything else.
    TypeError
        If something else than a dictionary came, such as a fit's result or an estimator.
    """
    if not isinstance(model, SparseDictionary):
        raise TypeError(
            f"save takes a dictionary, got {type(model).__name__}; the one inside is a result's "
            "`model` or an estimator's `dictionary_`"
        )
    with atomic_write(path, DICTIONARY_FILES) as folder:
        save_dictionary(model, folder)


def load(path: str | Path, device: str | torch.device = "cpu") -> SparseDictionary:
    """Read a dictionary written by `save`, as the class that was saved.

    A class of your own must have been defined, or imported, before.

    Parameters
    ----------
    path : str or Path
        Folder with model.safetensors and config.json.
    device : str or torch.device, default "cpu"
        Where to put its tensors.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If a file is damaged, or names a class or shapes that do not fit.
    """
    path = Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (path / name).exists():
            raise FileNotFoundError(
                f"{path} must hold config.json and model.safetensors, and {name} is missing; "
                "pass the folder that `save` or `probsae fit` wrote"
            )
    try:
        config = json.loads((path / "config.json").read_text())
        tensors = load_file(path / "model.safetensors")
    except (ValueError, SafetensorError) as error:  # no JSON, or no text at all
        raise ValueError(f"{path} does not hold a readable dictionary: {error!r}") from error
    return rebuild(config, tensors, path, device)


def rebuild(
    config: Any, tensors: dict[str, Tensor], origin: Path, device: str | torch.device
) -> SparseDictionary:
    """Return the model that `describe` described, with its tensors; `origin` is for errors."""
    try:
        model_class = _class_named(config["class"])
        hyperparameters, n_tokens = config["hyperparameters"], config.get("n_tokens")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{origin} does not hold a readable dictionary: {error!r}") from error
    if not (isinstance(model_class, type) and issubclass(model_class, SparseDictionary)) or (
        inspect.isabstract(model_class)
    ):
        raise ValueError(
            f"{origin} was saved as {config['class']!r}, which probsae does not have; if it is a "
            "class of your own, import it first"
        )
    if not (n_tokens is None or isinstance(n_tokens, int)):
        raise ValueError(f"n_tokens in {origin} must be a whole number or null, got {n_tokens!r}")
    try:
        with seeded(0):  # its first dictionary, which is written over, is drawn
            model = model_class(**hyperparameters).to(device, _dtype_of(tensors))
    except TypeError as error:
        raise ValueError(f"{origin} describes a dictionary that cannot be: {error}") from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the tensors in {origin} do not fit its description: {error}") from error
    model.n_tokens = n_tokens
    return model.eval()


def _dtype_of(tensors: dict[str, Tensor]) -> torch.dtype:
    """Return the precision that a dictionary was saved in."""
    b_dec = tensors.get("b_dec")
    return b_dec.dtype if b_dec is not None and b_dec.is_floating_point() else torch.float32


def _class_named(name: str) -> Any:
    """Return probsae's class of that name, or the caller's own, the one defined last."""
    import probsae.models as models  # the package imports this module first

    if name in vars(models):
        return vars(models)[name]
    own = [cls for cls in _subclasses(SparseDictionary) if cls.__name__ == name]
    return own[-1] if own else None


def _subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)
