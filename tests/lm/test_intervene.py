"""Interventions: exact on hand-made dictionaries, alike with and without a cache."""

import dataclasses

import pytest
import torch

import probsae as ps
from probsae.activations.hooks import find_hook, recorded
from probsae.activations.language_model import LanguageModel
from probsae.lm import ablate, generate, maximum_codes, pin, read_tokens, steer
from tests.lm.tiny import (
    VOCABULARY,
    signed_identity,
    tiny_gpt2,
    tiny_language_model,
    tiny_llama,
    tiny_mamba,
    tiny_opt,
    tiny_rwkv,
)

IDS = torch.randint(VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))
HOOK = "model.layers.1"
# Float error of taking two decodes' difference.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-4}


def seen_at(model, hook, change=None):
    """What leaves a hook, with a change inside the block."""
    point = find_hook(model.network, hook)
    if change is None:
        with recorded([point]) as seen:
            model.logits(IDS)
    else:
        with change, recorded([point]) as seen:
            model.logits(IDS)
    return seen[hook]


def partial_dictionary() -> ps.TopKSAE:
    """A dictionary that explains only part of the activations."""
    return ps.TopKSAE(d_in=16, d_sae=24, k=5).eval()


def test_verbs_by_hand():
    """Feature i of the signed identity is the positive part of dimension i."""
    model, identity = tiny_llama(), signed_identity(16)
    x = seen_at(model, HOOK)
    others = torch.arange(16) != 3
    cases = [
        (ablate(model, HOOK, identity, 3), x[..., 3].clamp(max=0)),
        (pin(model, HOOK, identity, 3, 7.0), 7 + x[..., 3].clamp(max=0)),
        (steer(model, HOOK, identity, 3, -2.0), x[..., 3] - 2),
    ]
    for change, expected in cases:
        y = seen_at(model, HOOK, change)
        torch.testing.assert_close(y[:, 1:, others], x[:, 1:, others], **TOLERANCE)
        torch.testing.assert_close(y[:, 1:, 3], expected[:, 1:], **TOLERANCE)
        assert torch.equal(y[:, 0], x[:, 0])  # kept
    torch.testing.assert_close(seen_at(model, HOOK), x)  # the blocks are over


def test_what_is_not_explained_passes_by():
    model, dictionary = tiny_llama(), partial_dictionary()
    x = seen_at(model, HOOK)
    z = dictionary.encode(x.flatten(0, 1)).mean
    features = [1, 4, 9]
    change = ablate(model, HOOK, dictionary, features, keep_first=False)
    y = seen_at(model, HOOK, change).flatten(0, 1)
    expected = x.flatten(0, 1) - z[:, features] @ dictionary.directions[features]
    torch.testing.assert_close(y, expected.detach(), **TOLERANCE)


def test_pinning_to_what_is_there_changes_nothing():
    model, dictionary = tiny_llama(), partial_dictionary()
    before = model.logits(IDS)
    z = maximum_codes(model, HOOK, dictionary, IDS)
    silent = int(z.argmin())
    assert z[silent] == 0
    with pin(model, HOOK, dictionary, silent, 0.0), ablate(model, HOOK, dictionary, [silent]):
        torch.testing.assert_close(model.logits(IDS), before)
    with steer(model, HOOK, dictionary, [0, 1], [0.0, 0.0]):
        torch.testing.assert_close(model.logits(IDS), before)


def test_interventions_nest_and_end_after_an_error():
    model, dictionary = tiny_llama(), partial_dictionary()
    before = model.logits(IDS)
    with steer(model, HOOK, dictionary, 2, 3.0), steer(model, HOOK, dictionary, 2, 2.0):
        nested = model.logits(IDS)
    with steer(model, HOOK, dictionary, 2, 5.0):
        torch.testing.assert_close(nested, model.logits(IDS), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(nested, before)
    with pytest.raises(KeyboardInterrupt), steer(model, HOOK, dictionary, 2, 5.0):
        raise KeyboardInterrupt
    assert torch.equal(model.logits(IDS), before)


def test_a_list_that_a_module_returns_stays_one():
    """The first GPT's attention: its block joins what comes behind the first element."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    config = OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2)
    network = OpenAIGPTLMHeadModel(config).eval().requires_grad_(False)
    model, hook = LanguageModel("gpt", network), "transformer.h.0.attn"
    x, dictionary = seen_at(model, hook), partial_dictionary()
    y = seen_at(model, hook, steer(model, hook, dictionary, 3, 2.0))
    expected = x[:, 1:] + 2 * dictionary.directions[3]
    torch.testing.assert_close(y[:, 1:], expected.detach(), **TOLERANCE)


def test_non_linear_decoder():
    """With an MLP in the decoder a feature's contribution is the difference of two decodes."""
    torch.manual_seed(0)
    model, dictionary = tiny_llama(), ps.SparseVAE(d_in=16, d_sae=8, decoder_hidden=8)
    for parameter in dictionary.decoder.parameters():
        torch.nn.init.normal_(parameter)
    dictionary.eval()
    x = seen_at(model, HOOK)[:, 1:].flatten(0, 1)
    z = dictionary.encode(x).mean
    y = seen_at(model, HOOK, pin(model, HOOK, dictionary, [0, 5], [4.0, 1.0]))[:, 1:]
    pinned = z.clone()
    pinned[:, 0], pinned[:, 5] = 4.0, 1.0
    expected = x + dictionary.decode(pinned) - dictionary.decode(z)
    assert not torch.allclose(expected, x + (pinned - z) @ dictionary.directions)
    torch.testing.assert_close(y.flatten(0, 1), expected.detach(), **TOLERANCE)


def test_maximum_codes():
    model, dictionary = tiny_llama(), partial_dictionary()
    z = dictionary.encode(read_tokens(model, HOOK, IDS)).mean
    for batch_size in (1, 3):
        largest = maximum_codes(model, HOOK, dictionary, IDS, batch_size=batch_size)
        torch.testing.assert_close(largest, z.amax(0))
    one = maximum_codes(model, HOOK, dictionary, IDS[:, :1], keep_first=False)
    assert one.shape == (dictionary.d_sae,)


NO_TOKENS = [((0, 5), False), ((3, 0), False), ((3, 1), True)]


@pytest.mark.parametrize(("shape", "keep_first"), NO_TOKENS)
def test_maximum_codes_of_no_tokens(shape, keep_first):
    ids = torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"token_ids must .* least {1 + keep_first} position"):
        maximum_codes(tiny_llama(), HOOK, partial_dictionary(), ids, keep_first=keep_first)


def test_no_contexts_are_not_read():
    with pytest.raises(ValueError, match=r"at least one context .* got \(0, 5\)"):
        read_tokens(tiny_llama(), HOOK, torch.zeros(0, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("make", "hook"),
    [
        (tiny_llama, "model.layers.1"),
        (tiny_gpt2, "transformer.h.1"),
        (tiny_opt, "model.decoder.layers.1.fc2"),
        (tiny_mamba, "backbone.layers.1"),
        (tiny_rwkv, "rwkv.blocks.1"),
    ],
)
@pytest.mark.parametrize("keep_first", [True, False])
def test_generation_with_a_cache_is_that_without(make, hook, keep_first):
    """Later steps see one position, which is not a context's first."""
    model, dictionary = make(), partial_dictionary()
    prompt = [5, 17, 3]
    with steer(model, hook, dictionary, [2, 6], [20.0, -9.0], keep_first=keep_first):
        tokens = generate(model, prompt, n_tokens=6)[0].tolist()
        by_hand = list(prompt)
        for _ in range(6):
            by_hand.append(int(model.logits(torch.tensor([by_hand]))[0, -1].argmax()))
    assert prompt + tokens == by_hand
    assert generate(model, prompt, n_tokens=6)[0].tolist() != tokens


def test_generation_samples_the_models_distribution():
    model = tiny_llama()
    draws = [generate(model, "7 8", n_tokens=1, n_samples=400, temperature=1.0, seed=s)
             for s in (0, 0, 1)]  # fmt: skip
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    p = model.logits(torch.tensor([[7, 8]]))[0, -1].softmax(0)
    token = int(p.argmax())
    share = float((draws[0] == token).double().mean())
    deviation = float((p[token] * (1 - p[token]) / 400).sqrt())
    assert abs(share - float(p[token])) < 4 * deviation  # false alarm: 6e-5


def test_bad_arguments():
    model, dictionary = tiny_llama(), partial_dictionary()
    for features in (24, -1, [], [1, 1]):
        with pytest.raises(IndexError), ablate(model, HOOK, dictionary, features):
            pass
    with pytest.raises(ValueError, match="one for each feature, got 3"):
        pin(model, HOOK, dictionary, [1, 2], [1.0, 2.0, 3.0]).__enter__()
    with pytest.raises(TypeError, match="Hugging Face model"):
        generate(tiny_language_model(), "1 2")
    with pytest.raises(ValueError, match="prompt must hold a token"):
        generate(model, "")
    with pytest.raises(ValueError, match="temperature be a number from 0"):
        generate(model, [1], temperature=float("nan"))
    for name in ("n_tokens", "n_samples"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            generate(model, [1], **{name: 0})


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"min_p": 0.5},
        {"typical_p": 0.2},
        {"suppress_tokens": list(range(40))},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
    ],
)
def test_the_models_settings_for_chat_do_not_bend_its_distribution(settings):
    model = tiny_llama()
    options = [{"n_tokens": 8}, {"n_tokens": 3, "n_samples": 50, "temperature": 1.0}]
    plain = [generate(model, [5, 17, 3], **option) for option in options]
    config = model.network.generation_config
    for name, value in settings.items():
        setattr(config, name, value)
    for option, expected in zip(options, plain, strict=True):
        assert torch.equal(generate(model, [5, 17, 3], **option), expected)
    assert model.network.generation_config is config


@pytest.mark.slow
def test_pinned_feature_shows_in_smollm2s_text(smollm2):
    """Pinned far up, the direction that a word is read off by brings the word about."""
    hook = "model.layers.27"
    word = smollm2.tokenize([" the"])[0][0]
    direction = smollm2.network.get_output_embeddings().weight[word].float()
    dictionary = ps.ReLUSAE(d_in=len(direction), d_sae=2)
    with torch.no_grad():
        dictionary.W_dec[0] = direction
    prompt = "My favourite animal is"
    plain = generate(smollm2, prompt, n_tokens=6)
    scale = float(
        read_tokens(smollm2, hook, torch.tensor(smollm2.tokenize([prompt]))).norm(dim=1).median()
    )
    with pin(smollm2, hook, dictionary, 0, 3 * scale):
        pinned = generate(smollm2, prompt, n_tokens=6)
    assert int((pinned == word).sum()) > int((plain == word).sum())
    assert torch.equal(generate(smollm2, prompt, n_tokens=6), plain)


def test_hooks_of_modules_that_are_called_by_name_and_of_whole_models():
    """Llama calls its attention by keyword, and the model inside returns a mapping."""
    model = tiny_llama()
    whole = seen_at(model, "model")
    torch.testing.assert_close(whole, seen_at(model, "model.norm"))
    normed = seen_at(model, "model.layers.1.input_layernorm")
    torch.testing.assert_close(seen_at(model, "model.layers.1.self_attn:input"), normed)
    before = model.logits(IDS)
    for name in ("model", "model.layers.1.self_attn:input"):
        handle = find_hook(model.network, name).attach(lambda x: 2 * x)
        assert not torch.allclose(model.logits(IDS), before)
        handle.remove()
    torch.testing.assert_close(model.logits(IDS), before)


def test_a_prompt_begins_as_texts_do_and_the_argmax_is_the_models():
    model = tiny_llama()
    model.network.generation_config.repetition_penalty = 50.0
    begun = dataclasses.replace(model, bos_token_id=7)
    assert torch.equal(generate(begun, "3 4", n_tokens=4), generate(model, [7, 3, 4], n_tokens=4))
    by_hand = [7, 3, 4]
    for _ in range(4):
        by_hand.append(int(model.logits(torch.tensor([by_hand]))[0, -1].argmax()))
    assert generate(model, [7, 3, 4], n_tokens=4)[0].tolist() == by_hand[3:]
