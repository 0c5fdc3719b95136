"""dictionary_learning: ae.pt, a state dict, and config.json with the name of its class."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probsae.interop.point import as_point, jump_threshold, set_threshold_
from probsae.interop.weights import Weights, as_own, own_tensors, pick, read_config
from probsae.models.base import SparseDictionary
from probsae.models.files import atomic_write
from probsae.models.sae.base import DeterministicSAE
from probsae.models.sae.batch_topk import BatchTopKSAE
from probsae.models.sae.gated import GatedSAE
from probsae.models.sae.jumprelu import JumpReLUSAE
from probsae.models.sae.matryoshka import MatryoshkaSAE
from probsae.models.sae.relu import ReLUSAE
from probsae.models.sae.topk import TopKSAE

_WEIGHTS, _CONFIG = "ae.pt", "config.json"
_CLASSES: dict[str, type[DeterministicSAE]] = {
    "AutoEncoder": ReLUSAE,
    "AutoEncoderNew": ReLUSAE,
    "AutoEncoderTopK": TopKSAE,
    "BatchTopKSAE": BatchTopKSAE,
    "MatryoshkaBatchTopKSAE": MatryoshkaSAE,
    "JumpReluAutoEncoder": JumpReLUSAE,
    "GatedAutoEncoder": GatedSAE,
}
_NEVER = -1.0  # A threshold that no training step has set.


def load_dictionary_learning(path: str | Path, *, device: str = "cpu") -> DeterministicSAE:
    """Read a dictionary that dictionary_learning's trainer saved.

    Parameters
    ----------
    path : str or Path
        Folder with ae.pt and config.json. ae.pt is read with torch's restricted unpickler, which
        runs no code of the file's.
    device : str, default "cpu"
        Where to put its tensors.

    Returns
    -------
    DeterministicSAE
        AutoEncoder and AutoEncoderNew as `ReLUSAE`, AutoEncoderTopK as `TopKSAE`, BatchTopKSAE,
        MatryoshkaBatchTopKSAE, JumpReluAutoEncoder and GatedAutoEncoder as what they are called
        here. Reconstructions are the same; codes are those of unit decoder rows.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If a file is damaged or lacks something, for another class, and for a TopK form whose
        rows differ in norm.
    """
    path = Path(path)
    config = read_config(path, _CONFIG, ("trainer",))
    trainer = config["trainer"]
    name = trainer.get("dict_class") if isinstance(trainer, dict) else trainer
    if not isinstance(name, str) or name not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise ValueError(f"{path} holds a {name!r}, which cannot be read; these can: {known}")
    if not (path / _WEIGHTS).exists():
        raise FileNotFoundError(f"{path} has no {_WEIGHTS}")
    try:
        tensors = torch.load(path / _WEIGHTS, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path / _WEIGHTS} is damaged, or no state dict: {error}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise ValueError(f"{path / _WEIGHTS} is no state dict: it must hold tensors by name")
    weights, options = _read(name, tensors, path / _WEIGHTS)
    model, per_code = as_own(_CLASSES[name], weights, options, device)
    with torch.no_grad():
        if isinstance(model, GatedSAE):
            model.b_mag.copy_(per_code["b_mag"])
            model.log_magnitude.copy_(tensors["r_mag"])
        elif isinstance(model, JumpReLUSAE):
            set_threshold_(model, per_code["threshold"])
        elif isinstance(model, BatchTopKSAE) and float(tensors["threshold"]) != _NEVER:
            # There a code must exceed it, here it may equal it.
            threshold = per_code["threshold"].mean()
            model.threshold.copy_(torch.nextafter(threshold, torch.full_like(threshold, torch.inf)))
    return model


def _read(name: str, tensors: dict[str, Tensor], origin: Path) -> tuple[Weights, dict[str, Any]]:
    """Return the weights and the constructor's options."""
    options: dict[str, Any] = {}
    if name in ("AutoEncoder", "AutoEncoderNew"):
        subtracts = name == "AutoEncoder"
        names = ("encoder.weight", "encoder.bias", "decoder.weight")
        names += ("bias",) if subtracts else ("decoder.bias",)
        W_enc, b_enc, W_dec, b_dec = pick(tensors, names, origin)
        return Weights(W_enc.T, b_enc, W_dec.T, b_dec, {}, subtracts), options
    if name == "GatedAutoEncoder":
        names = ("encoder.weight", "gate_bias", "decoder.weight", "decoder_bias")
        W_enc, b_enc, W_dec, b_dec = pick(tensors, names, origin)
        b_mag, _ = pick(tensors, ("mag_bias", "r_mag"), origin)
        return Weights(W_enc.T, b_enc, W_dec.T, b_dec, {"b_mag": b_mag}), options
    if name == "JumpReluAutoEncoder":
        W_enc, b_enc, W_dec, b_dec, threshold = pick(
            tensors, ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), origin
        )
        return Weights(W_enc, b_enc, W_dec, b_dec, {"threshold": threshold}, False), options
    options["k"] = int(pick(tensors, ("k",), origin)[0])
    if name == "MatryoshkaBatchTopKSAE":
        W_enc, b_enc, W_dec, b_dec, sizes = pick(
            tensors, ("W_enc", "b_enc", "W_dec", "b_dec", "group_sizes"), origin
        )
        options["prefixes"] = sizes.cumsum(0)[:-1].tolist()
    else:
        names = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
        W_enc, b_enc, W_dec, b_dec = pick(tensors, names, origin)
        W_enc, W_dec = W_enc.T, W_dec.T
    per_code = {}
    if name != "AutoEncoderTopK":
        per_code["threshold"] = pick(tensors, ("threshold",), origin)[0]
    return Weights(W_enc, b_enc, W_dec, b_dec, per_code), options


def save_dictionary_learning(
    model: SparseDictionary,
    path: str | Path,
    *,
    x: Tensor | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that dictionary_learning's `utils.load_dictionary` reads.

    Parameters
    ----------
    model : SparseDictionary
        A deterministic SAE is written as it is, a posterior as the point SAE nearest to it
        (a JumpReluAutoEncoder); save the posterior itself with `probsae.save`.
    path : str or Path
        Folder; replaced as a whole if it holds nothing else.
    x : Tensor of shape (token, d_in), optional
        Activations on which the point SAE of a posterior is chosen, see `point_sae`.
    trainer : mapping, optional
        Further entries of config.json's `trainer`: `layer`, `lm_name`, `submodule_name`.

    Raises
    ------
    ValueError
        If `model` is a posterior and `x` is not given.
    """
    point = as_point(model, x)
    name, tensors = _write(point)
    about = {"dict_class": name, "activation_dim": model.d_in, "dict_size": model.d_sae}
    if isinstance(point, TopKSAE):
        about["k"] = point.k
    config = {"trainer": {**(trainer or {}), **about}, "buffer": {}}
    with atomic_write(path, (_WEIGHTS, _CONFIG)) as folder:
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        torch.save(tensors, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2))


def _write(model: DeterministicSAE) -> tuple[str, dict[str, Tensor]]:
    """Return the class's name there, and its state dict."""
    W_enc, b_enc, W_dec, b_dec = own_tensors(model)
    linear = {"encoder.weight": W_enc.T, "decoder.weight": W_dec.T}
    if isinstance(model, GatedSAE):
        gates = {"gate_bias": b_enc, "mag_bias": model.b_mag, "r_mag": model.log_magnitude}
        return "GatedAutoEncoder", linear | gates | {"decoder_bias": b_dec}
    if isinstance(model, ReLUSAE):
        return "AutoEncoder", linear | {"encoder.bias": b_enc, "bias": b_dec}
    direct = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    if isinstance(model, JumpReLUSAE):
        # It does not subtract b_dec.
        shifted = {"b_enc": b_enc - b_dec @ W_enc, "threshold": model.threshold}
        return "JumpReluAutoEncoder", direct | shifted
    assert isinstance(model, TopKSAE)
    common = {"k": torch.tensor(model.k, dtype=torch.int), "threshold": torch.tensor(_NEVER)}
    linear |= {"encoder.bias": b_enc, "b_dec": b_dec}
    if not isinstance(model, BatchTopKSAE):
        return "AutoEncoderTopK", linear | common
    if float(model.threshold) >= 0:
        threshold = jump_threshold(model)
        assert threshold is not None
        common["threshold"] = threshold[0]
    if not isinstance(model, MatryoshkaSAE):
        return "BatchTopKSAE", linear | common
    edges = torch.tensor([0, *model.prefixes, model.d_sae])
    return "MatryoshkaBatchTopKSAE", direct | common | {"group_sizes": edges.diff()}
