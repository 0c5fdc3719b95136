"""The one-layer transformer: its training, its measures by hand, and a small version of it all."""

from __future__ import annotations

import dataclasses
import json
import random
from itertools import product

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import probsae as ps
from experiments import language_models
from experiments.language_models import contexts_of, train_
from experiments.one_layer_transformer.fits import Plan, again, of_other, plans
from experiments.one_layer_transformer.measure import N_BINS, random_directions, summary, usage
from experiments.one_layer_transformer.model import HOOK, tokenizer
from experiments.one_layer_transformer.run import Run, Settings, main
from experiments.one_layer_transformer.texts import contexts, python_code, split_text, texts
from probsae.activations.language_model import load_language_model
from probsae.lm import logit_effects
from probsae.metrics import Correspondence


def test_contexts_are_whole():
    assert contexts_of(list(range(7)), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert contexts_of(iter(range(7)), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert contexts_of([0, 1], 3).shape == (0, 3)


def test_texts_are_split_at_whole_characters(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("0123456789", encoding="utf-8")
    second.write_text("ä" * 10, encoding="utf-8")  # two bytes each
    train, held_out = split_text([first, second], tmp_path / "out", 0.2)
    assert [f.read_text(encoding="utf-8") for f in train] == ["01234567", "ä" * 8]
    assert [f.read_text(encoding="utf-8") for f in held_out] == ["89", "ä" * 2]
    with pytest.raises(ValueError, match="different names"):
        split_text([first, first], tmp_path / "other", 0.2)


def test_python_code_is_so_long_and_stays(tmp_path):
    file = python_code(tmp_path / "code.txt", 10_000)
    text = file.read_text(encoding="utf-8")
    assert 9_990 < len(text.encode()) <= 10_000
    assert "import " in text
    assert python_code(file, 5) == file
    assert file.read_text(encoding="utf-8") == text
    with pytest.raises(ValueError, match="at most"):
        python_code(tmp_path / "more.txt", 10**12)


def test_usage_counts_what_is_active_exactly():
    torch.manual_seed(0)
    sae = ps.TopKSAE(d_in=16, d_sae=48, k=6)
    x = torch.randn(150, 16)
    codes = sae.encode(x).mean
    used = usage(sae, iter(x.split(64)))
    assert used.l0 == float((codes != 0).sum()) / 150
    assert used.rates.tolist() == ((codes != 0).double().sum(0) / 150).tolist()
    assert used.is_alive.tolist() == (codes != 0).any(0).tolist()


def tiny_network() -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, hidden_act="relu", max_position_embeddings=6,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(config)


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(language_models, "LOGGED_EVERY", 2)
    monkeypatch.setattr(language_models, "CHECKPOINT_EVERY", 4)
    token_ids = torch.randint(11, (20, 6), generator=torch.Generator().manual_seed(1))
    options = {"n_steps": 10, "batch_size": 5, "learning_rate": 1e-2}

    whole = tiny_network()
    losses = train_(whole, token_ids, **options)
    assert len(losses) == 5
    assert losses[-1] < losses[0]

    step, n_done = language_models._step, 0

    def killed(*args):
        nonlocal n_done
        if n_done == 7:
            raise KeyboardInterrupt
        n_done += 1
        return step(*args)

    monkeypatch.setattr(language_models, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_(tiny_network(), token_ids, **options, checkpoint=tmp_path / "c")
    monkeypatch.setattr(language_models, "_step", step)
    resumed = tiny_network()
    assert train_(resumed, token_ids, **options, checkpoint=tmp_path / "c") == losses
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_every_dictionary_starts_on_its_own():
    every = list(plans(("TopK", "ReLU"), (256, 512), 512))
    assert len(every) == len({plan.name for plan in every}) == 8
    plan = Plan("TopK", 512)
    assert again(plan) in every
    assert of_other(plan) in every
    assert of_other(plan).transformer == 1
    assert len({plan.seed, again(plan).seed, of_other(plan).seed}) == 3


def test_random_directions_fire_as_often_as_they_should():
    x = torch.rand(1_000, 6)
    rates = torch.tensor([0.0, 0.01, 0.25, 0.9])
    z = random_directions(x, rates)(x)
    assert (z > 0).sum(0).tolist() == [0, 10, 250, 900]


def test_summary_by_hand():
    correlation = torch.tensor([[0.2, 0.6], [0.95, 0.1], [0.3, 0.4], [0.99, 0.99]])
    is_alive = torch.tensor([True, True, True, False])
    found = summary(Correspondence(correlation, correlation / 2), is_alive)
    assert found["n"] == 3
    assert found["quartiles"] == pytest.approx([0.5, 0.6, 0.775])
    assert found["chance_quartiles"] == pytest.approx([0.25, 0.3, 0.3875])
    assert found["share_above_.5"] == pytest.approx(2 / 3)
    assert found["share_above_.9"] == pytest.approx(1 / 3)
    assert found["chance_above_.5"] == 0
    assert len(found["counts"]) == N_BINS
    assert sum(found["counts"]) == 3
    assert summary(Correspondence(correlation, correlation), ~is_alive & False)["n"] == 0


def tiny_settings(folder, **changes) -> Settings:
    """Everything of the smallest size that there is."""
    words = {"english": "the cat sat on a mat", "french": "le chat est sur une natte"}
    rng = random.Random(0)
    for name, own in words.items():
        text = " ".join(rng.choice(own.split()) for _ in range(400))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    values = {
        "text": tuple(str(folder / f"{name}.txt") for name in words), "out": folder / "out",
        "n_code_bytes": 0, "n_vocabulary": 260, "context_length": 12, "model_steps": 3,
        "model_batch_size": 2, "n_tokens": 200, "families": ("SpikeSlab", "ReLU"),
        "widths": (4, 8), "compared_width": 8, "l0": 2, "n_steps": 3, "batch_size": 64,
        "n_draws": 2,
    }  # fmt: skip
    return Settings(**(values | changes))


def test_a_folder_keeps_to_its_settings(tmp_path):
    """Rows are not named by all settings: others than a folder was begun with are refused."""
    Run(tiny_settings(tmp_path))
    Run(tiny_settings(tmp_path, widths=(4,), families=("TopK",), threads=3))  # rows name these
    for changes in ({"n_steps": 4}, {"l0": 1}, {"n_held_out": 8}, {"n_code_bytes": 10}):
        name = next(iter(changes))
        with pytest.raises(ValueError, match=f"begun with other settings .*{name} "):
            Run(tiny_settings(tmp_path, **changes))
    settings = tiny_settings(tmp_path)
    (tmp_path / "french.txt").write_text("un autre texte", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other settings .*french\.txt"):
        Run(settings)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say its settings"):
        Run(tiny_settings(tmp_path, out=tmp_path / "old"))


def test_files_of_one_kind_are_one_hypothesis(tmp_path):
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    for path, text in zip(paths, ("one two three", "eins zwei", "four five six"), strict=True):
        path.write_text(text, encoding="utf-8")
    a, b, c = map(str, paths)
    found = texts((f"english={a}", b, f"english={c}"))
    assert [(kind, file.name) for kind, file in found] == [
        ("english", "a.txt"), ("english", "c.txt"), ("b", "b.txt"),
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match="nothing"):
        texts(["english=nothing"])
    words = tokenizer(paths, tmp_path / "tokenizer", 256)  # letters
    kept = contexts(found, words, 4, tmp_path / "contexts")
    assert kept.sizes == {"english": 3 + 3, "b": 2}
    assert kept.labels.tolist() == [0] * 6 + [1] * 2
    assert words.decode(kept.by_kind()["english"][:3].flatten()) == "one two thre"
    assert words.decode(kept.by_kind()["b"].flatten()) == "eins zwe"
    with pytest.raises(ValueError, match=r"at least one context of 10 tokens here, got none of b"):
        contexts(found, words, 10, tmp_path / "longer")
    assert not (tmp_path / "longer").exists()


def test_text_read_in_pieces_has_the_tokens_of_the_whole(tmp_path, corpus, monkeypatch):
    text = corpus[0].read_text(encoding="utf-8")[:4_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    words = tokenizer([tmp_path / "text.txt"], tmp_path / "tokenizer", 400)
    monkeypatch.setattr(language_models, "PIECE", 100)
    cut = list(language_models.pieces(tmp_path / "text.txt"))
    assert "".join(cut) == text
    assert len(cut) > 30
    read = contexts(texts([tmp_path / "text.txt"]), words, 8, tmp_path / "contexts")
    whole = contexts_of(words(text, add_special_tokens=False)["input_ids"], 8)
    assert torch.equal(read.ids.long(), whole)


def test_too_little_text_of_a_kind_is_refused_before_any_training(tmp_path):
    settings = tiny_settings(tmp_path)
    (tmp_path / "french.txt").write_text("le chat est sur " * 6, encoding="utf-8")
    with pytest.raises(ValueError, match="at least one context of 12 tokens here, got none of fr"):
        Run(settings)
    (tmp_path / "french.txt").write_text("le chat est sur " * 14, encoding="utf-8")
    with pytest.raises(ValueError, match="two held-out contexts or more"):
        Run(dataclasses.replace(settings, out=tmp_path / "more", n_held_out=5))
    # Of one kind alone there is no hypothesis, and nothing to refuse.
    Run(tiny_settings(tmp_path, text=(str(tmp_path / "english.txt"),), out=tmp_path / "one"))


@pytest.mark.slow
def test_texts_of_any_size_are_measured(tmp_path, capsys):
    """Three steps leave features dead, undecided or alike: no table breaks on it."""
    main(tiny_settings(tmp_path))
    assert "nan" not in capsys.readouterr().out


@pytest.mark.slow
def test_small_experiment_end_to_end_and_again(tmp_path, corpus, capsys):
    settings = Settings(
        text=(f"english={corpus[0]}",), out=tmp_path, n_code_bytes=20_000, n_vocabulary=300,
        context_length=16, model_steps=75, model_batch_size=16, n_tokens=3_000,
        families=("SpikeSlab", "TopK"),
        widths=(24, 48), compared_width=48, l0=6, n_steps=12, batch_size=256, n_held_out=150,
        n_draws=3,
    )  # fmt: skip
    main(settings)
    tables = capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())
    fits = [name for name in rows if "transformer=" in name]
    assert fits == [plan.name for plan in plans(settings.families, (24, 48), 48)]
    assert rows["transformer 0"]["losses"][-1] < rows["text"]["uniform nll"]
    assert rows["transformer 0"]["losses"] != rows["transformer 1"]["losses"]
    for name in fits:
        row = rows[name]
        assert row["nll"] < rows["text"]["uniform nll"]
        assert sum(row["density"]["counts"]) == int(name.split()[1])
        assert row["neurons"]["random directions"]["n"] == row["alive"]
        assert ("draw" in row["neurons"]) == ("nll_draws" in row) == name.startswith("SpikeSlab")
        if name.startswith("TopK"):
            assert row["l0"] <= 6
    for family in settings.families:
        split = rows[f"splitting {family} 24 48"]
        for by in ("by direction", "by mean", "by p_active"):
            assert split[by]["orphans"] <= split["children"]
            assert split[by]["split"] + split[by]["childless"] <= split["parents"]
        found = rows[f"universality {family} 48"]
        assert 0 <= found["nearer to a neuron than to a feature"] <= 1
        assert ("posterior" in split) == (family == "SpikeSlab")
        assert ("doubt by direction variance" in found) == (family == "SpikeSlab")
    assert len(rows["splitting SpikeSlab 24 48"]["posterior"]["split"]) == 3
    kinds = ["english", "code"]
    for name in ("neurons", *map(" ".join, product(settings.families, ("24", "48")))):
        language = rows[f"language {name}"]
        assert list(language) == kinds
        assert sum(kind["share of its text"] for kind in language.values()) == pytest.approx(1)
        assert all(-1 <= kind["correlation"] <= 1 for kind in language.values())
    for family in settings.families:
        found = rows[f"automata {family} 48"]
        foretold, observed, both = found["loops of one"]
        assert both <= min(foretold, observed) <= found["features"] <= 48
    assert "nan" not in tables
    for name in ("loss", "density", "correlations"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    # The transformer is one like any other: it loads, and a feature's effects reach the logits.
    network = load_language_model(tmp_path / "transformer-0")
    assert logit_effects(network, torch.eye(512)[:2], hook=HOOK).shape == (2, 300)
    before = (tmp_path / "results.json").stat().st_mtime_ns
    main(settings)  # everything is there: nothing is made again
    assert (tmp_path / "results.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out == tables
