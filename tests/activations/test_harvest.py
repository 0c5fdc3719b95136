"""Harvests from a hand-made model (what is stored) and SmolLM2 (that real ones work)."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from probsae.activations import ActivationStore
from probsae.activations.harvest import harvest
from probsae.activations.hooks import capture, find_hook
from probsae.lm import read_tokens
from tests.lm.tiny import tiny_language_model, tiny_opt

HOOKS = ["layers.0", "layers.0.mlp.2:input"]


@pytest.fixture
def text(tmp_path):
    files = [tmp_path / "long.txt", tmp_path / "short.txt"]
    generator = torch.Generator().manual_seed(0)
    for file, n in zip(files, (30_000, 10_000), strict=True):
        words = torch.randint(50, (n,), generator=generator).tolist()
        file.write_text(" ".join(map(str, words)))
    return files


def test_stores_what_passes_the_hooks(tmp_path, text):
    model = tiny_language_model()
    stores = harvest(
        model, text, HOOKS, tmp_path / "out", n_tokens=500, context_length=8, batch_size=3,
        dtype="float32", shard_tokens=64,
    )  # fmt: skip
    assert [(s.n_tokens, s.d_in) for s in stores] == [(500, 12), (500, 24)]
    ids, positions = stores[0].labels("tokens"), stores[0].labels("positions")
    assert positions[:8].tolist() == [1, 2, 3, 4, 5, 6, 7, 1]
    # The first positions were left out of the store, so redo the forward from the text itself.
    words = [int(word) for word in text[0].read_text()[:8192].split()][:24]
    contexts = torch.tensor(words).view(3, 8)
    assert ids[:21].tolist() == contexts[:, 1:].flatten().tolist()
    residual = model.network.layers[0](model.network.embed(contexts))[0][:, 1:].flatten(0, 1)
    torch.testing.assert_close(next(stores[0].sequential(21)), residual)
    hidden = next(stores[1].sequential(21))
    torch.testing.assert_close(
        hidden @ model.network.layers[0].mlp[2].weight.T + model.network.layers[0].mlp[2].bias
        + (residual - model.network.layers[0].mlp(_means(model, contexts))[:, 1:].flatten(0, 1)),
        residual, rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def _means(model, contexts):
    x = model.network.embed(contexts)
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def test_tokens_that_a_module_is_given_in_one_row_are_told_apart(tmp_path, text):
    """OPT's MLP; the first position of each context is left out of it as of a block."""
    model, hooks = tiny_opt(), ["model.decoder.layers.1.fc2:input", "model.decoder.layers.1"]
    stores = harvest(
        model, text, hooks, tmp_path / "out", n_tokens=70, context_length=8, batch_size=3,
        dtype="float32",
    )  # fmt: skip
    assert [(s.n_tokens, s.d_in) for s in stores] == [(70, 24), (70, 16)]
    ids = torch.tensor([int(word) for word in text[0].read_text().split()[:80]]).view(10, 8)
    for store, hook in zip(stores, hooks, strict=True):
        torch.testing.assert_close(next(store.sequential(70)), read_tokens(model, hook, ids))


def test_forward_stops_at_the_last_hook():
    model = tiny_language_model()
    points = [find_hook(model.network, hook) for hook in HOOKS]
    ids = torch.randint(50, (2, 5))
    capture(points, lambda: model.network(input_ids=ids))
    assert [block.n_calls for block in model.network.layers] == [1, 0]
    model.network(input_ids=ids)  # hooks are gone: the whole forward runs
    assert [block.n_calls for block in model.network.layers] == [2, 1]


def test_files_are_mixed_in_proportion_throughout(tmp_path, text):
    (store,) = harvest(
        tiny_language_model(), text, HOOKS[0], tmp_path / "out", context_length=16, dtype="float32"
    )
    assert store.n_tokens > 35_000
    documents = store.labels("documents")
    assert int(documents.max()) + 1 == len(documents.unique())


@pytest.mark.parametrize(
    "other", [pytest.param("2", marks=pytest.mark.slow), "\u0662"]
)  # in Arabic figures two bytes
def test_every_part_of_a_store_mixes_the_files(tmp_path, other):
    files = [tmp_path / "one.txt", tmp_path / "other.txt"]
    for file, word in zip(files, ("1", other), strict=True):
        file.write_text(f"{word} " * 60_000, encoding="utf-8")
    (store,) = harvest(tiny_language_model(), files, HOOKS[0], tmp_path / "out", context_length=16)
    for part in store.labels("tokens").chunk(4):
        assert float((part == 2).double().mean()) == pytest.approx(0.5, abs=0.1)


def test_unknown_hook_lists_near_ones(tmp_path, text):
    with pytest.raises(ValueError, match=r"layers\.3.*layers\.1"):
        harvest(tiny_language_model(), text, "layers.3", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_text_and_short_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        harvest(tiny_language_model(), tmp_path / "nowhere.txt", HOOKS, tmp_path / "out")
    (tmp_path / "short.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match="no whole context"):
        harvest(tiny_language_model(), tmp_path / "short.txt", HOOKS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_disk_is_refused_before_anything_is_written(tmp_path, text):
    with pytest.raises(OSError, match="on disk"):
        harvest(tiny_language_model(), text, HOOKS, tmp_path / "out", n_tokens=10**14)
    assert not (tmp_path / "out").exists()


def test_dataset_rows_are_documents(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["1 2 3 4 5 6", "7 8 9 10 11", "1 2"]})
    (store,) = harvest(
        tiny_language_model(), rows, "layers.0", tmp_path / "out", context_length=3,
        exclude_first=False, dtype="float32",
    )  # fmt: skip
    assert store.labels("documents").tolist() == [0] * 6 + [1] * 3
    assert store.labels().tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="column 'text'"):
        harvest(tiny_language_model(), rows.rename_column("text", "t"), "layers.0", tmp_path / "o")


def test_streamed_datasets_have_neither_length_nor_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["1 2 3 4 5 6", "7 8 9 10 11", "1 2"]})
    options = {"context_length": 3, "exclude_first": False, "dtype": "float32"}
    model = tiny_language_model()
    (whole,) = harvest(model, rows, "layers.0", tmp_path / "whole", **options)
    stream = rows.to_iterable_dataset().map(lambda row: row)
    assert stream.column_names is None
    (streamed,) = harvest(model, stream, "layers.0", tmp_path / "streamed", **options)
    assert streamed.index == whole.index
    nothing = rows.rename_column("text", "t").to_iterable_dataset()
    with pytest.raises(ValueError, match="column 'text'"):
        harvest(model, nothing.map(lambda row: row), "layers.0", tmp_path / "o")


def test_contexts_begin_as_the_model_was_trained(tmp_path, text):
    options = {"context_length": 4, "n_tokens": 60, "dtype": "float32", "exclude_first": False}
    model = dataclasses.replace(tiny_language_model(), bos_token_id=7)
    (store,) = harvest(model, text[0], "layers.0", tmp_path / "out", **options)
    tokens = store.labels().view(-1, 4)
    assert tokens[:, 0].tolist() == [7] * 15
    words = [int(word) for word in text[0].read_text().split()[:45]]
    assert tokens[:, 1:].flatten().tolist() == words


def test_contexts_have_room_for_text():
    model = tiny_language_model()
    for length, bos_token_id in ((0, None), (1, 7)):
        model = dataclasses.replace(model, bos_token_id=bos_token_id)
        with pytest.raises(ValueError, match=f"at least {length + 1} tokens, got {length}"):
            model.contexts([1, 2, 3], length)


@pytest.mark.parametrize("n_checksums", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_while_finishing_goes_on_to_the_same_bytes(tmp_path, text, monkeypatch, n_checksums):
    """At the third checksum the first store has all shards; at the 60th the second."""
    from probsae.activations import store_writer

    options = {
        "n_tokens": 6_000, "context_length": 16, "batch_size": 3, "shard_tokens": 128,
        "dtype": "float32",
    }  # fmt: skip
    model, n_left, original = tiny_language_model(), n_checksums, store_writer.checksum

    def killed(path):
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(store_writer, "checksum", killed)
    with pytest.raises(KeyboardInterrupt):
        harvest(model, text, HOOKS, tmp_path / "out", **options)
    monkeypatch.undo()
    folders = [tmp_path / "out" / hook.replace(":", ".") for hook in HOOKS]
    is_finished = [(folder / "index.json").exists() for folder in folders]
    assert is_finished[:2] == [n_checksums == 60, False]
    with pytest.raises(FileExistsError, match="another settings"):
        harvest(model, text[:1], HOOKS, tmp_path / "out", **options)
    resumed = harvest(model, text, HOOKS, tmp_path / "out", **options)
    at_once = harvest(model, text, HOOKS, tmp_path / "o2", **options)
    for a, b in zip(resumed, at_once, strict=True):
        assert a.index == b.index
        a.verify()
    with pytest.raises(FileExistsError, match="finished store"):
        harvest("nowhere", text, HOOKS, tmp_path / "out", **options)  # no model is loaded for that
    with pytest.raises(ValueError, match="at least one module"):
        harvest(model, text, [], tmp_path / "out", **options)


def test_text_of_equal_size_is_another_text(tmp_path, text):
    options = {"n_tokens": 300, "context_length": 16, "shard_tokens": 64, "batch_size": 1}
    model = tiny_language_model()
    with pytest.raises(ValueError, match="dtype must be one of"):
        harvest(model, text, "layers.0", tmp_path / "out", dtype="int8")
    writer_settings = harvest(model, text, "layers.0", tmp_path / "a", **options)[0].index
    content = text[0].read_text()
    text[0].write_text(content[1:] + content[0])
    other = harvest(model, text, "layers.0", tmp_path / "b", **options)[0].index
    assert writer_settings["settings"] != other["settings"]


KILLED = """
import sys
from pathlib import Path
from probsae.activations.harvest import harvest
from tests.lm.tiny import tiny_language_model
harvest(tiny_language_model(), [Path(p) for p in sys.argv[2:]], {hooks!r}, Path(sys.argv[1]),
        n_tokens=6_000, context_length=16, batch_size=1, shard_tokens=128, dtype="float32")
"""


@pytest.mark.slow
def test_resumes_after_sigkill_to_the_same_bytes(tmp_path, text):
    command = [sys.executable, "-c", KILLED.format(hooks=HOOKS), str(tmp_path / "out")]
    process = subprocess.Popen(
        command + [str(f) for f in text], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL
    )
    folder = tmp_path / "out" / "layers.0"
    deadline = time.monotonic() + 120
    while len(list(folder.glob("shard-*"))) < 3:
        assert process.poll() is None, "the harvest ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    with pytest.raises(FileNotFoundError, match="unfinished"):
        ActivationStore(folder)
    options = {"n_tokens": 6_000, "context_length": 16, "shard_tokens": 128, "dtype": "float32"}
    resumed = harvest(tiny_language_model(), text, HOOKS, tmp_path / "out", batch_size=1, **options)
    at_once = harvest(tiny_language_model(), text, HOOKS, tmp_path / "o2", batch_size=1, **options)
    for a, b in zip(resumed, at_once, strict=True):
        assert a.index == b.index  # the checksums of every shard, the scale, the mean
        a.verify()


@pytest.mark.slow
def test_smollm2_stores_and_has_massive_first_positions(tmp_path, smollm2, corpus):
    hooks = ["model.layers.7", "model.layers.12", "model.layers.7.mlp.down_proj:input"]
    stores = harvest(
        smollm2, corpus, hooks, tmp_path / "out", n_tokens=512, context_length=32, batch_size=4,
        exclude_first=False,
    )  # fmt: skip
    assert [store.d_in for store in stores] == [576, 576, 1536]
    deep = stores[1]
    norms = torch.cat(list(deep.sequential(512))).norm(dim=1)
    is_first = deep.labels("positions") == 0
    assert float(norms[is_first].min()) > 10 * float(norms[~is_first].median())
    scale = deep.index["scale"]
    assert scale["standard_deviation"] > 3 * scale["scale"]
    assert scale["massive_token_share"] == pytest.approx(1 / 32)


def test_a_model_without_a_tokenizer_says_so():
    model = dataclasses.replace(tiny_language_model(), tokenizer=None)
    for use in (lambda: model.tokenize(["a"]), lambda: model.decode([1])):
        with pytest.raises(ValueError, match="has no tokenizer; pass one"):
            use()


def test_sentencepiece_tokens_keep_their_spaces():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"<unk>": 0, "\u2581the": 1, "\u2581cat": 2, "s": 3, "\u2581sat": 4, "\u2581": 5}
    merges = tokenizers.models.Unigram([(w, -1.0 - i) for w, i in words.items()], unk_id=0)
    tokenizer = tokenizers.Tokenizer(merges)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    model = dataclasses.replace(tiny_language_model(), tokenizer=fast)
    ids = model.tokenize(["the cats sat"])[0]
    assert "".join(model.decode(ids)) == " the cats sat"
