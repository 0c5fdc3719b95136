"""What the formats share: files that must be there, and scales and biases of the other side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from probsae.models.sae.base import DeterministicSAE
from probsae.models.sae.topk import TopKSAE
from probsae.seeding import seeded

# Rows that were unit before they were rounded to 16 bits differ by less.
_NORM_TOLERANCE = 0.01


class Weights(NamedTuple):
    """An autoencoder as others keep it: rows of `W_dec` of any norm, biases with or without b_dec.

    `per_code` are further parameters by name, in units of the codes, shape () or (d_sae,).
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    per_code: Mapping[str, Tensor]
    subtracts_b_dec: bool = True


def as_own(
    model_class: type[DeterministicSAE], weights: Weights, options: Mapping[str, Any], device: str
) -> tuple[DeterministicSAE, dict[str, Tensor]]:
    """Return a model with unit rows that computes the same, and its `per_code` parameters.

    The codes are the others' times the norm of the feature's row.
    """
    W_enc, b_enc, W_dec, b_dec = (weight.float() for weight in weights[:4])
    d_sae, d_in = W_dec.shape
    fits = W_enc.shape == (d_in, d_sae) and b_enc.shape == (d_sae,) and b_dec.shape == (d_in,)
    if not fits:
        shapes = [tuple(weight.shape) for weight in weights[:4]]
        raise ValueError(f"encoder, its bias, decoder and its bias do not fit: shapes {shapes}")
    if not all(bool(weight.isfinite().all()) for weight in (W_enc, b_enc, W_dec, b_dec)):
        raise ValueError("the weights hold NaN or infinite values")
    norms = W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    if issubclass(model_class, TopKSAE) and float(norms.max() / norms.min()) > 1 + _NORM_TOLERANCE:
        raise ValueError(
            "the largest codes are chosen before they are multiplied by decoder rows whose norms "
            f"range from {float(norms.min()):.3g} to {float(norms.max()):.3g}: with unit rows, as "
            "here, other features would be chosen"
        )
    W_enc, b_enc = W_enc * norms, b_enc * norms
    per_code = {name: value.float() * norms for name, value in weights.per_code.items()}
    if not weights.subtracts_b_dec:
        b_enc = b_enc + b_dec @ W_enc
    with seeded(0):  # its first dictionary, which is written over, is drawn
        model = model_class(d_in, d_sae, **options)
    with torch.no_grad():
        model.W_dec.copy_(W_dec / norms[:, None])
        model.W_enc.copy_(W_enc)
        model.b_enc.copy_(b_enc)
        model.b_dec.copy_(b_dec)
        model.is_initialized.fill_(True)
    return model.to(device).eval(), {k: v.to(device) for k, v in per_code.items()}


def read_config(path: Path, name: str, needed: tuple[str, ...]) -> dict[str, Any]:
    """Read a JSON file that must have the keys `needed`."""
    file = path / name
    if not file.exists():
        raise FileNotFoundError(f"{path} has no {name}")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object, but a {type(config).__name__}")
    missing = [key for key in needed if key not in config]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    return config


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def pick(tensors: Mapping[str, Tensor], names: tuple[str, ...], origin: Path) -> tuple[Tensor, ...]:
    """Return the tensors called `names`; a ValueError names those that are missing."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{origin} lacks {', '.join(missing)}; it has {', '.join(tensors)}")
    return tuple(tensors[name] for name in names)


def own_tensors(model: DeterministicSAE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W_enc, b_enc, W_dec with unit rows, b_dec: detached copies on the CPU."""
    weights = (model.W_enc, model.b_enc, model.directions, model.b_dec)
    W_enc, b_enc, W_dec, b_dec = (w.detach().cpu().clone().contiguous() for w in weights)
    return W_enc, b_enc, W_dec, b_dec
