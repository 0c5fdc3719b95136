"""Concept probing: its word lists, its contexts, and a small version on real activations."""

import argparse
import json
import tarfile

import pytest
import torch

from experiments.concept_probing import make_words
from experiments.concept_probing.concepts import (
    TEMPLATES,
    WORDS,
    last_activations,
    text_concept,
    word_concepts,
)
from experiments.concept_probing.run import Settings, n_different, run
from probsae.activations.harvest import harvest

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


def test_features_that_differ_are_counted_on_one_token_of_each_type():
    types = torch.arange(20).repeat(3)
    labels = types % 2 == 0
    z = torch.randn(60, 4)
    z[:, 1] = labels.float() + 0.1 * torch.randn(60)
    z[20:, 2] = 10.0 * labels[20:]  # differs, but not on the first tokens
    assert n_different(z, labels, types) == 1


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
def test_small_experiment_end_to_end_and_again(tmp_path, smollm2, corpus):
    harvest(
        smollm2, corpus, "model.layers.2", tmp_path / "store", n_tokens=3_000, context_length=64
    )
    backwards = tmp_path / "backwards.txt"
    backwards.write_text(corpus[0].read_text()[::-1])
    settings = Settings(
        store=tmp_path / "store", english=corpus[0], french=backwards, out=tmp_path / "out",
        code=type(corpus[0])(argparse.__file__), d_sae=64, n_steps=60, batch_size=256, l0=8,
        n_words=8, n_windows=60, n_controls=2, n_draws=2,
    )  # fmt: skip
    results = run(settings, smollm2)
    assert len(results["rows"]) == 8 * 8
    for row in results["rows"]:
        assert 0 <= row["interval"][0] <= row["interval"][1] <= 1
        assert 0 <= row["score"] <= 1
        assert (row["draw_interval"] is not None) == (row["dictionary"] == "SpikeSlab, mean")
    accuracy = {(r["dictionary"], r["concept"]): r["full_accuracy"] for r in results["rows"]}
    assert accuracy["raw activations", "french"] > 0.8
    assert "| TopK | 8 |" in results["tables"]
    assert results["fvu"]["PCA"] < results["fvu"]["random directions"]
    json.dumps(results, allow_nan=False)
    # The dictionaries are there, and everything else is seeded: the same figures come out.
    assert run(settings, smollm2)["tables"] == results["tables"]
