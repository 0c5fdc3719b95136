"""Other libraries' formats: what is written is what their encoders compute, and comes back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import probsae as ps
from probsae import interop
from tests.interop.peers import (
    D_IN,
    D_SAE,
    OPTIONS,
    dictionary_learning_codes,
    sae_lens_codes,
    sparsify_codes,
)

N = 500
FORMATS = {
    "sae_lens": (interop.save_sae_lens, interop.load_sae_lens, sae_lens_codes),
    "dictionary_learning": (
        interop.save_dictionary_learning,
        interop.load_dictionary_learning,
        dictionary_learning_codes,
    ),
}


@pytest.fixture
def x():
    return 3 * torch.randn(N, D_IN) + 2


def trained(name: str, x: torch.Tensor, **options) -> ps.SparseDictionary:
    """A fit of a few steps: no parameter is left at its first value."""
    model = getattr(ps, name)(d_in=D_IN, d_sae=D_SAE, **{**OPTIONS.get(name, {}), **options})
    ps.fit(model, x, n_steps=20, batch_size=64, progress=False)
    with torch.no_grad():
        model.b_enc.add_(0.3 * torch.randn(D_SAE)) if hasattr(model, "b_enc") else None
        if name == "GatedSAE":
            model.b_mag.add_(0.3 * torch.randn(D_SAE))
            model.log_magnitude.add_(0.3 * torch.randn(D_SAE))
    return model


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("library", FORMATS)
def test_what_is_written_computes_the_same_there_and_back(tmp_path, x, name, library):
    save, load, codes = FORMATS[library]
    model = trained(name, x)
    expected = model.encode(x).mean
    assert 0 < (expected != 0).float().mean() < 1
    save(model, tmp_path / "sae")
    z, x_hat = codes(tmp_path / "sae", x)
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_hat, model.decode(expected), rtol=1e-4, atol=1e-4)
    back = load(tmp_path / "sae")
    assert type(back) is type(model)
    torch.testing.assert_close(back.encode(x).mean, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaSAE", "JumpReLUSAE"])
def test_sae_lens_sees_thresholds_and_so_do_we(tmp_path, x, name):
    model = trained(name, x)
    interop.save_sae_lens(model, tmp_path / "sae")
    point = interop.load_sae_lens(tmp_path / "sae", point=True)
    assert type(point) is ps.JumpReLUSAE
    torch.testing.assert_close(point.encode(x).mean, model.encode(x).mean, rtol=1e-4, atol=1e-4)


def test_sparsify_both_ways(tmp_path, x):
    model = trained("TopKSAE", x)
    interop.save_sparsify(model, tmp_path / "sae")
    z, x_hat = sparsify_codes(tmp_path / "sae", x)
    torch.testing.assert_close(z, model.encode(x).mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x_hat, model(x), rtol=1e-4, atol=1e-4)
    back = interop.load_sparsify(tmp_path / "sae")
    torch.testing.assert_close(back.encode(x).mean, model.encode(x).mean, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="sparsify keeps TopK SAEs, and this is a BatchTopKSAE"):
        interop.save_sparsify(trained("BatchTopKSAE", x), tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_rows_of_any_norm_and_inputs_not_centred(tmp_path, x, architecture, subtracts):
    """SAELens's own conventions, with rows of any norm: reconstructions stay, codes are scaled."""
    scale = torch.rand(D_SAE) + 0.5
    config = {
        "architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32",
        "apply_b_dec_to_input": subtracts, "k": 5, "rescale_acts_by_decoder_norm": True,
        "metadata": {"sae_lens_version": "6.18.0"},
    }  # fmt: skip
    tensors = {
        "W_enc": torch.randn(D_IN, D_SAE), "W_dec": torch.randn(D_SAE, D_IN) * scale[:, None],
        "b_dec": torch.randn(D_IN),
    }  # fmt: skip
    names = {"standard": ["b_enc"], "topk": ["b_enc"], "jumprelu": ["b_enc", "threshold"]}
    for name in names.get(architecture, ["b_gate", "b_mag", "r_mag"]):
        tensors[name] = torch.randn(D_SAE)
    tmp_path.joinpath("cfg.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    z, x_hat = sae_lens_codes(tmp_path, x)
    model = interop.load_sae_lens(tmp_path)
    ours = model.encode(x).mean
    torch.testing.assert_close(model.decode(ours), x_hat, rtol=1e-3, atol=1e-3)
    factor = torch.ones(()) if architecture == "topk" else tensors["W_dec"].norm(dim=1)
    torch.testing.assert_close(ours, z * factor, rtol=1e-3, atol=1e-3)


def test_dictionary_learnings_uncentred_relu(tmp_path, x):
    tensors = {
        "encoder.weight": torch.randn(D_SAE, D_IN), "encoder.bias": torch.randn(D_SAE),
        "decoder.weight": torch.randn(D_IN, D_SAE), "decoder.bias": torch.randn(D_IN),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "ae.pt")
    config = {"trainer": {"dict_class": "AutoEncoderNew"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = torch.relu(x @ tensors["encoder.weight"].T + tensors["encoder.bias"])
    expected = expected @ tensors["decoder.weight"].T + tensors["decoder.bias"]
    model = interop.load_dictionary_learning(tmp_path)
    torch.testing.assert_close(model.decode(model.encode(x).mean), expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def known():
    """Features that hardly overlap: there a linear encoder can do what the posterior does."""
    data = ps.SyntheticActivations(
        d_in=40, n_features=24, n_active=1.5, decay=1.0, noise_scale=0.02, seed=0
    )
    torch.manual_seed(0)
    model = ps.SpikeSlabDictionary(d_in=40, d_sae=32)
    ps.fit(model, data, n_steps=500, batch_size=256, progress=False)
    return model, data


@pytest.mark.slow
def test_a_posterior_goes_as_its_nearest_point_and_comes_back_whole(tmp_path, known):
    model, data = known
    x, _ = data.sample(8_000, seed=1)
    fresh, _ = data.sample(2_000, seed=2)
    interop.save_sae_lens(model, tmp_path / "sae", x=x, metadata={"hook_name": "blocks.0"})
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["hook_name"] == "blocks.0"
    z, x_hat = sae_lens_codes(tmp_path / "sae", fresh)
    posterior = model.encode(fresh)
    is_active = posterior.is_active
    agreement = 2 * ((z > 0) & is_active).sum() / ((z > 0).sum() + is_active.sum())
    assert agreement > 0.9
    assert ps.metrics.fvu(fresh, x_hat) < ps.metrics.fvu(fresh, model.decode(posterior.mean)) + 0.1
    back = interop.load_sae_lens(tmp_path / "sae")
    assert type(back) is ps.SpikeSlabDictionary
    assert torch.equal(back.encode(fresh).p_active, posterior.p_active)
    interop.save_dictionary_learning(model, tmp_path / "dl", x=x, trainer={"layer": 3})
    torch.testing.assert_close(
        dictionary_learning_codes(tmp_path / "dl", fresh)[0], z, rtol=1e-3, atol=1e-3
    )
    assert json.loads((tmp_path / "dl/config.json").read_text())["trainer"]["layer"] == 3


@pytest.mark.slow
def test_a_point_keeps_directions_switches_off_the_unused_and_can_be_fitted_on(known):
    model, data = known
    x, _ = data.sample(4_000, seed=1)
    point = interop.point_sae(model, x)
    torch.testing.assert_close(point.dictionary(), model.dictionary())
    unused = model.encode(x).p_active.max(0).values < 0.5
    assert unused.any()
    assert (point.encode(x).mean[:, unused] == 0).all()
    before = ps.metrics.fvu(x, point.decode(point.encode(x).mean))
    ps.fit(point, data, n_steps=100, batch_size=256, learning_rate=1e-3, progress=False)
    assert ps.metrics.fvu(x, point.decode(point.encode(x).mean)) < before + 0.05


class LargeTensors(TorchDispatchMode):
    """Count what operations make of at least so many elements."""

    def __init__(self, n_elements):
        super().__init__()
        self.n_elements, self.n_made = n_elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            self.n_made += isinstance(made, torch.Tensor) and made.numel() >= self.n_elements
        return out


def test_a_point_is_made_in_pieces_and_the_same(monkeypatch):
    model, x = ps.SpikeSlabDictionary(d_in=6, d_sae=40), torch.randn(300, 6)
    whole = interop.point_sae(model, x).state_dict()
    monkeypatch.setattr("probsae.dictionary._MAX_CODES", 4 * 40 * 70)  # 70 tokens, 9 features
    with LargeTensors(300 * 40) as large:
        pieces = interop.point_sae(model, x).state_dict()
    assert large.n_made == 2  # p_active and the mean of all tokens
    torch.testing.assert_close(pieces, whole)


def broken(tmp_path, name="sae", **changes):
    """A folder of SAELens's whose cfg.json has these changes; None takes a key away."""
    path = tmp_path / name
    interop.save_sae_lens(ps.ReLUSAE(d_in=4, d_sae=6), path)
    file = path / "cfg.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (path / "posterior.safetensors").unlink()
    return path


def test_clear_errors(tmp_path, x):
    with pytest.raises(FileNotFoundError, match=r"no cfg\.json"):
        interop.load_sae_lens(tmp_path)
    with pytest.raises(ValueError, match="lacks d_in"):
        interop.load_sae_lens(broken(tmp_path, d_in=None))
    with pytest.raises(ValueError, match="'transcoder' cannot be read; these can: standard"):
        interop.load_sae_lens(broken(tmp_path, architecture="transcoder"))
    with pytest.raises(ValueError, match="fold_activation_norm_scaling_factor"):
        interop.load_sae_lens(broken(tmp_path, normalize_activations="layer_norm"))
    with pytest.raises(ValueError, match="lacks threshold"):
        interop.load_sae_lens(broken(tmp_path, architecture="jumprelu"))
    with pytest.raises(ValueError, match=r"says d_in 5 and d_sae 6, the weights are of 4 and 6"):
        interop.load_sae_lens(broken(tmp_path, d_in=5))
    path = broken(tmp_path)
    weights = path / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"W_enc": tensors["W_enc"].T.contiguous()}, weights)
    with pytest.raises(ValueError, match=r"do not fit: shapes \[\(6, 4\)"):
        interop.load_sae_lens(path)
    save_file(tensors | {"b_enc": torch.full((6,), torch.nan)}, weights)
    with pytest.raises(ValueError, match="NaN"):
        interop.load_sae_lens(path)
    for changes in ({"architecture": ["standard"]}, {"metadata": [1], "architecture": "gate"}):
        with pytest.raises(ValueError, match="cannot be"):
            interop.load_sae_lens(broken(tmp_path, "odd", **changes))
    (path / "cfg.json").write_text("[1]")
    with pytest.raises(ValueError, match="no JSON object, but a list"):
        interop.load_sae_lens(path)
    path = broken(tmp_path)
    weights.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        interop.load_sae_lens(path)
    with pytest.raises(ValueError, match="was not trained"):
        interop.save_sae_lens(ps.BatchTopKSAE(d_in=4, d_sae=6), tmp_path / "no")
    with pytest.raises(ValueError, match="is a posterior"):
        interop.save_sae_lens(ps.LaplaceDictionary(d_in=4, d_sae=6), tmp_path / "no")
    vae = ps.SparseVAE(d_in=D_IN, d_sae=6, decoder_hidden=7)
    with pytest.raises(ValueError, match="MLP decoder"):
        interop.save_sae_lens(vae, tmp_path / "no", x=x)
    assert not (tmp_path / "no").exists()


def test_topk_rows_that_differ_in_norm_are_refused(tmp_path):
    interop.save_sparsify(ps.TopKSAE(d_in=4, d_sae=6, k=2), tmp_path / "sae")
    file = tmp_path / "sae" / "sae.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"W_dec": tensors["W_dec"] * torch.arange(1.0, 7)[:, None]}, file)
    with pytest.raises(ValueError, match="norms range from 1 to 6"):
        interop.load_sparsify(tmp_path / "sae")
    save_file(tensors | {"W_dec": 2 * tensors["W_dec"]}, file)  # all the same: the order stays
    assert isinstance(interop.load_sparsify(tmp_path / "sae"), ps.TopKSAE)
    config = tmp_path / "sae" / "cfg.json"
    good = json.loads(config.read_text())
    for change, message in (
        ({"transcode": True}, "transcode"),
        ({"activation": "groupmax"}, "groupmax"),
    ):
        config.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            interop.load_sparsify(tmp_path / "sae")


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_dictionary_learnings_pickles_run_no_code(tmp_path, capsys):
    torch.save({"encoder.weight": Malicious()}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    with pytest.raises(ValueError, match="damaged, or no state dict"):
        interop.load_dictionary_learning(tmp_path)
    for content in ([torch.ones(2)], torch.ones(2), {"bias": "text"}, {3: torch.ones(2)}):
        torch.save(content, tmp_path / "ae.pt")
        with pytest.raises(ValueError, match="is no state dict"):
            interop.load_dictionary_learning(tmp_path)
    for trainer in ([1], {"dict_class": ["AutoEncoder"]}):
        (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
        with pytest.raises(ValueError, match="which cannot be read"):
            interop.load_dictionary_learning(tmp_path)
    assert "must not run" not in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "IdentityDict"}}))
    with pytest.raises(ValueError, match="'IdentityDict', which cannot be read"):
        interop.load_dictionary_learning(tmp_path)
