"""Language models, dictionaries inside them, and what is asked of both, on a device."""

import copy
import math

import pytest
import torch

import probsae as ps
from probsae.lm import (
    ContextActivations,
    EndToEnd,
    Splicer,
    ablate,
    downstream_fvu,
    final_scale,
    generate,
    log_likelihood_ratio,
    logit_effects,
    maximum_codes,
    pin,
    read_tokens,
    score_hypothesis,
    splice,
    steer,
)
from tests.lm.tiny import VOCABULARY, tiny_language_model, tiny_llama

pytestmark = pytest.mark.slow
IDS = torch.randint(VOCABULARY, (16, 9), generator=torch.Generator().manual_seed(0))
HOOK, LATER = "model.layers.1", ["model.layers.2"]


def at(place, make=tiny_llama):
    language_model = make()
    language_model.network.to(place)
    return language_model


@pytest.fixture(scope="module")
def dictionary():
    torch.manual_seed(0)
    model = ps.SpikeSlabDictionary(d_in=16, d_sae=24)
    x = read_tokens(tiny_llama(), HOOK, IDS)
    ps.fit(model, x, n_steps=30, batch_size=64, device="cpu", compile=False, progress=False)
    return model


def assert_near(its, mine, near):
    torch.testing.assert_close(its, mine, check_device=False, **near)


def test_tokens_are_read(device, near):
    assert_near(read_tokens(at(device), HOOK, IDS), read_tokens(tiny_llama(), HOOK, IDS), near)


@pytest.mark.parametrize("model_here", [True, False])
@pytest.mark.parametrize("dictionary_here", [True, False])
def test_a_splice(model_here, dictionary_here, dictionary, device, near, tmp_path):
    """The dictionary need not be where the model is."""
    mine = splice(tiny_llama(), HOOK, dictionary, IDS, n_draws=2)
    language_model = at(device if model_here else "cpu")
    there = copy.deepcopy(dictionary).to(device if dictionary_here else "cpu")
    its = splice(language_model, HOOK, there, IDS, n_draws=2, checkpoint=tmp_path / "kept")
    again = splice(language_model, HOOK, there, IDS, n_draws=2, checkpoint=tmp_path / "kept")
    alone = Splicer(language_model, HOOK, IDS).splice(there, n_draws=2)
    for name, value in vars(mine).items():
        if not name.startswith("draw") or device == "emulated":
            assert_near(getattr(its, name), value, near)
        assert_near(getattr(again, name), getattr(its, name), near)
        assert_near(getattr(alone, name), getattr(its, name), near)
    assert its.interval() is not None
    assert_near(
        downstream_fvu(language_model, HOOK, there, IDS, LATER),
        downstream_fvu(tiny_llama(), HOOK, dictionary, IDS, LATER),
        near,
    )


def test_a_splice_of_a_function(device, near):
    mine, its = (
        splice(at(place, tiny_language_model), "layers.0", lambda x: 0.5 * x, IDS)
        for place in ("cpu", device)
    )
    assert_near(its.token_kl, mine.token_kl, near)


@pytest.mark.parametrize("family", [ps.SpikeSlabDictionary, ps.TopKSAE])
def test_end_to_end(family, device, near):
    results = []
    for model_place, place in (("cpu", "cpu"), (device, device), (device, "cpu"), ("cpu", device)):
        contexts = ContextActivations(at(model_place), HOOK, IDS)
        torch.manual_seed(0)
        model = family(d_in=16, d_sae=24, **({"k": 4} if family is ps.TopKSAE else {}))
        result = ps.fit(
            model, contexts, objective=EndToEnd(contexts, later=LATER), n_steps=6,
            batch_size=64, device=place, progress=False,
        )  # fmt: skip
        assert model.W_dec.device.type == torch.device(place).type
        assert all(map(math.isfinite, result.history["loss"]))
        results.append(result.history["loss"])
    for its in results[1:]:
        if device == "emulated":
            assert_near(its, results[0], {"rtol": 1e-4, "atol": 1e-4})


def test_interventions(dictionary, device, near):
    logits = []
    for place in ("cpu", device):
        language_model, there = at(place), copy.deepcopy(dictionary).to(place)
        largest = maximum_codes(language_model, HOOK, there, IDS)
        changes = [
            ablate(language_model, HOOK, there, [1, 2]),
            pin(language_model, HOOK, there, 3, 2.0),
            steer(language_model, HOOK, there, 4, 1.0),
        ]
        found = [largest]
        for change in changes:
            with change:
                found.append(language_model.logits(IDS.to(place)))
        logits.append(found)
        with steer(language_model, HOOK, there, 4, 1.0):
            written = generate(
                language_model, IDS[0, :4].tolist(), n_tokens=3, n_samples=2, temperature=1.0
            )
        assert len(written) == 2
    assert_near(logits[1], logits[0], near)


def test_effects(dictionary, device, near):
    effects = [
        logit_effects(at(place), copy.deepcopy(dictionary).to(place).dictionary())
        for place in ("cpu", device)
    ]
    assert_near(effects[1], effects[0], near)
    assert final_scale(at(device), IDS) == pytest.approx(final_scale(tiny_llama(), IDS), rel=1e-3)


def test_hypotheses(dictionary, device, near):
    ids, scores = IDS[:, 1:], []
    for place in ("cpu", device):
        x = read_tokens(at(place), HOOK, IDS)
        proxy = log_likelihood_ratio(ids.to(place), ids[:4].to(place), ids.to(place)).flatten()
        there = copy.deepcopy(dictionary).to(place)
        scores.append(vars(score_hypothesis(there, x.to(place), proxy, progress=False)))
    assert_near(scores[1], scores[0], near)
