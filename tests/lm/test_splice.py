"""Splicing: identities that hold for any model, an answer by hand, and a real model."""

import math

import pytest
import torch

import probsae as ps
from probsae.lm import splice
from tests.lm.tiny import VOCABULARY, tiny_language_model

IDS = torch.randint(VOCABULARY, (6, 9), generator=torch.Generator().manual_seed(0))


def test_identity_changes_nothing():
    result = splice(tiny_language_model(), "layers.0", lambda x: x, IDS, batch_size=4)
    assert result.cross_entropy_spliced == pytest.approx(result.cross_entropy, rel=1e-6)
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.loss_recovered == pytest.approx(1)
    assert result.n_tokens == 6 * 8


def test_zeros_recover_nothing():
    result = splice(tiny_language_model(), "layers.0", torch.zeros_like, IDS)
    assert result.loss_recovered == pytest.approx(0, abs=1e-6)


def test_last_layer_zeroed_predicts_by_the_head_bias_alone():
    model = tiny_language_model()
    result = splice(model, "layers.1", torch.zeros_like, IDS, keep_first=False)
    log_probabilities = model.network.head.bias.log_softmax(0)
    by_hand = -log_probabilities[IDS[:, 1:]].mean()
    assert result.cross_entropy_zero == pytest.approx(float(by_hand), rel=1e-5)
    assert result.cross_entropy_spliced == pytest.approx(float(by_hand), rel=1e-5)


def test_first_position_is_left_alone():
    seen = []
    splice(tiny_language_model(), "layers.0", lambda x: seen.append(len(x)) or x, IDS)
    assert seen == [6 * 8]


def test_batch_size_does_not_matter():
    results = [
        splice(tiny_language_model(), "layers.0", lambda x: 0.5 * x, IDS, batch_size=n)
        for n in (1, 6)
    ]
    assert results[0].kl == pytest.approx(results[1].kl, rel=1e-5)
    assert results[0].kl > 0


def test_bad_token_ids():
    with pytest.raises(ValueError, match="at least 2 positions"):
        splice(tiny_language_model(), "layers.0", lambda x: x, IDS[:, :1])


def test_dictionary_inside_smollm2(smollm2, corpus):
    text = corpus[0].read_text(encoding="utf-8")[:20_000]
    ids = torch.tensor(smollm2.tokenize([text])[0][: 8 * 64]).view(8, 64)
    pca = ps.baselines.PCA(d_sae=64)
    from probsae.activations.hooks import capture, find_hook

    point = find_hook(smollm2.network, "model.layers.7")
    with torch.no_grad():
        (x,) = capture(smollm2.network, [point], lambda: smollm2.network(input_ids=ids))
    pca.fit(x[:, 1:].flatten(0, 1))
    result = splice(
        smollm2, "model.layers.7", lambda x: pca.decode(pca.encode(x).mean), ids, batch_size=4
    )
    assert result.cross_entropy < result.cross_entropy_spliced < result.cross_entropy_zero
    assert 0.3 < result.loss_recovered < 1
    assert result.cross_entropy < math.log(49_152) / 2
