"""A tiny version of the calibration experiment."""

from __future__ import annotations

import json
import math

import pytest
import tyro

from experiments.calibration import blocks, by_rate
from experiments.calibration.measure import finite
from experiments.calibration.run import SIZES, activations, main, table


@pytest.mark.slow
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
    assert len(result["polished"]) == 3
    for after in result["polished"]:
        assert after["median_predicted_over_actual"] > 0
        assert after["held_out_elbo"][1][0] >= after["held_out_elbo"][0][0]
        assert after["n_wrongly"] <= after["n_taken_for_real"]
    before = [file.stat().st_mtime_ns for file in files]
    capsys.readouterr()
    tyro.cli(main, args=command)  # everything is there: nothing is fitted again
    assert [file.stat().st_mtime_ns for file in files] == before
    assert "| share found |" in capsys.readouterr().out
    tyro.cli(main, args=[*command, "--passes-again"])
    again = json.loads(files[0].read_text())
    assert again.pop("commit_of_passes") == again["commit"]
    assert again == result  # also the fit is the same


def test_conditions_differ_as_they_say():
    plain = activations("independent", "small", 0)
    assert activations("dense", "small", 0).n_active == 5 * plain.n_active
    assert activations("copula", "small", 0).correlation == "copula"
    assert activations("uniform_product", "small", 0).magnitudes == "uniform_product"
    assert activations("no_noise", "small", 0).noise_scale == 0
    assert plain.noise_scale == 0.05


def test_table_takes_what_is_missing():
    rows = [
        {"job": {"condition": "copula"}, "share_found": 0.5, "encoder": {}, "refined": {}},
        {"job": {"condition": "copula"}, "share_found": 0.7, "polished": [{"spearman": None}]},
    ]
    lines = table(rows).splitlines()
    assert lines[2] == "| share found | 0.600 ± 0.141 |"
    assert "| Spearman | - |" in lines
    assert finite({"a": [math.nan, 1.0], "b": math.inf}) == {"a": [None, 1.0], "b": None}


def test_unknown_condition_is_refused():
    with pytest.raises(SystemExit):
        tyro.cli(main, args=["--conditions", "weather"])


@pytest.mark.slow
def test_blocks_of_features(tmp_path, capsys):
    blocks.main(n_steps=20, d_sae=64, block_sizes=(64, 1), n_tokens=2_000, n_passes=1, out=tmp_path)
    rows = json.loads((tmp_path / "blocks-seed=0.json").read_text())["rows"]
    assert list(rows) == ["as fitted", "blocks of 64", "blocks of 1"]
    variances = [rows[f"blocks of {size}"]["median_predicted_over_actual"] for size in (64, 1)]
    assert variances[0] != variances[1]
    assert "| blocks of 1 |" in capsys.readouterr().out


@pytest.mark.slow
def test_direction_intervals_by_how_often_features_fire(tmp_path, capsys):
    by_rate.main(scale="small", n_steps=200, n_groups=3, out=tmp_path)
    rows = json.loads((tmp_path / "by_rate-independent-seed=7.json").read_text())["rows"]
    rates = [row["firing_probability"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert sum(rates) * 16 == pytest.approx(2, rel=1e-3)  # 48 features, 2 active
    assert all(row["share_found"] > 0.5 and 0 <= row["coverage_90"] <= 1 for row in rows)
    assert "deviation of its logarithm (0.254 by chance)" in capsys.readouterr().out
