"""Features planted in SmolLM2: found by their hypothesis, taken out, pinned, steered, chained.

A feature here is the direction in which the activations of one language, or of code, differ from
those of all: what a dictionary might find, known beforehand.
"""

import pytest
import torch
import torch.nn.functional as F

import probsae as ps
from probsae.lm import (
    ablate,
    excitation,
    excitation_graph,
    final_scale,
    generate,
    log_likelihood_ratio,
    logit_effects,
    loops,
    maximum_codes,
    observed_excitation,
    pin,
    read_tokens,
    score_hypothesis,
    steer,
    token_profile,
)

pytestmark = pytest.mark.slow

HOOK, LENGTH = "model.layers.27", 24
TEXTS = {
    "english": "She was not at all pleased with the letter, and said that the house would be cold "
    "in winter. Her mother, who had never liked the garden, walked slowly to the window and "
    "looked for the carriage that should have been there an hour before. Nobody came. ",
    "french": "Elle n'était pas du tout contente de la lettre, et disait que la maison serait "
    "froide en hiver. Sa mère, qui n'avait jamais aimé le jardin, marchait lentement vers la "
    "fenêtre et cherchait la voiture qui aurait dû être là depuis une heure. ",
    "german": "Sie war mit dem Brief gar nicht zufrieden und sagte, dass das Haus im Winter kalt "
    "sein werde. Ihre Mutter, die den Garten nie gemocht hatte, ging langsam zum Fenster und "
    "suchte den Wagen, der schon vor einer Stunde hätte da sein sollen. ",
    "code": "def total(values):\n    result = 0\n    for value in values:\n"
    "        if value is None:\n            continue\n        result += value\n"
    "    return result\n\nclass Counter:\n"
    "    def __init__(self, start=0):\n        self.start = start\n    def add(self, n):\n",
}


@pytest.fixture(scope="module")
def planted(smollm2):
    """Contexts of four kinds, a dictionary with a feature for each, and with four that are none."""
    contexts = {}
    for name, text in TEXTS.items():
        ids = smollm2.tokenize([text * 4])[0]
        contexts[name] = smollm2.contexts(ids, LENGTH)[:8]
    # Of the median: one massive token outweighs a text's mean.
    centres = torch.stack([
        read_tokens(smollm2, HOOK, ids).median(0).values for ids in contexts.values()
    ])  # fmt: skip
    directions = F.normalize(centres - centres.mean(0), dim=-1)
    others = F.normalize(torch.randn(4, directions.shape[1]), dim=-1)
    dictionary = ps.ReLUSAE(d_in=directions.shape[1], d_sae=8).eval()
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.cat([directions, others]))
        dictionary.W_enc.copy_(dictionary.W_dec.T)
        dictionary.b_dec.copy_(centres.mean(0))
    return contexts, dictionary


def test_each_hypothesis_finds_its_feature(smollm2, planted):
    contexts, dictionary = planted
    every = torch.cat(list(contexts.values()))
    x = read_tokens(smollm2, HOOK, every)
    for i, own in enumerate(contexts.values()):
        proxy = log_likelihood_ratio(every, own, every, window=8)[:, 1:].flatten()
        scores = score_hypothesis(dictionary, x, proxy)
        assert int(scores.correlation.argmax()) == i
        assert float(scores.sensitivity[i]) > 0.9
        assert float(scores.specificity[i]) > 0.7
        assert float(scores.precision[i]) > 2 * scores.share


def loss(model, ids):
    logits = model.logits(ids)[:, :-1].flatten(0, 1)
    return float(F.cross_entropy(logits, ids[:, 1:].flatten()))


def test_without_a_languages_feature_its_text_costs_more(smollm2, planted):
    contexts, dictionary = planted
    before = {kind: loss(smollm2, contexts[kind]) for kind in ("french", "english")}
    with ablate(smollm2, HOOK, dictionary, list(contexts).index("french")):
        after = {kind: loss(smollm2, contexts[kind]) for kind in before}
    assert after["french"] - before["french"] > 0.5
    assert abs(after["english"] - before["english"]) < 0.1


def test_pinned_or_steered_the_model_goes_on_in_french(smollm2, planted):
    contexts, dictionary = planted
    french = list(contexts).index("french")
    every = torch.cat(list(contexts.values()))
    largest = float(maximum_codes(smollm2, HOOK, dictionary, contexts["french"])[french])
    prompt = contexts["english"][0, :8].tolist()

    def evidence():
        ids = generate(smollm2, prompt, n_tokens=16, n_samples=4, temperature=1.0)
        return float(log_likelihood_ratio(ids, contexts["french"], every).mean())

    free = evidence()
    with pin(smollm2, HOOK, dictionary, french, 2 * largest):
        assert evidence() > free
    with steer(smollm2, HOOK, dictionary, french, 2 * largest):
        assert evidence() > free
    assert evidence() == free


def test_effects_and_automata(smollm2, planted):
    """A language lasts: each of its features is followed by itself, in text and by the weights."""
    contexts, dictionary = planted
    every = torch.cat(list(contexts.values()))
    x, features = read_tokens(smollm2, HOOK, every), torch.arange(8)
    posterior = dictionary.encode(x)
    effects = logit_effects(smollm2, dictionary.dictionary(), hook=HOOK)
    tokens = every.unique()
    for i, name in enumerate(("english", "french", "german")):  # raised tokens are of the kind
        proxy = log_likelihood_ratio(tokens[:, None], contexts[name], every)[:, 0]
        agreement = torch.corrcoef(torch.cat([effects[:4, tokens], proxy[None]]))[4, :4]
        assert int(agreement.argmax()) == i
        assert float(agreement[i]) > 0.4

    profile = token_profile(dictionary, x, every[:, 1:].flatten(), features, effects.shape[1])
    base = torch.bincount(every.flatten(), minlength=effects.shape[1]) / every.numel()
    typical = posterior.mean.sum(0) / posterior.p_active.sum(0).clamp(min=1)
    foretold = excitation(typical[:, None] / final_scale(smollm2, every) * effects, base, profile)
    observed = observed_excitation(posterior.p_active.view(len(every), LENGTH - 1, 8))
    assert float(foretold.diagonal()[:4].min()) > 0.02 > float(foretold.diagonal()[4:].max())
    assert float(observed.diagonal()[:4].min()) > 0.3
    found = loops(excitation_graph(observed, features, threshold=0.3), 2)
    lengths = [len(path) for path, _ in found]
    assert lengths == sorted(lengths)
    assert {path[0] for path, _ in found if len(path) == 1} == {0, 1, 2, 3}
