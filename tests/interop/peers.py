"""The dictionaries that are exchanged, and the other libraries' encoders and decoders.

The latter are written down from their sources:
SAELens 6.18 (saes/*.py), sparsify 1.3 (sparse_coder.py, fused_encoder.py), dictionary_learning 0.1
(dictionary.py, trainers/*.py). tests/interop/test_peers.py runs the libraries themselves.
"""

import json

import torch
from safetensors.torch import load_file

D_IN, D_SAE = 12, 30
OPTIONS = {
    "ReLUSAE": {},
    "TopKSAE": {"k": 4},
    "BatchTopKSAE": {"k": 4},
    "MatryoshkaSAE": {"k": 4, "prefixes": (5, 13)},
    "JumpReLUSAE": {},
    "GatedSAE": {},
}


def topk(h, k):
    values, index = h.topk(k, dim=-1)
    return torch.zeros_like(h).scatter(-1, index, values.relu())


def sae_lens_codes(path, x):
    config = json.loads((path / "cfg.json").read_text())
    p = load_file(path / "sae_weights.safetensors")
    centered = x - p["b_dec"] if config["apply_b_dec_to_input"] else x
    norms = 1.0
    match config["architecture"]:
        case "standard":
            z = torch.relu(centered @ p["W_enc"] + p["b_enc"])
        case "topk":
            h = centered @ p["W_enc"] + p["b_enc"]
            if config.get("rescale_acts_by_decoder_norm"):
                norms = p["W_dec"].norm(dim=-1)
            z = topk(h * norms, config["k"])
        case "jumprelu":
            h = centered @ p["W_enc"] + p["b_enc"]
            z = torch.relu(h) * (h > p["threshold"])
        case "gated":
            gate = centered @ p["W_enc"] + p["b_gate"] > 0
            z = gate * torch.relu(centered @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"])
    return z, (z / norms) @ p["W_dec"] + p["b_dec"]


def sparsify_codes(path, x):
    config = json.loads((path / "cfg.json").read_text())
    p = load_file(path / "sae.safetensors")
    h = torch.relu((x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"])
    z = topk(h, config["k"])
    return z, z @ p["W_dec"] + p["b_dec"]


def dictionary_learning_codes(path, x):
    name = json.loads((path / "config.json").read_text())["trainer"]["dict_class"]
    p = torch.load(path / "ae.pt", weights_only=True)
    match name:
        case "AutoEncoder":
            h = (x - p["bias"]) @ p["encoder.weight"].T + p["encoder.bias"]
            z = torch.relu(h)
            return z, z @ p["decoder.weight"].T + p["bias"]
        case "GatedAutoEncoder":
            h = (x - p["decoder_bias"]) @ p["encoder.weight"].T
            z = (h + p["gate_bias"] > 0) * torch.relu(p["r_mag"].exp() * h + p["mag_bias"])
            return z, z @ p["decoder.weight"].T + p["decoder_bias"]
        case "JumpReluAutoEncoder":
            h = x @ p["W_enc"] + p["b_enc"]
            z = torch.relu(h * (h > p["threshold"]))
            return z, z @ p["W_dec"] + p["b_dec"]
        case "MatryoshkaBatchTopKSAE":
            assert int(p["group_sizes"].sum()) == len(p["W_dec"])
            h = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
            z = h * (h > p["threshold"])
            return z, z @ p["W_dec"] + p["b_dec"]
    h = torch.relu((x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"])
    z = topk(h, int(p["k"])) if name == "AutoEncoderTopK" else h * (h > p["threshold"])
    return z, z @ p["decoder.weight"].T + p["b_dec"]
