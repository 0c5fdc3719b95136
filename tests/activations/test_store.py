"""Stores: what is written is read back, and damage is named."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

import probsae as ps
from probsae.activations import ActivationStore, CorruptShardError, StoreWriter, robust_scale
from probsae.activations.scaling import limit_norms
from probsae.activations.shards import Shard
from probsae.inference import Checkpoint
from tests.killed import KilledAfter


def write(folder, x, shard_tokens=16, dtype="float32", **labels):
    writer = StoreWriter(folder, x.shape[1], dtype=dtype, shard_tokens=shard_tokens, hook="h")
    for rows in torch.arange(len(x)).split(7):
        writer.append(x[rows], **{name: value[rows] for name, value in labels.items()})
    writer.finish()
    return ActivationStore(folder)


@pytest.fixture
def x():
    return torch.randn(50, 4)


def test_rows_come_back_in_order(tmp_path, x):
    store = write(tmp_path / "s", x, tokens=torch.arange(50))
    assert torch.equal(torch.cat(list(store.sequential(16))), x)
    with pytest.raises(ValueError, match="batch_size must be"):
        next(store.sequential(0))
    rows = torch.tensor([49, 0, 17, 16, 15, 17])
    assert torch.equal(store.gather(rows), x[rows])
    assert store.labels().tolist() == list(range(50))
    assert store.labels("positions").tolist() == [-1] * 50
    torch.testing.assert_close(store.mean, x.mean(0))


def test_bfloat16_rounds_once(tmp_path, x):
    store = write(tmp_path / "s", x, dtype="bfloat16")
    assert torch.equal(torch.cat(list(store.sequential(64))), x.bfloat16().float())


def test_a_pass_holds_every_token_once_across_shards(tmp_path):
    x = torch.arange(48.0)[:, None].expand(-1, 3).contiguous()
    stream = write(tmp_path / "s", x).batches(12, seed=3)
    first = torch.cat([next(stream)[:, 0] for _ in range(4)])
    second = torch.cat([next(stream)[:, 0] for _ in range(4)])
    assert sorted(first.tolist()) == list(range(48))
    assert sorted(second.tolist()) == list(range(48))
    assert first.tolist() != second.tolist()
    # Shards of 16: a batch drawn within one of them would span fewer than 16.
    assert float(first[:12].max() - first[:12].min()) > 16


@pytest.mark.parametrize("most_runs", [48, 10])
def test_runs_of_neighbours_lose_no_token(tmp_path, monkeypatch, most_runs):
    """48 tokens in runs of five, of which the last has three, in batches that cut runs."""
    x = torch.arange(48.0)[:, None].expand(-1, 3).contiguous()
    monkeypatch.setattr("probsae.activations.store._MAX_RUNS", most_runs)
    stream = write(tmp_path / "s", x).batches(16, seed=3)
    for _ in range(3):
        seen = torch.cat([next(stream)[:, 0] for _ in range(3)])
        assert sorted(seen.tolist()) == list(range(48))
        assert seen.tolist() != list(range(48))
    neighbours = float((seen.diff() == 1).float().mean())
    assert (neighbours > 0.6) == (most_runs == 10)


@pytest.mark.parametrize("most_runs", [48, 10])
@pytest.mark.parametrize("batch_size", [1, 7, 16, 48, 100])
def test_batches_are_passed_over_unread(tmp_path, monkeypatch, most_runs, batch_size):
    monkeypatch.setattr("probsae.activations.store._MAX_RUNS", most_runs)
    store = write(tmp_path / "s", torch.arange(48.0)[:, None].expand(-1, 3).contiguous())
    stream = store.batches(batch_size, seed=3)
    expected = [next(stream) for _ in range(60)]
    read, gather = [], ActivationStore.gather
    monkeypatch.setattr(
        ActivationStore, "gather", lambda self, rows: read.append(rows) or gather(self, rows)
    )
    for n_batches in (0, 1, 2, 3, 5, 6, 7, 11, 48, 55):
        read.clear()
        stream = store.batches_after(n_batches, batch_size, seed=3)
        for batch in expected[n_batches : n_batches + 5]:
            assert torch.equal(next(stream), batch)
        assert len(read) == 5


@pytest.mark.parametrize("n_before", [0, 1, 6])
def test_parts_are_rows_of_the_batches_and_others_are_not_read(tmp_path, monkeypatch, n_before):
    store = write(tmp_path / "s", torch.arange(2_300.0)[:, None], shard_tokens=500)
    expected = list(itertools.islice(store.batches(390, seed=3), n_before, n_before + 4))
    n_read, gather = [], ActivationStore.gather
    monkeypatch.setattr(
        ActivationStore, "gather", lambda self, rows: n_read.append(len(rows)) or gather(self, rows)
    )
    parts = [slice(0, 130), slice(130, 260), slice(260, 390)]
    streams = [store.batch_parts(part, 390, n_before=n_before, seed=3) for part in parts]
    for batch in expected:
        assert torch.equal(torch.cat([next(stream) for stream in streams]), batch)
    assert set(n_read) == {130}


def test_a_fit_that_is_resumed_does_not_read_what_it_had(tmp_path, monkeypatch):
    store = write(tmp_path / "s", torch.randn(1_500, 4), shard_tokens=512)
    options = {"n_steps": 14, "batch_size": 512, "progress": False}

    def fit(folder, *callbacks, resume=None):
        torch.manual_seed(0)
        model = ps.TopKSAE(4, 8, k=2)
        callbacks = [*callbacks, Checkpoint(folder, every=11)]
        ps.fit(model, store, **options, callbacks=callbacks, resume=resume)
        return model.state_dict()

    whole = fit(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", KilledAfter(12))
    read, gather = [], ActivationStore.gather
    monkeypatch.setattr(
        ActivationStore, "gather", lambda self, rows: read.append(rows) or gather(self, rows)
    )
    resumed = fit(tmp_path / "b", resume=tmp_path / "b")
    assert len(read) == 8 + 3  # the first 4,096 tokens, and those of the steps that are left
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_seed_fixes_the_order(tmp_path, x):
    store = write(tmp_path / "s", x)
    assert torch.equal(next(store.batches(20, seed=1)), next(store.batches(20, seed=1)))
    assert not torch.equal(next(store.batches(20, seed=1)), next(store.batches(20, seed=2)))


def test_split_leaks_nothing(tmp_path, x):
    train, held_out = write(tmp_path / "s", x).split(0.2)
    assert (len(train), len(held_out)) == (40, 10)
    assert torch.equal(next(held_out.sequential(10)), x[40:])
    assert torch.equal(torch.cat(list(train.sequential(16))), x[:40])
    with pytest.raises(IndexError, match="within 0 and 39"):
        train.gather(torch.tensor([40]))


@pytest.mark.parametrize(("share", "n_held_out"), [(0.1, 8), (0.2, 8), (0.24, 14), (0.9, 44)])
def test_split_cuts_no_context(tmp_path, x, share, n_held_out):
    positions = torch.arange(50) % 6  # contexts begin at 0, 6, ..., 48
    train, held_out = write(tmp_path / "s", x, positions=positions).split(share)
    assert (len(train), len(held_out)) == (50 - n_held_out, n_held_out)
    assert int(held_out.labels("positions")[0]) == 0


def test_interrupted_write_goes_on(tmp_path, x):
    first = StoreWriter(tmp_path / "s", 4, dtype="float32", shard_tokens=16)
    first.append(x[:40])  # two whole shards; 8 tokens wait in memory and are lost with it
    again = StoreWriter(tmp_path / "s", 4, dtype="float32", shard_tokens=16)
    assert again.n_tokens == 32
    again.append(x[32:])
    again.finish()
    resumed, at_once = ActivationStore(tmp_path / "s"), write(tmp_path / "t", x)
    assert torch.equal(torch.cat(list(resumed.sequential(50))), x)
    assert resumed.index["scale"] == at_once.index["scale"]


def test_other_settings_are_refused(tmp_path, x):
    StoreWriter(tmp_path / "s", 4, shard_tokens=16, hook="a").append(x)
    with pytest.raises(FileExistsError, match="another hook"):
        StoreWriter(tmp_path / "s", 4, shard_tokens=16, hook="b")


def test_finished_store_is_not_overwritten(tmp_path, x):
    write(tmp_path / "s", x)
    with pytest.raises(FileExistsError, match="finished store"):
        StoreWriter(tmp_path / "s", 4)


def test_a_finished_writer_takes_no_more_and_counts_what_is_there(tmp_path, x):
    description = {"d_in": 4, "dtype": "float32", "shard_tokens": 16, "hook": "h"}
    store = write(tmp_path / "s", x)
    writer = StoreWriter(tmp_path / "s", **description, may_be_finished=True)
    assert writer.is_finished
    assert writer.n_tokens == len(store) == 50
    writer.finish()
    with pytest.raises(FileExistsError, match="finished store"):
        writer.append(x)
    writer = StoreWriter(tmp_path / "t", **description)
    writer.append(x)
    writer.finish()
    with pytest.raises(FileExistsError, match="finished store"):
        writer.append(x)
    writer.finish()  # there is nothing left to do
    assert writer.n_tokens == 50
    assert ActivationStore(tmp_path / "t").index == store.index


def test_two_processes_do_not_write_to_one_folder(tmp_path, x):
    writer = StoreWriter(tmp_path / "s", 4, shard_tokens=16)
    writer.append(x)  # three shards
    partial = tmp_path / "s" / ".shard-00003.safetensors.tmp"
    partial.write_bytes(b"half")
    elsewhere = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "s")]
    refused = subprocess.run(elsewhere, capture_output=True, text=True)
    assert "FileExistsError: another process is writing to" in refused.stderr
    assert partial.exists()
    del writer
    again = StoreWriter(tmp_path / "s", 4, shard_tokens=16)
    assert not partial.exists()  # nobody's
    again.append(x)
    again.finish()
    assert len(ActivationStore(tmp_path / "s")) == 98


ELSEWHERE = """
import sys
from probsae.activations import StoreWriter
StoreWriter(sys.argv[1], 4, shard_tokens=16)
"""


def test_of_two_writers_that_begin_together_one_goes_on(tmp_path, x):
    first, second = (StoreWriter(tmp_path / "s", 4, shard_tokens=16) for _ in range(2))
    first.append(x)
    with pytest.raises(FileExistsError, match="another writer has begun"):
        second.append(x)
    first.finish()
    assert len(ActivationStore(tmp_path / "s")) == 50


@pytest.mark.usefixtures("unchecked_types")
def test_masks_are_no_rows(tmp_path, x):
    store = write(tmp_path / "s", x, tokens=torch.arange(50))
    for read in (store.gather, lambda rows: store.labels("tokens", rows)):
        for rows, dtype in ((x[:, 0] > 0, "bool"), (torch.tensor([1.0, 2.0]), "float32")):
            with pytest.raises(TypeError, match=f"whole numbers, got torch.{dtype}; a mask's"):
                read(rows)
    assert torch.equal(store.gather((x[:, 0] > 0).nonzero()[:, 0]), x[x[:, 0] > 0])


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        StoreWriter(tmp_path, 4)


def test_empty_store_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="at least one token"):
        StoreWriter(tmp_path / "s", 4).finish()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_keep_what_is_written(tmp_path, x, value):
    writer = StoreWriter(tmp_path / "s", 4, dtype="float32", shard_tokens=16)
    writer.append(x[:20])
    x[30, 2] = value
    with pytest.raises(ValueError, match="token 10"):
        writer.append(x[20:])
    assert StoreWriter(tmp_path / "s", 4, dtype="float32", shard_tokens=16).n_tokens == 16


def test_overflow_of_float16_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"do not fit into float16.*bfloat16"):
        StoreWriter(tmp_path / "s", 2, dtype="float16").append(torch.full((3, 2), 1e5))
    with pytest.raises(ValueError, match=r"do not fit into bfloat16.*divide"):
        StoreWriter(tmp_path / "t", 2).append(torch.full((3, 2), 1e39, dtype=torch.float64))


def test_missing_and_unfinished_stores(tmp_path, x):
    with pytest.raises(FileNotFoundError, match="no activation store"):
        ActivationStore(tmp_path / "nothing")
    StoreWriter(tmp_path / "s", 4, shard_tokens=16).append(x)
    with pytest.raises(FileNotFoundError, match="unfinished store"):
        ActivationStore(tmp_path / "s")


def damage_cut(shard):
    shard.write_bytes(shard.read_bytes()[:-5])


def damage_header(shard):
    shard.write_bytes(b"\x10" + b"\x00" * 7 + b"not json at all!" + shard.read_bytes()[24:])


def damage_length(shard):
    """One high byte of the header's length: as much memory as there is nowhere."""
    content = bytearray(shard.read_bytes())
    content[7] ^= 0x40
    shard.write_bytes(bytes(content))


def damage_missing(shard):
    shard.unlink()


@pytest.mark.parametrize("damage", [damage_cut, damage_header, damage_length, damage_missing])
def test_corrupt_shard_is_named(tmp_path, x, damage):
    write(tmp_path / "s", x)
    damage(tmp_path / "s" / "shard-00001.safetensors")
    with pytest.raises(CorruptShardError, match="shard-00001"):
        ActivationStore(tmp_path / "s")


def test_changed_bytes_fail_the_checksum(tmp_path, x):
    store = write(tmp_path / "s", x)
    store.verify()
    shard = tmp_path / "s" / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(CorruptShardError, match="shard-00002"):
        ActivationStore(tmp_path / "s").verify()


def test_empty_and_meanless_stores_are_named(tmp_path, x):
    write(tmp_path / "s", x)
    index = tmp_path / "s" / "index.json"
    content = json.loads(index.read_text())
    (tmp_path / "s" / "mean.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptShardError, match="mean"):
        ActivationStore(tmp_path / "s")
    index.write_text(json.dumps({**content, "shards": []}))
    with pytest.raises(ValueError, match="is empty"):
        ActivationStore(tmp_path / "s")


def test_garbled_index(tmp_path, x):
    write(tmp_path / "s", x)
    index = tmp_path / "s" / "index.json"
    content = json.loads(index.read_text())
    del content["shards"]
    index.write_text(json.dumps(content))
    with pytest.raises(CorruptShardError, match="shards"):
        ActivationStore(tmp_path / "s")
    index.write_text(json.dumps({**content, "shards": [], "dtype": "int5"}))
    with pytest.raises(CorruptShardError, match="'int5', which is none of"):
        ActivationStore(tmp_path / "s")
    index.write_text("{")
    with pytest.raises(CorruptShardError, match="not readable"):
        ActivationStore(tmp_path / "s")


def test_limited_norms_leave_ordinary_tokens_alone():
    x = torch.randn(4_000, 8)
    torch.testing.assert_close(limit_norms(x), x)
    massive = x.clone()
    massive[::100] *= 100
    limited = limit_norms(massive)
    assert float(massive.square().mean().sqrt()) > 5
    assert float(limited.square().mean().sqrt()) == pytest.approx(
        float(x.square().mean().sqrt()), rel=0.1
    )
    cosine = torch.nn.functional.cosine_similarity(limited, massive)
    torch.testing.assert_close(cosine, torch.ones(4_000))
    mostly_zero = torch.zeros(100, 8)
    mostly_zero[0] = 1.0
    torch.testing.assert_close(limit_norms(mostly_zero), mostly_zero)


def test_robust_scale_ignores_massive_tokens():
    torch.manual_seed(0)
    x = torch.randn(2000, 16)
    calm = robust_scale(x)
    x[:3] *= 1e3
    wild = robust_scale(x)
    assert wild.scale == pytest.approx(calm.scale, rel=0.01)
    assert wild.standard_deviation > 30 * calm.standard_deviation
    assert wild.massive_token_share == pytest.approx(3 / 2000)


@pytest.fixture
def read_rows(monkeypatch):
    """Count the label rows that are read."""
    read = []
    vector = Shard.vector

    def counting(self, name, *rows):
        found = vector(self, name, *rows)
        read.append(len(found))
        return found

    monkeypatch.setattr(Shard, "vector", counting)
    return read


def test_labels_are_read_as_asked_for(tmp_path, x, read_rows):
    ids = torch.randperm(50)
    store = write(tmp_path / "s", x, tokens=ids)
    view = ActivationStore(store.path, range(14, 34))  # of three shards of 16
    read_rows.clear()
    assert view.labels().tolist() == ids[14:34].tolist()
    assert read_rows == [2, 16, 2]
    read_rows.clear()
    rows = torch.tensor([19, 0, 3])
    assert view.labels("tokens", rows).tolist() == ids[14:34][rows].tolist()
    assert sum(read_rows) == 3
    with pytest.raises(IndexError, match="within 0 and 19"):
        view.labels("tokens", torch.tensor([20]))


@pytest.mark.parametrize("length", [6, 40])
@pytest.mark.parametrize("reach", [1, 3, 4_096])
def test_split_looks_near_its_cut_only(tmp_path, x, read_rows, monkeypatch, length, reach):
    store = write(tmp_path / "s", x, positions=torch.arange(50) % length)
    begins = torch.arange(length, 50, length)
    monkeypatch.setattr("probsae.activations.store._REACH", reach)
    for share in (0.1, 0.3, 0.5, 0.9):
        read_rows.clear()
        train, _ = store.split(share)
        distance = (begins - round(50 * (1 - share))).abs()
        assert len(train) == begins[distance.argmin()]
        if length == 6 and reach == 3:  # half a context on either side holds a beginning
            assert sum(read_rows) <= 8
