"""The tracker's counts by hand, and what it writes."""

import struct
import time

import numpy as np
import pytest
import torch
import xarray as xr
from torch.utils.flop_counter import FlopCounterMode
from wandb.proto import wandb_internal_pb2

import probsae as ps
from probsae.inference import FeatureTracker, FitState, Objective, WandbLogger

OPTIONS = {"n_steps": 30, "batch_size": 32, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def source():
    return ps.SyntheticActivations(d_in=8, n_features=10, n_active=2, noise_scale=0.05, seed=1)


def small_model():
    torch.manual_seed(0)
    return ps.SpikeSlabDictionary(d_in=8, d_sae=12)


def look(tracker, dictionary, step, firing_rate):
    """Show the tracker one step of a fit that has this dictionary."""
    model = ps.ReLUSAE(d_in=dictionary.shape[1], d_sae=len(dictionary))
    with torch.no_grad():
        model.W_dec.copy_(dictionary)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = FitState(model, optimizer, None, 100, torch.device("cpu"), 0, step=step)
    state.batch = torch.zeros(50, dictionary.shape[1])
    numbers = [torch.tensor(float(i)) for i in range(6)]
    state.objective = Objective(*numbers, firing_rate=torch.tensor(firing_rate))
    tracker.on_step(state)
    return {name: values[-1] for name, values in tracker.history.items()}


def products(source, callbacks):
    """Floating-point operations of a fit's matrix products."""
    torch.manual_seed(0)
    model = ps.ReLUSAE(d_in=8, d_sae=12)
    with FlopCounterMode(display=False) as counter:
        ps.fit(model, source, **{**OPTIONS, "n_steps": 4}, compile=False, callbacks=callbacks)
    return counter.get_total_flops()


def test_a_look_is_one_product_of_the_dictionaries_and_other_steps_none(source):
    tracker = FeatureTracker(source.features, every=2)
    looks = products(source, [tracker]) - products(source, [])
    assert tracker.history["step"] == [2, 4]
    assert looks == 2 * (2 * len(source.features) * 12 * 8)


def test_counts_by_hand():
    """Four features in four entries, step by step."""
    e = torch.eye(4)
    between = torch.nn.functional.normalize(e[0] + e[1], dim=0)  # cosine .707 with both
    tracker = FeatureTracker(e, every=1, dead_rate=1e-3, dead_after_tokens=100)
    alive = [0.1, 0.1, 0.1, 0.0]
    first = look(tracker, torch.stack([e[0], e[1], between, between]), 1, alive)
    assert (first["n_learned"], first["n_newly_learned"], first["n_unlearned"]) == (2, 2, 0)
    assert (first["n_kept"], first["n_moved"], first["cosine_change"]) == (0, 0, 0.0)
    assert first["mmcs"] == pytest.approx(0.5)
    assert first["n_dead"] == 1
    # Feature 0 stays, feature 1 moves to entry 3, feature 2 is new.
    second = look(tracker, torch.stack([e[0], between, e[2], e[1]]), 2, alive)
    assert (second["n_learned"], second["n_newly_learned"], second["n_unlearned"]) == (3, 1, 0)
    assert (second["n_kept"], second["n_moved"]) == (1, 1)
    assert second["cosine_change"] == pytest.approx(0.25)
    # Features 0 and 1 are mixed and so unlearned; feature 2 stays. Entry 3 fires again, at a rate
    # that leaves its mean over the last 100 tokens at .0015, above the limit; entry 0 goes silent.
    third = look(tracker, torch.stack([between, between, e[2], between]), 3, [0, 0.1, 0.1, 0.003])
    assert (third["n_learned"], third["n_newly_learned"], third["n_unlearned"]) == (1, 0, 2)
    assert (third["n_kept"], third["n_moved"]) == (1, 0)
    assert third["cosine_change"] == pytest.approx((1 - 0.5**0.5) / 2)
    assert third["n_dead"] == 0
    # Two looks are 100 tokens: entry 0 did not fire in them.
    fourth = look(tracker, torch.stack([between, between, e[2], between]), 4, [0, 0.1, 0.1, 0.0])
    assert fourth["n_dead"] == 1
    assert (fourth["loss"], fourth["kl"], fourth["fvu"]) == (0.0, 3.0, 5.0)


def test_conservation_laws_in_a_real_fit(source):
    """What is learned now is what was, plus the new, less the unlearned."""
    tracker = FeatureTracker(source.features, every=5, threshold=0.6)
    ps.fit(ps.TopKSAE(8, 12, k=2), source, callbacks=[tracker], **(OPTIONS | {"n_steps": 103}))
    history = {name: np.array(values) for name, values in tracker.history.items()}
    assert history["step"].tolist() == [*range(5, 101, 5), 103]
    learned, change = history["n_learned"], history["n_newly_learned"] - history["n_unlearned"]
    assert (learned == np.cumsum(change)).all()
    kept = history["n_kept"] + history["n_moved"]
    assert (kept[1:] == learned[:-1] - history["n_unlearned"][1:]).all()
    assert (history["cosine_change"][1:] >= np.abs(np.diff(history["mmcs"])) - 1e-6).all()
    assert learned[-1] > learned[0]


def test_the_file_holds_the_history_and_each_feature(source, tmp_path):
    path = tmp_path / "run" / "features.nc"
    tracker = FeatureTracker(source.features, every=10, path=path)
    ps.fit(small_model(), source, callbacks=[tracker], **OPTIONS)
    with xr.open_dataset(path, engine="h5netcdf") as data:
        assert data.step.values.tolist() == [10, 20, 30]
        for name, values in tracker.history.items():
            np.testing.assert_array_equal(data[name].values, values)
        assert data.cosine.shape == data.entry.shape == (3, 10)
        np.testing.assert_allclose(data.cosine.mean("feature"), data.mmcs, rtol=1e-6)
        assert ((data.entry >= 0) & (data.entry < 12)).all()
    assert [p.name for p in path.parent.iterdir()] == ["features.nc"], "a partial file is left"


def records_of(path):
    """Records of a wandb file: LevelDB's log format after seven bytes of header."""
    data, record, at, block = path.read_bytes(), b"", 7, 2**15
    while at + 7 <= len(data):
        if block - at % block < 7:  # the rest of a block is padding
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wait_for_records(path, seconds=120.0):
    """Read a finished run's file; wandb's own process writes it, and may be late."""
    deadline = time.monotonic() + seconds
    while True:
        records = []
        for data in records_of(path):
            records.append(wandb_internal_pb2.Record())
            records[-1].ParseFromString(data)
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline, f"no end of the run in {path}"
        time.sleep(0.1)


def test_wandb_offline_run_holds_the_looks(source, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = WandbLogger(directory=tmp_path, every=10)
    tracker = FeatureTracker(source.features, every=10, logger=logger)
    ps.fit(small_model(), source, callbacks=[logger, tracker], **OPTIONS)
    (run,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    logged: dict[str, list[float]] = {}
    for record in wait_for_records(run):
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            logged.setdefault(key, []).append(float(item.value_json))
    for name in ("mmcs", "n_learned", "n_moved", "n_dead", "kl"):
        assert logged[f"features/{name}"] == pytest.approx(tracker.history[name]), name
    assert len(logged["elbo"]) == 3


def test_a_logger_that_has_not_started_is_refused(source):
    tracker = FeatureTracker(source.features, every=10, logger=WandbLogger())
    with pytest.raises(ValueError, match="before the callbacks"):
        ps.fit(small_model(), source, callbacks=[tracker], **OPTIONS)


def test_each_member_of_an_ensemble_has_its_tracker(source):
    torch.manual_seed(0)
    models = [ps.TopKSAE(8, 12, k=k) for k in (1, 2)]
    trackers = [FeatureTracker(source.features, every=10) for _ in models]
    ps.fit_ensemble(models, source, callbacks=[[t] for t in trackers], **OPTIONS)
    for model, tracker in zip(models, trackers, strict=True):
        assert tracker.history["step"] == [10, 20, 30]
        mmcs = ps.metrics.mmcs(model.W_dec.detach(), source.features)
        assert tracker.history["mmcs"][-1] == pytest.approx(mmcs, abs=1e-5)
    assert trackers[0].history["l0"][-1] < trackers[1].history["l0"][-1]


@pytest.mark.parametrize("options", [{"every": 0}, {"dead_after_tokens": 0}])
def test_unusable_settings_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        FeatureTracker(torch.eye(3), **options)
