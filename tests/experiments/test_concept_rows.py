"""Concept probing's rows: what makes them, that they are kept, and the tables made of them."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from experiments.concept_probing import representations
from experiments.concept_probing import settings as settings_module
from experiments.concept_probing.concepts import Concept
from experiments.concept_probing.measure import ConceptProbe, n_different
from experiments.concept_probing.representations import Representation
from experiments.concept_probing.rows import Row, RowFolder, fill
from experiments.concept_probing.settings import Settings, digest, row_facts
from experiments.concept_probing.tables import family_wise, markdown
from probsae.activations import ActivationStore, StoreWriter
from probsae.inference import Checkpoint
from probsae.metrics import probing
from tests.lm.tiny import tiny_language_model

INDEX = {
    "model": "/models/tiny", "hook": "layers.1", "settings": {"text": "a"},
    "shards": [{"sha256": "1"}],
}  # fmt: skip


def row(dictionary="TopK", concept="food", **changes):
    fields = {
        "dictionary": dictionary, "concept": concept, "score": 0.4, "interval": [0.3, 0.5],
        "codes_interval": None, "chance": 0.05, "fidelity": [0.2, 0.4, 0.6, 0.95],
        "accuracy": [0.6, 0.7, 0.8, 0.9], "selectivity": [0.1, 0.2, 0.3, 0.4],
        "selectivity_interval": [[0.0, 0.2]] * 4, "full_accuracy": 0.9, "full_selectivity": 0.4,
        "full_interval": [0.3, 0.5], "memory_accuracy": 0.95, "memory_control": 0.7,
        "memory_interval": [0.2, 0.3], "n_tests": 10, "commit": "abc",
        "n_different": {"none": 4, "bonferroni": 1, "holm": 2, "benjamini-hochberg": 3},
        "score_draws": [0.3, 0.4, 0.5],
    }  # fmt: skip
    return Row(**(fields | changes))


def concept(name):
    return Concept(name, [[1, 2]] * 4, [True, True, False, False], [0, 1, 2, 3])


# -------------------------------------------------------------------------- what makes a row


@pytest.fixture
def asked(tmp_path):
    for name in ("english", "french", "code"):
        (tmp_path / name).write_text(name)
    files = {name: tmp_path / name for name in ("english", "french", "code")}
    return Settings(store=tmp_path, out=tmp_path / "out", **files)


def name_of(settings, index=INDEX, model=None):
    store = SimpleNamespace(index=index)
    return digest(row_facts(settings, store, model or tiny_language_model()))


def test_every_setting_makes_other_rows(asked, tmp_path):
    """A new setting that is not among the facts fails here."""
    (tmp_path / "other").write_text("other")
    usual = name_of(asked)
    # Where results go and how fast; the store and the model speak for themselves, below.
    silent = {"out", "threads", "store", "model"}
    for field in dataclasses.fields(Settings):
        value = getattr(asked, field.name)
        other = tmp_path / "other" if field.name in ("english", "french", "code") else value
        if isinstance(value, int) or value is None:
            other = (value or 0) + 1
        changed = dataclasses.replace(asked, **{field.name: other})
        assert (name_of(changed) == usual) == (field.name in silent), field.name


def test_store_model_words_and_code_make_other_rows(asked, tmp_path, monkeypatch):
    usual = name_of(asked)
    others = {"model": "b", "hook": "layers.0", "settings": {"text": "b"}, "shards": []}
    for key, other in others.items():
        assert name_of(asked, index=INDEX | {key: other}) != usual, key
    model = tiny_language_model()
    assert name_of(asked, model=dataclasses.replace(model, bos_token_id=7)) != usual
    assert name_of(asked, model=dataclasses.replace(model, name="b")) != usual
    asked.english.write_text("another english")
    assert name_of(asked) != usual
    asked.english.write_text("english")
    assert name_of(asked) == usual
    with monkeypatch.context() as patch:
        (tmp_path / "words.json").write_text("{}")
        patch.setattr(settings_module, "WORDS", tmp_path / "words.json")
        assert name_of(asked) != usual
    monkeypatch.setattr(settings_module, "source_digest", lambda folder: "other code")
    assert name_of(asked) != usual


# ------------------------------------------------------------------------------- keeping rows


def test_rows_of_other_facts_are_never_mixed(tmp_path):
    first, other = RowFolder(tmp_path, {"n": 1}), RowFolder(tmp_path, {"n": 2})
    first.write(row())
    assert first.read("TopK", "food") == row()
    assert other.read("TopK", "food") is None
    assert RowFolder(tmp_path, {"n": 1}).read("TopK", "food") == row()
    (first.path / "facts.json").write_text(json.dumps({"n": 3}))
    with pytest.raises(FileExistsError, match="another"):
        RowFolder(tmp_path, {"n": 1})


def test_killed_run_goes_on_and_an_unreadable_concept_costs_no_other(tmp_path):
    folder = RowFolder(tmp_path, {})
    names, made = ["raw", "TopK"], []
    kill_at = "code"

    def probes(number, concept):
        if concept.name == "noise":
            raise ValueError("the raw probe is not selective")

        def probe(name):
            if concept.name == kill_at and name == "TopK":
                raise KeyboardInterrupt
            if (concept.name, name) == ("french", "raw"):
                raise probing.ProbeConvergenceError("gradient")
            made.append((concept.name, name))
            return row(name, concept.name, score=number / 10)

        return probe

    concepts = [concept(name) for name in ("food", "noise", "french", "code")]
    with pytest.raises(KeyboardInterrupt):
        fill(folder, concepts, names, probes)
    before = [("food", "raw"), ("food", "TopK"), ("french", "TopK"), ("code", "raw")]
    assert made == before
    kill_at = ""
    rows, failures = fill(folder, concepts, names, probes)
    assert made == [*before, ("code", "TopK")]
    assert [(r.concept, r.dictionary) for r in rows] == [*before, ("code", "TopK")]
    assert [r.score for r in rows] == [0.0, 0.0, 0.2, 0.3, 0.3]
    assert failures == {"noise": "the raw probe is not selective", "french, raw": "gradient"}


def test_finished_concepts_are_not_opened_again(tmp_path):
    folder = RowFolder(tmp_path, {})
    folder.write(row("raw", "food"))

    def probes(number, concept):
        raise AssertionError("everything is there")

    rows, failures = fill(folder, [concept("food")], ["raw"], probes)
    assert rows == [row("raw", "food")]
    assert failures == {}


# ---------------------------------------------------------------------------------- measuring


class _KilledCheckpoint(Checkpoint):
    def on_step(self, state):
        super().on_step(state)
        if state.step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["SpikeSlab", "TopK"])
def test_a_killed_fit_goes_on_to_the_same_dictionary(name, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(representations, "_CHECKPOINT_EVERY", 4)
    writer = StoreWriter(tmp_path / "s", 8)
    writer.append(torch.randn(400, 8))
    writer.finish()
    store = ActivationStore(tmp_path / "s")
    small = dataclasses.replace(asked, d_sae=16, n_steps=7, batch_size=40, l0=2)
    whole = representations.fitted(dataclasses.replace(small, out=tmp_path / "a"), name, store)
    with monkeypatch.context() as patch:
        patch.setattr(representations, "Checkpoint", _KilledCheckpoint)
        with pytest.raises(KeyboardInterrupt):
            representations.fitted(small, name, store)
    again = representations.fitted(small, name, store)
    assert torch.equal(again.W_dec, whole.W_dec)
    assert float(again.noise_scale) == float(whole.noise_scale)
    assert len(list((small.out / "dictionaries").iterdir())) == 1  # the checkpoint is gone


def test_features_that_differ_are_counted_on_one_token_of_each_type():
    types = torch.arange(20).repeat(3)
    labels = types % 2 == 0
    z = torch.randn(60, 4)
    z[:, 1] = labels.float() + 0.1 * torch.randn(60)
    z[20:, 2] = 10.0 * labels[20:]  # differs, but not on the first tokens
    counts = n_different(z, labels, types)
    assert counts["bonferroni"] == counts["holm"] == 1
    assert 1 <= counts["benjamini-hochberg"] <= counts["none"] <= 4


def test_corrections_are_counted_each_by_its_own_rule(monkeypatch):
    p = torch.tensor([0.01, 0.015, 0.03, 0.2])
    monkeypatch.setattr(probing, "welch_tests", lambda z, labels: SimpleNamespace(p_value=p))
    # Bonferroni: times 4; Holm: .04, .045, .06; Benjamini-Hochberg: .03, .03, .04, .2.
    counts = n_different(torch.zeros(4, 4), torch.arange(4) < 2, torch.arange(4))
    assert counts == {"none": 3, "bonferroni": 1, "holm": 2, "benjamini-hochberg": 3}


@pytest.fixture
def planted():
    labels = torch.arange(40) % 2 == 0
    x = torch.randn(40, 3)
    x[:, 0] += 4 * labels
    contexts = [[0, i] for i in range(40)]
    return Concept("planted", contexts, labels.tolist(), list(range(40))), x


def test_rows_of_a_planted_concept(planted, asked):
    one = ConceptProbe(dataclasses.replace(asked, n_controls=2), *planted, seed=0)

    def draws(x):
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            yield x + 3 * torch.randn(x.shape, generator=generator)

    plain = one.row("raw", Representation(lambda x: x))
    drawn = one.row("drawn", Representation(lambda x: next(draws(x)), None, draws))
    assert plain.codes_interval is None
    assert plain.score > drawn.score > 0
    assert drawn.codes_interval[0] <= drawn.score <= drawn.codes_interval[1]
    assert len(plain.score_draws) == len(drawn.score_draws) == 1_000
    assert plain.n_tests == 3
    assert [plain.features_for(share) for share in (0.1, 2.0)] == [1, None]
    json.dumps(dataclasses.asdict(drawn), allow_nan=False)
    assert one.row("raw", Representation(lambda x: x)) == plain


def test_a_concept_that_raw_activations_do_not_tell_is_refused(planted, asked):
    concept, _ = planted
    with pytest.raises(ValueError, match="not selective"):
        ConceptProbe(asked, concept, torch.arange(40)[:, None] // 2 * 1.0, seed=0)


# ------------------------------------------------------------------------------------- tables


def test_tables_by_hand():
    better = {"score": 0.5, "fidelity": [0.6, 0.7, 0.8, 0.85], "score_draws": [0.4, 0.5, 0.6]}
    rows = [row(), row("ours", **better), row(concept="lost")]
    text = markdown(rows, {"TopK": 32.0, "ours": 30.0}, {"TopK": 0.2})
    assert "| ours | 30 | - | 0.500 [0.410, 0.590] | 0.050 | 0.60 | 0.70 | 0.80 | 0.85 |" in text
    assert "| ours | +0.100 [+0.100, +0.100] | 1 of 1 |" in text
    # .5 with 1 against 5, .7 with 2 against 16, .9 with none against 16.
    assert "| ours | 1 / 0 / 0 | 1 / 0 / 0 | 0 / 0 / 1 |" in text
    assert "lost" not in text  # ours has no row of it
    assert "| ours | 10 | 0 | 4.0 | 1.0 | 2.0 | 3.0 |" in text
    assert "uncorrected | Bonferroni | Holm | Benjamini-Hochberg |" in text
    assert "| 16,384 | below 1e-300 | 0.849 | 3.131e-06 | 3.052e-06 |" in text
    assert markdown(rows[1:], {}, {}).startswith("No concept")


def test_posterior_interval_stands_beside_the_score():
    rows = [row(), row("posterior", codes_interval=[0.38, 0.42])]
    text = markdown(rows, {"TopK": 32.0, "posterior": 32.0}, {})
    assert "| food | 0.40 [0.30, 0.50] | 0.40 [0.30, 0.50]; codes [0.38, 0.42] |" in text


def test_family_wise_arithmetic():
    lines = family_wise({16_384, 1}).splitlines()
    assert lines[2] == "| 1 | 9.5e-01 | 1.000 | 5.000e-02 | 5.000e-02 |"
    assert f"{0.99999**16_384:.3f}" in lines[3]
