"""What a fit cannot take is refused in words, and changes nothing."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import Laplace, Normal

import probsae as ps
from probsae.activations import ActivationStore, StoreWriter
from probsae.inference import Callback, Checkpoint
from probsae.models.base import as_event
from tests.inference.small import OPTIONS, small_model
from tests.own_model import LinearLaplace


class Narrow(ps.SyntheticActivations):
    """A source of another width or size than it should have."""

    def __init__(self, d_in, n_tokens=100):
        super().__init__(d_in=d_in, n_features=10, n_active=2)
        self.n_tokens = n_tokens


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (torch.zeros(50, 9), ValueError, "d_in=8 columns"),
        (torch.full((50, 8), torch.inf), ValueError, "finite"),
        (torch.full((50, 8), 1e39, dtype=torch.float64), ValueError, "range of torch.float32"),
        (torch.zeros(0, 8), ValueError, "at least one token"),
        (iter([]), ValueError, "empty iterator"),
        (torch.zeros(50), ValueError, "shape"),
        (3, TypeError, "data"),
        ("once upon a time", TypeError, "'once upon a time', which is no activation store; text"),
        (Path("nowhere"), TypeError, "'nowhere', which is no activation store"),
        (["once", "upon"], TypeError, "got str; text becomes activations by `probsae harvest`"),
        (Narrow(7), ValueError, "model's d_in=8, got d_in=7 from Narrow"),
        (Narrow(9), ValueError, "model's d_in=8, got d_in=9 from Narrow"),
        (Narrow(8, n_tokens=0), ValueError, "at least one token, got none from Narrow"),
        (np.array([["a"]]), TypeError, "numbers"),
        (torch.zeros(50, 8, dtype=torch.complex64), TypeError, "real numbers"),
        ([[torch.zeros(50, 8)]], TypeError, r"\(batch\[0\] for batch in loader\)"),
        (pd.DataFrame(np.zeros((50, 8))), TypeError, r"got DataFrame; pass its to_numpy\(\)"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_unusable_data_are_refused_and_change_nothing(data, error, words):
    model = small_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=words):
        ps.fit(model, data, **OPTIONS)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_batches_of_another_width_are_refused(source):
    x, _ = source.sample(32)
    widths = [8] * 20 + [7]  # after the tokens that a fit begins with
    model = small_model(ps.TopKSAE, k=2)
    data = (x.repeat(16, 1)[:, :width] for width in widths)
    with pytest.raises(ValueError, match=r"d_in=8 columns, got shape \(512, 7\)"):
        ps.fit(model, data, **OPTIONS | {"batch_size": 512})


@pytest.mark.usefixtures("unchecked_types")
def test_a_path_of_a_store_is_told_from_other_paths(tmp_path):
    writer = StoreWriter(tmp_path / "store", 8)
    writer.append(torch.randn(20, 8))
    writer.finish()
    for path in (tmp_path / "store", str(tmp_path / "store")):
        with pytest.raises(TypeError, match=r"open the store there: .*ActivationStore\(path\)"):
            ps.fit(small_model(), path, **OPTIONS)
    with pytest.raises(ValueError, match=r"d_in=9, got d_in=8 from ActivationStore\('.*20 x 8"):
        ps.fit(ps.TopKSAE(9, 12, k=2), ActivationStore(tmp_path / "store"), **OPTIONS)
    for rows in (range(5, 5), range(21), range(0, 20, 2)):
        with pytest.raises(ValueError, match="at least one of the 20 tokens"):
            ActivationStore(tmp_path / "store", rows)


@pytest.mark.parametrize(
    "options",
    [
        {"n_steps": 0},
        {"n_steps": 2.5},
        {"batch_size": 0},
        {"batch_size": -1},
        {"batch_size": 32.0},
        {"learning_rate": -1.0},
        {"learning_rate": float("inf")},
        {"device": "gpu"},
        {"seed": None},
        {"seed": "0"},
        {"seed": 0.5},
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_unusable_settings_are_refused(options, source):
    with pytest.raises(ValueError, match=next(iter(options))):
        ps.fit(small_model(), source, **(OPTIONS | options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": ps.TopKSAE}, "got TopKSAE, a class: build it first"),
        ({"model": torch.nn.Linear(8, 8)}, "got Linear"),
        ({"callbacks": Callback()}, r"\[callback\]"),
        ({"callbacks": print}, r"\[callback\], got builtin_function"),
        ({"callbacks": [print]}, r"on_step\(state\).*, got builtin_function"),
        ({"callbacks": [Callback]}, "got Callback, a class: build it first"),
        ({"elbo": "exact"}, "pyro.infer.ELBO, got str"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_other_things_are_refused(options, words, source):
    with pytest.raises(TypeError, match=words):
        ps.fit(**{"model": small_model(), "data": source, **OPTIONS, **options})


def test_a_gpu_that_is_not_there_is_said_so(source, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as it is without one
    with pytest.raises(ValueError, match="needs a GPU and torch sees none"):
        ps.fit(small_model(), source, **(OPTIONS | {"device": "cuda"}))
    with pytest.raises(ValueError, match="needs a GPU and torch sees none"):
        ps.SyntheticActivations(device="cuda")


@pytest.mark.usefixtures("unchecked_types")
def test_numpys_integers_are_whole_numbers(source, tmp_path):
    x, _ = source.sample(100)
    models = small_model(), small_model()
    options = OPTIONS | {"seed": 3}
    ps.fit(models[0], x, **options)
    options |= {name: np.int64(options[name]) for name in ("n_steps", "batch_size", "seed")}
    ps.fit(models[1], x, **options, callbacks=[Checkpoint(tmp_path / "c", every=10)])
    assert torch.equal(models[0].W_dec, models[1].W_dec)


class ScalarPrior(LinearLaplace):
    def prior(self):
        return Laplace(torch.zeros(self.d_sae), torch.ones(self.d_sae))  # not one event


class ShortPrior(LinearLaplace):
    def prior(self):
        return as_event(Laplace(torch.zeros(5), torch.ones(5)))


class BareDistribution(LinearLaplace):
    def posterior(self, x):
        return Normal(self.product(x - self.b_dec, self.W_enc), 0.1)


@pytest.mark.parametrize(
    ("cls", "error", "words"),
    [
        (ScalarPrior, ValueError, r"event shape \(12,\), got \(\) .* as_event"),
        (ShortPrior, ValueError, r"event shape \(12,\), got \(5,\)"),
        (
            BareDistribution,
            TypeError,
            r"Distribution.posterior must return .*CodePosterior, got Normal",
        ),
    ],
)
def test_hooks_of_ones_own_that_do_not_fit_are_refused(cls, error, words, source):
    for fit in (ps.fit, lambda model, *args, **options: ps.fit_ensemble([model], *args, **options)):
        with pytest.raises(error, match=words):
            fit(small_model(cls), source, **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_refused(dtype, source):
    model = small_model().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = source.sample(20)[0]
    for use in (
        lambda: ps.fit(model, source, **OPTIONS),
        lambda: ps.fit_ensemble([model], source, **OPTIONS),
        lambda: ps.refine(model, x),
        lambda: ps.polish(model, x, progress=False),
    ):
        with pytest.raises(TypeError, match=r"call its float\(\) first"):
            use()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
