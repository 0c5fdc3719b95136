"""The end-to-end experiment: its parts by hand, kills, and a small version of it all."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import probsae as ps
from experiments import language_models
from experiments.end_to_end import fits
from experiments.end_to_end.fits import (
    FAMILIES,
    OBJECTIVES,
    Plan,
    TargetL0ByPenalty,
    fitted,
    plans,
    tuned_rate,
)
from experiments.end_to_end.measure import measure
from experiments.end_to_end.model import CharacterTokenizer, split_contexts
from experiments.end_to_end.run import Results, Settings, main, open_language_model, shared_settings
from experiments.end_to_end.tables import at_l0, l0_at_loss, markdown
from probsae.activations.language_model import LanguageModel
from probsae.inference import Checkpoint
from probsae.lm import ContextActivations, splice
from tests.lm.tiny import VOCABULARY, WordTokenizer, tiny_language_model, tiny_llama

IDS = torch.randint(VOCABULARY, (40, 9), generator=torch.Generator().manual_seed(0))


def test_a_dictionarys_name_holds_all_that_it_is_of():
    plan = Plan("TopK", "local", 4, 0)
    changes = {"family": "ReLU", "objective": "end to end", "target_l0": 8, "seed": 1,
               "learning_rate": 0.01}  # fmt: skip
    assert changes.keys() == {field.name for field in fields(Plan)}
    names = {plan.name, *(replace(plan, **{key: new}).name for key, new in changes.items())}
    assert len(names) == 1 + len(changes)


def test_rates_are_those_asked_for_or_the_tuned_ones():
    every = list(plans(FAMILIES, OBJECTIVES, (2, 4), (0,), ()))
    assert len({plan.name for plan in every}) == len(FAMILIES) * 2 * len(OBJECTIVES)
    assert {p.learning_rate for p in every if p.family == "SpikeSlab"} == {None}
    assert all(p.learning_rate == tuned_rate(p.family, p.objective) for p in every)
    asked = list(plans(("TopK",), OBJECTIVES, (2,), (0,), (1e-3, 1e-2)))
    assert [p.learning_rate for p in asked] == [1e-3, 1e-2] * len(OBJECTIVES)


def test_rows_of_other_settings_are_refused(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("one two")
    settings = Settings(text, out=tmp_path)
    file = tmp_path / "results.json"
    Results(file, shared_settings(settings)).add("a", {"x": math.nan})
    assert Results(file, shared_settings(settings)).rows == {"a": {"x": None}}
    of_row = {"out": tmp_path / "b", "families": ("TopK",), "objectives": ("local",), "l0s": (3,),
              "seeds": (5,), "rates": (0.1,), "device": "cuda", "threads": 2}  # fmt: skip
    changes = {"model": "other", "hook": "h", "later": ("l",), "d_sae": 1, "n_steps": 1,
               "batch_size": 1, "later_weight": 2.0, "context_length": 8, "n_draws": 1,
               "language_model_steps": 1, "n_held_out": 1}  # fmt: skip
    every = {field.name for field in fields(Settings)}
    assert every == {"text", *of_row, *changes}  # none is forgotten
    Results(file, shared_settings(replace(settings, **of_row)))
    for name, value in changes.items():
        with pytest.raises(ValueError, match=f"was made with {name}="):
            Results(file, shared_settings(replace(settings, **{name: value})))
    text.write_text("three")
    with pytest.raises(ValueError, match="was made with text='book"):
        Results(file, shared_settings(settings))
    file.write_text(json.dumps({"TopKSAE local 0": {}}))
    with pytest.raises(ValueError, match="pass the same settings, or another --out"):
        Results(file, shared_settings(settings))


def test_contexts_begin_as_the_models_texts_do(tmp_path, monkeypatch):
    monkeypatch.setattr(language_models, "PIECE", 20)  # some seven words at a time
    tiny = tiny_language_model()
    model = LanguageModel("tiny", tiny.network, WordTokenizer(), bos_token_id=7)
    text = " ".join(str(i % VOCABULARY) for i in range(103))
    file = tmp_path / "numbers.txt"
    file.write_text(text)
    train, held_out = split_contexts(model, file, 11, 0.2, tmp_path / "with")
    assert (len(train), len(held_out)) == (8, 2)
    both = torch.cat([train, held_out])
    assert bool((both[:, 0] == 7).all())
    assert both[:, 1:].flatten().tolist() == [i % VOCABULARY for i in range(100)]
    without, _ = split_contexts(tiny, file, 11, 0.2, tmp_path / "without")
    assert without[0].tolist() == list(range(11))
    with pytest.raises(ValueError, match="got 1 in all"):
        split_contexts(model, file, 90, 0.2, tmp_path / "long")
    file.unlink()  # what is on disk is mapped
    again, _ = split_contexts(model, file, 11, 0.2, tmp_path / "with")
    assert torch.equal(again, train)


def test_characters_are_numbered_by_how_often_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(language_models, "PIECE", 4)
    file = tmp_path / "text.txt"
    file.write_text("bab ca a ä")
    tokenizer = CharacterTokenizer(file)
    assert tokenizer.characters == [" ", "a", "b", "c", "ä"]
    assert tokenizer(["aä?"])["input_ids"] == [[1, 4, 4]]


@pytest.mark.parametrize("family", [ps.TopKSAE, ps.SpikeSlabDictionary])
def test_the_first_position_counts_nowhere(family):
    language_model = tiny_language_model()
    options = {"k": 4} if family is ps.TopKSAE else {}
    model = family(d_in=12, d_sae=20, **options).eval()
    row = measure(model, language_model, "layers.0", ["layers.1"], IDS, n_draws=2)
    result = splice(language_model, "layers.0", model, IDS, n_draws=2, progress=False)
    assert bool((result.token_kl[:, 0].abs() < 1e-6).all())
    assert row["kl"] == pytest.approx(float(result.token_kl[:, 1:].mean()), rel=1e-5)
    increase = result.token_cross_entropy_spliced - result.token_cross_entropy
    assert row["ce_increase"] == pytest.approx(float(increase[:, 1:].mean()), rel=1e-4, abs=1e-6)
    if model.is_deterministic:
        assert row["ce_increase_draws"] is None
        assert row["ce_increase_hard"] == row["ce_increase"]
    else:
        drawn = (result.draw_cross_entropy - result.token_cross_entropy)[..., 1:]
        assert row["ce_increase_draws"] == pytest.approx(float(drawn.mean()), rel=1e-4, abs=1e-6)


def test_a_penalty_is_steered_to_the_l0():
    data = ps.SyntheticActivations(d_in=16, n_features=24, n_active=3, seed=0)
    model = ps.ReLUSAE(d_in=16, d_sae=32, l1_coefficient=0.02)
    ps.fit(
        model, data, n_steps=400, batch_size=128, compile=False, callbacks=[TargetL0ByPenalty(4)]
    )
    x, _ = data.sample(2_000, seed=1)
    assert float((model.encode(x).mean > 0).sum(1).float().mean()) == pytest.approx(4, rel=0.1)


class _KilledCheckpoint(Checkpoint):
    def on_step(self, state):
        super().on_step(state)
        if state.step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_fit_goes_on_to_the_same_dictionary(family, tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "_CHECKPOINT_EVERY", 4)
    contexts = ContextActivations(tiny_language_model(), "layers.0", IDS)
    plan = Plan(family, "with downstream", 3, 0)
    options = {"d_sae": 16, "n_steps": 6, "batch_size": 40, "later_weight": 1.0, "device": "cpu"}
    whole = fitted(plan, contexts, ["layers.1"], tmp_path / "a", **options)
    with monkeypatch.context() as patch:
        patch.setattr(fits, "Checkpoint", _KilledCheckpoint)
        with pytest.raises(KeyboardInterrupt):
            fitted(plan, contexts, ["layers.1"], tmp_path / "b", **options)
    again = fitted(plan, contexts, ["layers.1"], tmp_path / "b", **options)
    assert torch.equal(again.W_dec, whole.W_dec)
    assert again.hyperparameters() == whole.hyperparameters()
    assert len(list((tmp_path / "b").iterdir())) == 1  # the checkpoint is gone
    assert torch.equal(fitted(plan, contexts, [], tmp_path / "b", **options).W_dec, whole.W_dec)


def power_law_rows(seed=0):
    """CE + is 8 / l0 locally, and a quarter of it under the others."""
    rows = {}
    for plan in plans(("TopK",), OBJECTIVES, (2, 4, 8), (seed,), (1e-3,)):
        loss = 8 / plan.target_l0 / (1 if plan.objective == "local" else 4)
        figures = {"l0": plan.target_l0, "ce_increase": loss, "alive": 30}
        others = dict.fromkeys(("ce_increase_hard", "kl", "fvu", "downstream_fvu"), 0.5)
        rows[plan.name] = vars(plan) | figures | others | {"ce_increase_draws": None}
    return rows


def test_tables_read_power_laws_exactly():
    local = [row for row in power_law_rows().values() if row["objective"] == "local"]
    for l0 in (2, 3, 5, 8):
        assert at_l0(local, "ce_increase", l0) == pytest.approx(8 / l0)
    assert l0_at_loss(local, 2.0) == pytest.approx(4)
    assert math.isnan(l0_at_loss(local, 0.1))
    tables = markdown(power_law_rows(0) | power_law_rows(1))
    assert "| TopK | 4 | 2 | 0.5 | 0.5 | 30 | 30 | 30 |" in tables  # at equal l0
    assert "| TopK | 1 | 8 | 2 | 2 |" in tables  # l0 for the loss of local at 8
    lone = {name: row | {"l0": 4.5} for name, row in power_law_rows().items()
            if row["target_l0"] == 4}  # fmt: skip
    assert "| TopK | 4 | - | - | - |" in markdown(lone)  # no curve to read l0 = 4 off


def save_tiny_model(folder, text):
    """Save an untrained Llama whose tokenizer puts a token in front of every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], show_progress=False)
    bpe.train_from_iterator([text], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>").save_pretrained(folder)
    tiny_llama(n_vocabulary=bpe.get_vocab_size()).network.save_pretrained(folder)


def test_a_loaded_model_begins_contexts_with_its_own_token(tmp_path, corpus):
    text = corpus[0].read_text(encoding="utf-8")[:8_000]
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    save_tiny_model(tmp_path / "model", text)
    settings = Settings(
        tmp_path / "book.txt", out=tmp_path / "out", model=str(tmp_path / "model"), d_sae=24,
        hook="model.layers.0", later=("model.layers.1",), families=("TopK",), l0s=(4,),
        n_steps=2, batch_size=62, context_length=32, n_held_out=4,
    )  # fmt: skip
    language_model = open_language_model(settings)
    train, _ = split_contexts(language_model, settings.text, 32, 0.1, tmp_path / "contexts")
    assert language_model.decode(train[0, :1].tolist()) == ["<s>"]
    assert bool((train[:, 0] == train[0, 0]).all())
    main(settings)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["objective"] for row in rows.values()] == list(OBJECTIVES)
    assert not (tmp_path / "out" / "language_model").exists()


@pytest.mark.slow
def test_small_experiment_end_to_end_and_again(tmp_path, corpus, capsys):
    settings = Settings(
        corpus[0], out=tmp_path, n_steps=12, language_model_steps=60, d_sae=64, batch_size=252,
        n_held_out=20, n_draws=2, l0s=(4,), seeds=(0,),
    )  # fmt: skip
    main(settings)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert list(rows) == [plan.name for plan in plans(FAMILIES, OBJECTIVES, (4,), (0,), ())]
    for row in rows.values():
        assert 0 < row["kl"] < 2
        if row["objective"] != "end to end":  # which nothing holds to the activations' size
            assert 0 < row["downstream_fvu"] < 1.5
        if row["family"] == "TopK":
            assert row["l0"] <= row["target_l0"]
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    made = [*(tmp_path / "dictionaries").iterdir(), tmp_path / "language_model"]
    before = [path.stat().st_mtime_ns for path in made]
    capsys.readouterr()
    main(settings)  # everything is there: nothing is fitted again
    assert [path.stat().st_mtime_ns for path in made] == before
    assert capsys.readouterr().out.strip() == (tmp_path / "tables.md").read_text().strip()
    with pytest.raises(ValueError, match="was made with n_steps=12"):
        main(replace(settings, n_steps=13))
