"""SAELens: cfg.json and sae_weights.safetensors, and the posterior beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from probsae.interop.point import as_point, jump_threshold, set_threshold_
from probsae.interop.weights import Weights, as_own, own_tensors, pick, read_config, read_tensors
from probsae.models.base import SparseDictionary
from probsae.models.files import atomic_write, describe, rebuild, save_tensors
from probsae.models.sae.base import DeterministicSAE
from probsae.models.sae.batch_topk import BatchTopKSAE
from probsae.models.sae.gated import GatedSAE
from probsae.models.sae.jumprelu import JumpReLUSAE
from probsae.models.sae.relu import ReLUSAE
from probsae.models.sae.topk import TopKSAE

_WEIGHTS, _CONFIG, _POSTERIOR = "sae_weights.safetensors", "cfg.json", "posterior.safetensors"
_CLASSES: dict[str, type[DeterministicSAE]] = {
    "standard": ReLUSAE,
    "topk": TopKSAE,
    "jumprelu": JumpReLUSAE,
    "gated": GatedSAE,
}
# Whose reader and writer this was written from; `make test-peers` runs the newest tried.
_FORMAT_VERSION = "6.18.0"


def load_sae_lens(
    path: str | Path, *, device: str = "cpu", point: bool = False
) -> SparseDictionary:
    """Read a dictionary that SAELens (version 6) saved, or that `save_sae_lens` wrote.

    Parameters
    ----------
    path : str or Path
        Folder with cfg.json and sae_weights.safetensors.
    device : str, default "cpu"
        Where to put its tensors.
    point : bool, default False
        Of a posterior that `save_sae_lens` wrote, return the point SAE that SAELens sees.

    Returns
    -------
    SparseDictionary
        "standard" as `ReLUSAE`, "topk" as `TopKSAE`, "jumprelu" (as which SAELens also saves
        BatchTopK and Matryoshka SAEs) as `JumpReLUSAE`, "gated" as `GatedSAE`; what probsae wrote
        as it was. Reconstructions are the same; codes are those of unit decoder rows.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If a file is damaged or lacks something, for another architecture (transcoders), for an
        SAE that normalises its activations, and for a TopK SAE whose rows differ in norm.
    """
    path = Path(path)
    config = read_config(path, _CONFIG, ("architecture", "d_in", "d_sae"))
    metadata = config.get("metadata")
    own = metadata.get("probsae") if isinstance(metadata, dict) else None
    if own and not point and (path / _POSTERIOR).exists():
        return rebuild(own, read_tensors(path / _POSTERIOR), path, device)
    architecture = config["architecture"]
    if not isinstance(architecture, str) or architecture not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise ValueError(f"architecture {architecture!r} cannot be read; these can: {known}")
    normalization = config.get("normalize_activations", "none")
    if normalization not in ("none", None):
        raise ValueError(
            f"{path} was trained on activations normalised by {normalization!r}: fold it into the "
            "weights first (SAELens: sae.fold_activation_norm_scaling_factor), or give probsae "
            "activations that are normalised and set normalize_activations to none"
        )
    tensors = read_tensors(path / _WEIGHTS)
    model = _read(architecture, config, tensors, path, device)
    if (model.d_in, model.d_sae) != (config["d_in"], config["d_sae"]):
        raise ValueError(
            f"{path}: cfg.json says d_in {config['d_in']} and d_sae {config['d_sae']}, the "
            f"weights are of {model.d_in} and {model.d_sae}"
        )
    return model


def _read(
    architecture: str,
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    path: Path,
    device: str,
) -> DeterministicSAE:
    model_class, origin = _CLASSES[architecture], path / _WEIGHTS
    subtracts = bool(config.get("apply_b_dec_to_input", True))
    W_enc, W_dec, b_dec = pick(tensors, ("W_enc", "W_dec", "b_dec"), origin)
    if architecture == "gated":
        b_enc, b_mag, r_mag = pick(tensors, ("b_gate", "b_mag", "r_mag"), origin)
        if not subtracts:
            b_mag = b_mag + r_mag.exp() * (b_dec @ W_enc)
        weights = Weights(W_enc, b_enc, W_dec, b_dec, {"b_mag": b_mag}, subtracts)
        model, per_code = as_own(model_class, weights, {}, device)
        assert isinstance(model, GatedSAE)
        with torch.no_grad():
            model.b_mag.copy_(per_code["b_mag"])
            model.log_magnitude.copy_(r_mag)
        return model
    (b_enc,) = pick(tensors, ("b_enc",), origin)
    options, extra = {}, {}
    if architecture == "topk":
        options["k"] = int(config.get("k", 100))
        if config.get("rescale_acts_by_decoder_norm", False):
            # There the largest codes are chosen as with unit rows.
            norms = W_dec.norm(dim=1).clamp(min=1e-12)
            W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    elif architecture == "jumprelu":
        extra["threshold"] = pick(tensors, ("threshold",), origin)[0]
    weights = Weights(W_enc, b_enc, W_dec, b_dec, extra, subtracts)
    model, per_code = as_own(model_class, weights, options, device)
    if isinstance(model, JumpReLUSAE):
        set_threshold_(model, per_code["threshold"])
    return model


def save_sae_lens(
    model: SparseDictionary,
    path: str | Path,
    *,
    x: Tensor | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that SAELens's `SAE.load_from_disk` reads.

    Parameters
    ----------
    model : SparseDictionary
        A deterministic SAE is written as it is (BatchTopK and Matryoshka as "jumprelu", as
        SAELens does itself); a posterior as the point SAE nearest to it, with all of it in
        posterior.safetensors, which SAELens ignores and `load_sae_lens` reads back.
    path : str or Path
        Folder; replaced as a whole if it holds nothing else.
    x : Tensor of shape (token, d_in), optional
        Activations on which the point SAE of a posterior is chosen, see `point_sae`.
    metadata : mapping, optional
        Goes into cfg.json's metadata: `model_name`, `hook_name`, `hook_head_index`,
        `prepend_bos` and others that SAELens's tools look for. JSON-ready.

    Raises
    ------
    ValueError
        If `model` is a posterior and `x` is not given.
    """
    own = describe(model)
    point = as_point(model, x)
    W_enc, b_enc, W_dec, b_dec = own_tensors(point)
    tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec}
    options = {}
    if isinstance(point, GatedSAE):
        architecture = "gated"
        tensors |= {"b_gate": b_enc, "b_mag": point.b_mag, "r_mag": point.log_magnitude}
    else:
        tensors["b_enc"] = b_enc
        threshold = jump_threshold(point)
        if threshold is not None:
            architecture, tensors["threshold"] = "jumprelu", threshold
        elif isinstance(point, TopKSAE) and not isinstance(point, BatchTopKSAE):
            architecture, options["k"] = "topk", point.k
        else:
            architecture = "standard"
    config = {
        "architecture": architecture,
        "d_in": model.d_in,
        "d_sae": model.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **options,
        "metadata": {"sae_lens_version": _FORMAT_VERSION, **(metadata or {}), "probsae": own},
    }
    with atomic_write(path, (_WEIGHTS, _CONFIG, _POSTERIOR)) as folder:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2))
        save_tensors(model, folder / _POSTERIOR)
