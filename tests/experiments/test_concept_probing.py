"""Concept probing: its word lists, its contexts, and a small version on real activations."""

import argparse
import dataclasses
import json
import tarfile
from types import SimpleNamespace

import pytest
import torch

from experiments.concept_probing import convergence, make_words
from experiments.concept_probing import run as experiment
from experiments.concept_probing.concepts import (
    TEMPLATES,
    WINDOW,
    WORDS,
    last_activations,
    text_concept,
    word_concepts,
)
from experiments.concept_probing.run import Settings, run
from experiments.concept_probing.settings import check_store
from probsae.activations.harvest import harvest
from tests.lm.tiny import VOCABULARY, tiny_language_model
from tests.metrics.planted import planted as planted_codes

SENSES = """\
dog%1:05:00:: 02084071 1 42
dog%1:06:00:: 03901548 2 0
run%1:04:00:: 00309011 1 9
fly%1:05:00:: 02190166 1 5
fly%2:38:00:: 01940403 1 100
hot_dog%1:13:00:: 07697537 1 7
soup%1:13:00:: 07583066 1 3
bread%1:13:00:: 07679356 1 8"""


def test_word_lists_are_balanced_and_disjoint():
    concepts = json.loads(WORDS.read_text())["concepts"]
    assert len(concepts) == 6
    for lists in concepts.values():
        assert len(set(lists["positive"])) == len(set(lists["negative"])) == make_words.N_WORDS
        assert not set(lists["positive"]) & set(lists["negative"])
    assert "WordNet 3.0 Copyright" in WORDS.read_text()


def test_nouns_by_category_by_hand():
    """`fly` is a verb first, `hot_dog` no single word, `run` of no category that is asked for."""
    nouns = make_words.nouns_by_category(SENSES.splitlines())
    assert nouns["animal"] == ["dog"]
    assert nouns["food"] == ["bread", "soup"]
    assert nouns["person"] == []


def test_first_names_leave_out_those_of_both_sexes(tmp_path):
    lists = {"female": "MARY 2.6 2.6 1\nLEE 0.2 3.0 2\n", "male": "JOHN 3.2 3.2 1\nLEE 0.4 4 2\n"}
    archive = tmp_path / "names.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for sex, text in lists.items():
            file = tmp_path / f"dist.{sex}.first"
            file.write_text(text)
            tar.add(file, f"names/{file.name}")
    assert make_words.first_names(archive) == {"positive": ["Mary"], "negative": ["John"]}


BOS = VOCABULARY - 1


def two_models():
    """One model, its contexts begun by a token and not; a token is the sum of a word's letters."""
    plain = dataclasses.replace(
        tiny_language_model(),
        tokenizer=lambda texts, add_special_tokens: {
            "input_ids": [[sum(map(ord, w)) % (VOCABULARY - 1) for w in t.split()] for t in texts]
        },
    )
    return plain, dataclasses.replace(plain, bos_token_id=BOS)


def test_words_contexts_begin_as_harvested_ones():
    plain, begun = two_models()
    for one, other in zip(word_concepts(plain, 2), word_concepts(begun, 2), strict=True):
        assert other.contexts == [[BOS, *ids] for ids in one.contexts]
        assert (other.labels, other.types) == (one.labels, one.types)


def test_gradients_at_what_solvers_return():
    """Ours and a patient L-BFGS end at one optimum; one that is stopped warns, away from it."""
    codes, labels = (value.numpy() for value in planted_codes(40, 60))
    patient = convergence.scikit_learn("lbfgs", standardise=True, n_steps=1_000)
    ours, theirs = convergence.fit_probe(codes, labels), patient(codes, labels)
    assert ours.gradient(labels) < 1e-9
    # Its tolerance is 1e-4 of the gradient of n times the mean loss over the penalty.
    assert 1e-9 < theirs.gradient(labels) < 1e-3
    distance = float(abs(ours.weight - theirs.weight).max())
    assert distance <= theirs.gradient(labels) / ours.penalty
    stopped = convergence.scikit_learn("lbfgs", standardise=False, n_steps=2)
    row = convergence.measure(stopped, codes, labels)
    assert row["warned"]
    assert row["gradient"] > 1e-3
    assert not convergence.measure(convergence.fit_probe, codes, labels)["warned"]


def test_windows_begin_as_harvested_ones_and_end_in_a_token_of_the_text():
    text = " ".join("abcdefghijklmnopqrstuvwxyz"[i % 26] * (1 + i % 7) for i in range(2_000))
    for model, begin in zip(two_models(), ([], [BOS]), strict=True):
        concept = text_concept(model, "same", text, text, 10)
        assert all(len(ids) == WINDOW for ids in concept.contexts)
        assert all(ids[: len(begin)] == begin for ids in concept.contexts)
        assert all(BOS not in ids[len(begin) :] for ids in concept.contexts)
        assert concept.types == [ids[-1] for ids in concept.contexts]


def test_last_position_is_read_and_never_the_first():
    _, model = two_models()
    contexts = [[BOS, 3, 4], [BOS, 5]]
    read = last_activations(model, "layers.1", contexts, batch_size=2)
    for row, ids in zip(read, contexts, strict=True):
        x = model.network.embed(torch.tensor([ids]))
        for layer in model.network.layers:
            x, _ = layer(x)
        torch.testing.assert_close(row, x[0, len(ids) - 1])
    for first_only in ([BOS], [3], []):
        with pytest.raises(ValueError, match="after their first"):
            last_activations(model, "layers.1", [[BOS, 3], first_only])


def test_a_store_of_other_contexts_is_refused():
    plain, begun = two_models()
    of_plain, of_begun, of_other = (
        SimpleNamespace(index={"model": f"/anywhere/{name}", "settings": settings})
        for name, settings in (("tiny", {}), ("tiny", {"bos_token_id": BOS}), ("else", {}))
    )
    check_store(of_plain, plain)
    check_store(of_begun, begun)
    for store, model in ((of_plain, begun), (of_begun, plain), (of_other, plain)):
        with pytest.raises(ValueError, match="harvest again"):
            check_store(store, model)


@pytest.mark.slow
def test_activations_at_the_last_token_do_not_see_the_padding(smollm2):
    concept = word_concepts(smollm2, n_words=3)[0]
    assert len(concept.contexts) == 6 * len(TEMPLATES)
    assert smollm2.decode(concept.contexts[0])[-1].strip() == "Mary"
    together = last_activations(smollm2, "model.layers.2", concept.contexts)
    for i in (0, 7, 17):
        alone = last_activations(smollm2, "model.layers.2", [concept.contexts[i]])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_windows_end_in_different_tokens(smollm2, corpus):
    english = corpus[0].read_text()[:40_000]
    concept = text_concept(smollm2, "backwards", english[::-1], english, 20)
    assert sum(concept.labels) == 20
    assert len(set(concept.types[:20])) == len(set(concept.types[20:])) == 20
    with pytest.raises(ValueError, match="longer text"):
        text_concept(smollm2, "backwards", english[::-1], english[:500], 20)


@pytest.mark.slow
def test_small_experiment_end_to_end_killed_and_again(tmp_path, smollm2, corpus, monkeypatch):
    harvest(
        smollm2, corpus, "model.layers.2", tmp_path / "store", n_tokens=3_000, context_length=64
    )
    backwards = tmp_path / "backwards.txt"
    backwards.write_text(corpus[0].read_text()[::-1])
    settings = Settings(
        store=tmp_path / "store", english=corpus[0], french=backwards, out=tmp_path / "out",
        code=type(corpus[0])(argparse.__file__), d_sae=64, n_steps=60, batch_size=256, l0=8,
        n_words=8, n_windows=60, n_controls=2, n_draws=3,
    )  # fmt: skip
    n_read, original = 0, experiment.last_activations

    def killed(*arguments):
        nonlocal n_read
        n_read += 1
        if n_read == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(experiment, "last_activations", killed)
    with pytest.raises(KeyboardInterrupt):
        run(settings, smollm2)
    (folder,) = (tmp_path / "out").glob("rows-*")
    n_kept = len(list(folder.glob("*--*.json")))
    assert n_kept > 0
    results = run(settings, smollm2)
    assert n_read == 9  # the three concepts that were finished are not read again

    unreadable = {name for name in results["failures"] if ", " not in name}
    assert len(results["rows"]) == (8 - len(unreadable)) * 9
    assert not unreadable & {"french", "code"}
    for row in results["rows"]:
        assert 0 <= row["interval"][0] <= row["interval"][1] <= 1
        assert 0 <= row["score"] <= 1
        assert set(row["n_different"]) == {"none", "bonferroni", "holm", "benjamini-hochberg"}
        if row["dictionary"] == "SpikeSlab, posterior":
            assert row["codes_interval"][0] <= row["score"] <= row["codes_interval"][1]
        else:
            assert row["codes_interval"] is None
    accuracy = {(r["dictionary"], r["concept"]): r["full_accuracy"] for r in results["rows"]}
    assert accuracy["raw activations", "french"] > 0.8
    assert "| TopK | 8 |" in results["tables"]
    assert results["fvu"]["PCA"] < results["fvu"]["random directions"]
    json.dumps(results, allow_nan=False)

    # In a folder of its own, without a kill, the same figures come out; only unreadable concepts
    # are tried again in the first.
    elsewhere = run(dataclasses.replace(settings, out=tmp_path / "elsewhere"), smollm2)
    assert elsewhere["tables"] == results["tables"]
    n_read = 100
    assert run(settings, smollm2)["tables"] == results["tables"]
    assert n_read == 100 + len(unreadable)
