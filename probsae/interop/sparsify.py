"""sparsify: cfg.json and sae.safetensors of a TopK SAE, one folder a hook point."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from probsae.interop.weights import Weights, as_own, own_tensors, pick, read_config, read_tensors
from probsae.models.base import SparseDictionary
from probsae.models.files import atomic_write
from probsae.models.sae.batch_topk import BatchTopKSAE
from probsae.models.sae.topk import TopKSAE

_WEIGHTS, _CONFIG = "sae.safetensors", "cfg.json"


def load_sparsify(path: str | Path, *, device: str = "cpu") -> TopKSAE:
    """Read a TopK SAE that sparsify saved.

    Parameters
    ----------
    path : str or Path
        Folder of one hook point, with cfg.json and sae.safetensors.
    device : str, default "cpu"
        Where to put its tensors.

    Returns
    -------
    TopKSAE
        With the same codes and reconstructions.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If a file is damaged or lacks something, for transcoders, skip connections and GroupMax,
        and for rows that differ in norm (trained with `normalize_decoder=False`).
    """
    path = Path(path)
    config = read_config(path, _CONFIG, ("d_in", "k"))
    for option in ("transcode", "skip_connection"):
        if config.get(option, False):
            raise ValueError(f"{path} has {option} set: it is no autoencoder of its activations")
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise ValueError(f"{path} has the activation {activation!r}; only topk can be read")
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    encoder, b_enc, W_dec, b_dec = pick(read_tensors(path / _WEIGHTS), names, path / _WEIGHTS)
    weights = Weights(encoder.T, b_enc, W_dec, b_dec, {})
    model, _ = as_own(TopKSAE, weights, {"k": int(config["k"])}, device)
    assert isinstance(model, TopKSAE)
    return model


def save_sparsify(model: SparseDictionary, path: str | Path) -> None:
    """Write a folder that sparsify's `SparseCoder.load_from_disk` reads.

    Parameters
    ----------
    model : TopKSAE
        sparsify has no other activation.
    path : str or Path
        Folder; replaced as a whole if it holds nothing else.

    Raises
    ------
    TypeError
        If `model` is no TopK SAE.
    """
    if not isinstance(model, TopKSAE) or isinstance(model, BatchTopKSAE):
        raise TypeError(
            f"sparsify keeps TopK SAEs, and this is a {type(model).__name__}; "
            "save_sae_lens and save_dictionary_learning write every dictionary"
        )
    W_enc, b_enc, W_dec, b_dec = own_tensors(model)
    tensors = {"encoder.weight": W_enc.T.contiguous(), "encoder.bias": b_enc}
    tensors |= {"W_dec": W_dec, "b_dec": b_dec}
    config = {
        "activation": "topk",
        "expansion_factor": max(1, model.d_sae // model.d_in),
        "normalize_decoder": True,
        "num_latents": model.d_sae,
        "k": model.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": model.d_in,
    }
    with atomic_write(path, (_WEIGHTS, _CONFIG)) as folder:
        save_file(tensors, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2))
