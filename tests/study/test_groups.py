"""What each group measures, and that the full scale is the study's."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import load, save_file

from probsae.metrics.recovery import max_cosines, mmcs
from probsae.models import ReLUSAE
from probsae.study.agreement import Agreement
from probsae.study.classical import PCA, Classical, KMedoids, sizes
from probsae.study.exploration import Exploration
from probsae.study.fits import build_all
from probsae.study.grid import DICTIONARIES, Grid
from probsae.study.group import RESULT, DataSet, child_seed, to_json
from probsae.study.plan import plan
from probsae.study.scale import FULL, MEDIUM, SMALL, Scale
from tests.study.tiny import DATA, TINY


def test_the_full_grid_is_the_studys():
    groups = plan(FULL, 0)
    grid = [g for g in groups if isinstance(g, Grid) and g.data.decay == 0.99]
    assert sum(len(g.data.scale.penalties) for g in grid) == 96
    assert sorted({FULL.d_sae(g.ratio) for g in grid}) == [2**n for n in range(7, 15)]
    assert (FULL.batch_size, FULL.n_steps, FULL.n_active) == (4_096, 30_000, 5)
    source = grid[0].data.activations()
    assert (source.d_in, source.n_features, source.decay) == (256, 512, 0.99)
    assert sizes(FULL, PCA)[-1] == 409_600


def test_the_medium_study_has_all_sizes_of_the_full_one_and_the_rest_of_the_small_one():
    grid = [g for g in plan(MEDIUM, 0) if isinstance(g, Grid) and g.data.decay == 0.99]
    assert sum(len(g.data.scale.penalties) for g in grid) == 96
    assert MEDIUM.ratios == FULL.ratios
    assert dataclasses.replace(MEDIUM, name="small", ratios=SMALL.ratios) == SMALL


@pytest.mark.parametrize("scale", [FULL, MEDIUM, SMALL, TINY], ids=lambda scale: scale.name)
def test_groups_have_names_of_their_own(scale):
    names = [group.name for group in plan(scale, 0)]
    assert len(set(names)) == len(names)
    assert not any("/" in name for name in names)


@pytest.mark.parametrize("scale", [FULL, SMALL], ids=lambda scale: scale.name)
def test_decays_keep_the_ratio_of_rarest_to_commonest(scale):
    source = DataSet(scale, 0.99, False).activations()
    p = source.firing_probability.double()
    # One step more than there are between first and last feature, as in the study's 512.
    ratio = float(p[-1] / p[0]) * scale.decay_per_feature(0.99)
    assert ratio == pytest.approx(0.99**512, rel=1e-4)
    assert float(p.sum()) == pytest.approx(scale.n_active, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_steps": 0}, "n_steps must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1, got 2.5"),
        ({"n_exploration_tokens": 3}, "n_exploration_tokens must be a whole number of at least 4"),
        ({"relu_rate": 0.0}, "relu_rate must be positive"),
        ({"n_active": 13}, "n_active must be at most n_features=12, got 13"),
        ({"penalties": ()}, "penalties must hold different positive numbers"),
        ({"penalties": (0.1, 0.1)}, "penalties must hold different positive numbers"),
        ({"ratios": (1, -2)}, "ratios must hold different positive numbers"),
        ({"ratios": (1, 0.04)}, "at least one dictionary entry of 12 features, got 0.04: 0.48"),
        ({"ratios": (2, 4)}, "ratios must hold 1, where"),
        ({"ratios": (1,)}, "and another"),
        ({"decays": (0.99, 1.5)}, "decays must be at most 1"),
        ({"grid_decay": 0.9}, "grid_decay must be one of"),
        ({"classical_sizes": (128, 64)}, "ascending"),
        ({"classical_sizes": (4, 8)}, "classical_sizes must reach n_features=12"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_a_scale_that_would_end_in_its_middle_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(TINY, **change)


def test_a_scale_survives_json():
    assert Scale.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL


def test_json_has_no_nan_and_six_digits():
    value = json.loads(to_json({"a": [math.nan, 1 / 3], "b": {"c": math.inf}, "d": True}))
    assert value == {"a": [None, 0.333333], "b": {"c": None}, "d": True}


def test_dictionaries_of_other_sizes_begin_elsewhere():
    """From one seed, 512 rows and 1,024 begin with the same 512 where torch draws in order."""
    sizes = (128, 256)
    models = [
        build_all({"a": lambda n=n: ReLUSAE(64, n)}, 0, 0, n)["a"].dictionary() for n in sizes
    ]
    assert float(max_cosines(models[1], models[0]).max()) < 0.9
    assert child_seed(0, 0, 1) != child_seed(0, 1, 0)


def test_exploration_names_each_tokens_strongest_feature():
    result = json.loads(Exploration(DATA).run(None)[RESULT])
    _, z = DATA.activations().sample(64, seed=0)
    expected = [int(row.argmax()) if row.any() else -1 for row in z.numpy()]
    assert result["strongest"] == expected
    assert np.array(result["points"]).shape == (64, 2)
    assert result["share_empty"] == pytest.approx(expected.count(-1) / 64)


def test_classical_result_is_the_baselines():
    result = json.loads(Classical(DATA, PCA, 128).run(None)[RESULT])
    source = DATA.activations()
    learned = PCA(TINY.n_features, n_tokens=128, seed=0).fit(source).dictionary()
    assert result["mmcs"] == pytest.approx(mmcs(learned, source.features), rel=1e-5)
    assert result["d_sae"] == 8  # as many as dimensions, not features
    assert np.mean(result["cosine"]) == pytest.approx(result["mmcs"], rel=1e-4)


def test_medoids_stop_where_their_memory_would():
    assert max(sizes(FULL, KMedoids)) == FULL.n_medoid_tokens < max(sizes(FULL, PCA))


@pytest.mark.slow
def test_a_grid_group_measures_the_dictionaries_that_it_leaves():
    files = Grid(DATA, 2).run("cpu")
    rows = json.loads(files[RESULT])["rows"]
    stack = load(files[DICTIONARIES])["W_dec"]
    assert [row["penalty"] for row in rows] == list(TINY.penalties)
    assert stack.shape == (2, 24, 8)
    features = DATA.activations().features
    for row, W_dec in zip(rows, stack, strict=True):
        assert row["mmcs"] == pytest.approx(mmcs(W_dec, features), rel=1e-5)
        assert row["cosine"] == pytest.approx(max_cosines(W_dec, features).tolist(), rel=1e-5)
        assert row["history"]["step"] == [10, 20]
        assert row["history"]["mmcs"][-1] == pytest.approx(row["mmcs"], rel=1e-5)
        assert row["failure"] is None
    assert not torch.equal(stack[0], stack[1])
    # The same once more, to the byte: nothing depends on what ran before.
    assert Grid(DATA, 2).run("cpu")[RESULT] == files[RESULT]


@pytest.mark.slow
def test_trackers_files_come_along(tmp_path):
    files = Grid(DATA, 1).run("cpu")
    (tmp_path / "a.nc").write_bytes(files["penalty=0.1.nc"])
    with xr.open_dataset(tmp_path / "a.nc", engine="h5netcdf") as looks:
        last = looks["cosine"].values[-1]
    row = json.loads(files[RESULT])["rows"][1]
    assert last == pytest.approx(row["cosine"], rel=1e-5)


def test_agreement_by_hand(tmp_path):
    """The smaller dictionary's rows are e1 and e2; the larger one has e1, and e2 turned by 60°."""
    small = torch.eye(8)[:2]
    turned = 0.5 * torch.eye(8)[1] + math.sqrt(0.75) * torch.eye(8)[2]
    large = torch.stack([torch.eye(8)[0], turned, torch.eye(8)[5]])
    for ratio, W_dec in ((1, small), (2, large)):
        folder = tmp_path / Grid(DATA, ratio).name
        folder.mkdir()
        save_file({"W_dec": torch.stack([W_dec, W_dec])}, folder / DICTIONARIES)
    rows = json.loads(Agreement(DATA, tmp_path).run(None)[RESULT])["rows"]
    assert [(row["penalty"], row["ratio"], row["larger"]) for row in rows] == [
        (0.02, 1, 2),
        (0.1, 1, 2),
    ]
    assert [row["mmcs"] for row in rows] == pytest.approx([0.75, 0.75])
