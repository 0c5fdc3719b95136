"""A tiny version of the calibration experiment, and its closed form on its own."""

from __future__ import annotations

import json
import math

import pytest
import torch
import tyro

import probsae as ps
from experiments.calibration.measure import finite
from experiments.calibration.row_posterior import row_posterior
from experiments.calibration.run import SIZES, activations, main, table
from probsae.metrics import direction_calibration


def test_two_conditions_end_to_end_and_again(tmp_path, monkeypatch, capsys):
    few = {**SIZES, "small": type(SIZES["small"])(32, 48, 2, 64, 128, 512, 20, 1_024)}
    monkeypatch.setattr("experiments.calibration.run.SIZES", few)
    command = ["--scale", "small", "--n-steps", "200", "--seeds", "0", "--out", str(tmp_path)]
    command += ["--conditions", "independent", "no_noise"]
    tyro.cli(main, args=command)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [
        "small-independent-seed=0-steps=200.json",
        "small-no_noise-seed=0-steps=200.json",
    ]
    result = json.loads(files[0].read_text())
    assert result["share_found"] > 0.5
    assert result["mmcs"] > result["mmcs_chance"] + 0.2
    for name in ("encoder", "refined"):
        figures = result[name]
        assert 0 < figures["brier_ratio"] < 1
        assert len(figures["coverage"]["given_active"]) == 4
        assert 0 <= figures["share_k_hat_above"] <= 1
        assert figures["iwae_minus_elbo"] > 0
    assert result["refined"]["elbo"] > result["encoder"]["elbo"]
    assert result["directions"]["median_predicted_over_actual"] > 0
    before = [file.stat().st_mtime_ns for file in files]
    capsys.readouterr()
    tyro.cli(main, args=command)  # everything is there: nothing is fitted again
    assert [file.stat().st_mtime_ns for file in files] == before
    assert "| share found |" in capsys.readouterr().out


def test_conditions_differ_as_they_say():
    plain = activations("independent", "small", 0)
    assert activations("dense", "small", 0).n_active == 5 * plain.n_active
    assert activations("copula", "small", 0).correlation == "copula"
    assert activations("uniform_product", "small", 0).magnitudes == "uniform_product"
    assert activations("no_noise", "small", 0).noise_scale == 0
    assert plain.noise_scale == 0.05


def test_row_posterior_is_linear_regression_where_codes_are_known():
    """Far apart and almost without noise the codes are known: Lambda is Z^T Z / noise^2 + I."""
    torch.manual_seed(0)
    data = ps.SyntheticActivations(8, 4, 1, decay=1.0, magnitudes=(1.0, 0.2), seed=0)
    model = ps.SpikeSlabDictionary(8, 4, noise_scale=0.05)
    basis = torch.eye(8)[:4]
    with torch.no_grad():
        model.W_dec.copy_(basis)
        model.W_enc.copy_(basis.T)
        model.code_prior.slab_mean.fill_(1.0)
        model.code_prior.log_slab_scale.fill_(math.log(0.2))
    z = data.sample(500)[1]
    x = z @ basis + 0.05 * torch.randn(500, 8)
    rows, variance = row_posterior(model, x, n_chunk=128)
    precision = z.double().T @ z.double() / 0.05**2 + torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.inv(precision)
    torch.testing.assert_close(rows, expected @ z.double().T @ x.double() / 0.05**2,
                               atol=0.01, rtol=0)  # fmt: skip
    torch.testing.assert_close(variance, expected.diagonal(), rtol=0.05, atol=0)
    # Four rows with 7 dimensions across each: predicted is actual within a factor of two.
    result = direction_calibration(rows, basis.double(), variance)
    assert 0.5 < result.median_ratio < 2


def test_table_takes_what_is_missing():
    rows = [
        {"job": {"condition": "copula"}, "share_found": 0.5, "encoder": {}, "refined": {}},
        {"job": {"condition": "copula"}, "share_found": 0.7, "directions": {"spearman": None}},
    ]
    lines = table(rows).splitlines()
    assert lines[2] == "| share found | 0.600 ± 0.141 |"
    assert "| Spearman | - |" in lines
    assert finite({"a": [math.nan, 1.0], "b": math.inf}) == {"a": [None, 1.0], "b": None}


def test_unknown_condition_is_refused():
    with pytest.raises(SystemExit):
        tyro.cli(main, args=["--conditions", "weather"])
