"""The other libraries themselves read what is written, and what they write is read."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import probsae as ps
from probsae import interop
from tests.interop.peers import D_IN, D_SAE, OPTIONS

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
MODELS = {**OPTIONS, "SpikeSlabDictionary": {}}
LIBRARIES = {
    "saelens": (
        lambda model, path, x: interop.save_sae_lens(model, path, x=x),
        interop.load_sae_lens,
        list(MODELS),
    ),
    "sparsify": (
        lambda model, path, x: interop.save_sparsify(model, path),
        interop.load_sparsify,
        ["TopKSAE"],
    ),
    "dictionary_learning": (
        lambda model, path, x: interop.save_dictionary_learning(model, path, x=x),
        interop.load_dictionary_learning,
        list(MODELS),
    ),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_both_ways(tmp_path, library):
    save, load, names = LIBRARIES[library]
    x = 2 * torch.randn(400, D_IN) + 1
    save_file({"x": x}, tmp_path / "x.safetensors")
    expected = {}
    for name in names:
        model = getattr(ps, name)(d_in=D_IN, d_sae=D_SAE, **MODELS[name])
        ps.fit(model, x, n_steps=30, batch_size=100, progress=False)
        save(model, tmp_path / "ours" / name, x)
        point = interop.point_sae(model, x) if name == "SpikeSlabDictionary" else model
        expected[name] = point.encode(x).mean, point(x)
    python = ROOT / ".peers" / library / "bin" / "python"
    script = Path(__file__).parent / "run_peer.py"
    done = subprocess.run(
        [python, script, library, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, (z, x_hat) in expected.items():
        theirs = load_file(tmp_path / "ours" / f"{name}.safetensors")
        torch.testing.assert_close(theirs["z"], z, rtol=1e-4, atol=1e-4, msg=name)
        torch.testing.assert_close(theirs["x_hat"], x_hat, rtol=1e-4, atol=1e-4, msg=name)
    folders = [path for path in (tmp_path / "theirs").iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        theirs = load_file(folder.with_suffix(".safetensors"))
        model = load(folder)
        x_hat = model.decode(model.encode(x).mean)
        torch.testing.assert_close(x_hat, theirs["x_hat"], rtol=1e-3, atol=2e-3, msg=folder.name)
        is_active = model.encode(x).mean != 0
        assert float((is_active == (theirs["z"] != 0)).float().mean()) > 0.9999, folder.name
