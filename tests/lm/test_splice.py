"""Splicing: identities that hold for any model, answers by hand, and a real model."""

import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from pyro.distributions import Normal
from scipy import stats

import probsae as ps
from probsae.activations.harvest import harvest
from probsae.activations.hooks import edited, find_hook, recorded
from probsae.distributions import SpikeSlab
from probsae.lm import Splicer, SpliceResult, downstream_fvu, generate, read_tokens, splice
from tests.conftest import FALSE_ALARM_RATE
from tests.lm.tiny import (
    VOCABULARY,
    signed_identity,
    tiny_gpt2,
    tiny_language_model,
    tiny_llama,
    tiny_opt,
)

IDS = torch.randint(VOCABULARY, (6, 9), generator=torch.Generator().manual_seed(0))
D_IN = 12


class Coin:
    """A dictionary of one feature that is on, at 1, with probability .3, whatever it sees."""

    def __init__(self, d_in: int = D_IN):
        self.W_dec = torch.ones(1, d_in)

    def encode(self, x):
        logits = torch.full((len(x), 1), math.log(0.3 / 0.7))
        slab = Normal(torch.ones(len(x), 1), torch.full((len(x), 1), 1e-9))
        return ps.CodePosterior(SpikeSlab(logits, slab))

    def decode(self, z):
        return z @ self.W_dec

    def dictionary(self):
        return self.W_dec


def constant(value: torch.Tensor) -> ps.ReLUSAE:
    """An SAE without an active feature: it decodes everything to `value`."""
    model = ps.ReLUSAE(d_in=len(value), d_sae=4)
    with torch.no_grad():
        model.b_dec.copy_(value)
        model.b_enc.fill_(-1e9)
    return model.eval()


@pytest.mark.parametrize("replacement", [lambda x: x, signed_identity(D_IN)])
@pytest.mark.parametrize("hook", ["layers.0", "layers.1", "layers.1.mlp", "layers.1:input"])
def test_identity_changes_nothing(replacement, hook):
    result = splice(tiny_language_model(), hook, replacement, IDS, batch_size=4)
    assert result.cross_entropy_spliced == pytest.approx(result.cross_entropy, rel=1e-6)
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.loss_recovered == pytest.approx(1)
    assert result.loss_recovered_from_mean == pytest.approx(1)
    assert result.n_tokens == 6 * 8


def test_tokens_that_a_module_is_given_in_one_row_are_told_apart():
    """OPT's MLP: the contexts' first positions are kept there as everywhere."""
    model = tiny_opt()
    hook, block = "model.decoder.layers.2.fc2:input", model.network.model.decoder.layers[2]
    with recorded([find_hook(model.network, "model.decoder.layers.2.fc1:input")]) as seen:
        model.logits(IDS)
    (x,) = seen.values()
    hidden = block.fc1(x).relu().view(*IDS.shape, -1)
    torch.testing.assert_close(read_tokens(model, hook, IDS), hidden[:, 1:].flatten(0, 1))
    result = splice(model, hook, lambda x: torch.zeros_like(x), IDS, batch_size=4)
    hidden[:, 1:] = 0
    with edited(find_hook(model.network, hook), lambda x: hidden.view_as(x)):
        logits = model.logits(IDS)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.mT, IDS[:, 1:], reduction="none")
    torch.testing.assert_close(result.token_cross_entropy_zero, expected)
    torch.testing.assert_close(result.token_cross_entropy_spliced, expected)
    later = "model.decoder.layers.2.fc2"
    assert downstream_fvu(model, hook, signed_identity(24), IDS, [later])[later] < 1e-10


def test_networks_in_training_mode_are_refused(tmp_path):
    """GPT-2 drops a tenth: the identity would change what it predicts."""
    model, hook = tiny_gpt2(), "transformer.h.1"
    model.network.train()
    (tmp_path / "text.txt").write_text("1 2 3 4 5 6 7 8")
    calls = [
        lambda: splice(model, hook, lambda x: x, IDS),
        lambda: read_tokens(model, hook, IDS),
        lambda: generate(model, [1, 2]),
        lambda: harvest(model, tmp_path / "text.txt", hook, tmp_path / "out", context_length=4),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"call network\.eval\(\)"):
            call()


def test_hooks_that_pass_no_vector_a_token_are_refused():
    with pytest.raises(ValueError, match="one vector of each of 6 x 9 tokens must pass the hook"):
        splice(tiny_gpt2(), "transformer.wpe", lambda x: x, IDS)  # one row for all contexts


def test_zero_dictionary_is_zero_ablation():
    result = splice(tiny_language_model(), "layers.0", constant(torch.zeros(D_IN)), IDS)
    assert torch.equal(result.token_cross_entropy_spliced, result.token_cross_entropy_zero)
    assert result.loss_recovered == pytest.approx(0, abs=1e-6)


def test_dictionary_of_the_mean_is_mean_ablation():
    model = tiny_language_model()
    mean = read_tokens(model, "layers.0", IDS, batch_size=4).mean(0)
    result = splice(model, "layers.0", constant(mean), IDS, batch_size=4)
    torch.testing.assert_close(
        result.token_cross_entropy_spliced, result.token_cross_entropy_mean, rtol=1e-5, atol=1e-5
    )
    assert result.loss_recovered_from_mean == pytest.approx(0, abs=1e-4)
    given = splice(model, "layers.0", lambda x: x, IDS, mean=torch.zeros(D_IN))
    assert given.cross_entropy_mean == given.cross_entropy_zero


def test_last_layer_by_hand():
    model = tiny_language_model()
    bias = model.network.head.bias
    result = splice(model, "layers.1", torch.zeros_like, IDS, keep_first=False)
    by_hand = -bias.log_softmax(0)[IDS[:, 1:]]
    torch.testing.assert_close(result.token_cross_entropy_zero, by_hand)
    torch.testing.assert_close(result.token_cross_entropy_spliced, by_hand)
    original = model.logits(IDS)[:, :-1].log_softmax(-1)
    kl = (original.exp() * (original - bias.log_softmax(0))).sum(-1)
    torch.testing.assert_close(result.token_kl, kl, rtol=1e-4, atol=1e-6)


def test_a_token_changes_nothing_before_it():
    """Causality: what is put in at position 5 shows in predictions 5 and later only."""
    model = tiny_llama()

    def change_position_five(x):
        x = x.view(6, 8, 16).clone()
        x[:, 4] += 10  # position 0 is kept and not among the tokens
        return x.flatten(0, 1)

    result = splice(model, "model.layers.0", change_position_five, IDS)
    assert torch.equal(result.token_kl[:, :5], torch.zeros(6, 5))
    assert bool((result.token_kl[:, 5:].abs() > 1e-6).all())


@pytest.mark.parametrize("keep_first", [True, False])
def test_a_splicer_gives_what_splice_gives(keep_first, monkeypatch):
    language_model = tiny_language_model()
    place = {"batch_size": 4, "keep_first": keep_first}  # six contexts: the last batch is short
    splicer = Splicer(language_model, "layers.0", IDS, **place)
    passes = []
    logits = type(language_model).logits
    monkeypatch.setattr(
        type(language_model), "logits", lambda self, ids: passes.append(1) or logits(self, ids)
    )
    wishes = [(Coin(), {"n_draws": 3, "seed": 5}), (torch.zeros_like, {}), (Coin(), {"n_draws": 1})]
    for dictionary, options in wishes:
        passes.clear()
        again = splicer.splice(dictionary, **options)
        assert len(passes) == 2 * (1 + options.get("n_draws", 0))  # two batches
        alone = splice(language_model, "layers.0", dictionary, IDS, **place, **options)
        for name, value in vars(alone).items():
            assert torch.equal(getattr(again, name), value), name
    with pytest.raises(ValueError, match="pass the dictionary itself"):
        splicer.splice(lambda x: x, n_draws=2)
    monkeypatch.setattr("probsae.activations.resources.available_memory", lambda: 100)
    with pytest.raises(MemoryError, match="log-probabilities"):
        Splicer(language_model, "layers.0", IDS, **place)


def test_first_position_is_left_alone():
    seen = []
    splice(tiny_language_model(), "layers.0", lambda x: seen.append(len(x)) or x, IDS)
    assert seen == [6 * 8]


def test_batch_size_does_not_matter():
    results = [
        splice(tiny_language_model(), "layers.0", lambda x: 0.5 * x, IDS, batch_size=n)
        for n in (1, 6)
    ]
    torch.testing.assert_close(results[0].token_kl, results[1].token_kl, rtol=1e-4, atol=1e-6)
    assert results[0].cross_entropy_mean == pytest.approx(results[1].cross_entropy_mean, rel=1e-6)
    assert results[0].kl > 0


def test_raw_units_and_the_models_dtype():
    """The dictionary sees float32 in the network's own units; the network gets its dtype back."""
    model = tiny_llama()
    raw = read_tokens(model, "model.layers.1", IDS)
    model.network.bfloat16()
    seen = []

    def reconstruct(x):
        seen.append(x)
        return x

    result = splice(model, "model.layers.1", reconstruct, IDS)
    assert seen[0].dtype == torch.float32
    # bfloat16 keeps 8 bits; three layers add their errors up.
    torch.testing.assert_close(seen[0], raw, rtol=0.1, atol=0.1 * float(raw.abs().max()))
    assert torch.equal(result.token_cross_entropy_spliced, result.token_cross_entropy)


def test_saved_dictionary_splices_the_same(tmp_path):
    x = read_tokens(tiny_llama(), "model.layers.1", IDS) * 1.0
    model = ps.SpikeSlabDictionary(d_in=16, d_sae=24)
    ps.fit(model, 50 * x, n_steps=3, batch_size=32)
    ps.save(model, tmp_path / "saved")
    results = [
        splice(tiny_llama(), "model.layers.1", d, IDS).token_kl
        for d in (model, ps.load(tmp_path / "saved"))
    ]
    assert torch.equal(*results)


def test_draws_of_a_point_posterior_are_its_mean():
    result = splice(
        tiny_language_model(), "layers.0", constant(torch.ones(D_IN)), IDS, n_draws=3, batch_size=4
    )
    assert result.draw_kl.shape == (3, 6, 8)
    for draw in result.draw_cross_entropy:
        assert torch.equal(draw, result.token_cross_entropy_spliced)
    assert result.interval() == pytest.approx((result.loss_recovered,) * 2)


def test_draws_follow_the_posterior():
    """At the last layer a token's loss has two values, one for each side of the coin."""
    model, ids = tiny_language_model(), IDS[:1, :2]
    n_draws = 80
    result = splice(model, "layers.1", Coin(), ids, n_draws=n_draws, keep_first=False, seed=3)
    on, off = (
        splice(model, "layers.1", lambda x, v=v: torch.full_like(x, v), ids, keep_first=False)
        for v in (1.0, 0.0)
    )
    draws = result.draw_cross_entropy.flatten()
    is_on = torch.isclose(draws, on.token_cross_entropy_spliced.flatten(), atol=1e-5)
    is_off = torch.isclose(draws, off.token_cross_entropy_spliced.flatten(), atol=1e-5)
    assert bool((is_on ^ is_off).all())
    p_value = stats.binomtest(int(is_on.sum()), n_draws, 0.3).pvalue
    assert p_value > FALSE_ALARM_RATE
    lower, upper = result.token_interval(0.9)
    assert sorted([float(lower), float(upper)]) == pytest.approx(
        sorted([float(draws[is_on][0]), float(draws[is_off][0])])
    )


class Seen:
    """On with probability .3, at what it sees: decoded, a token is itself or nothing."""

    def encode(self, x):
        slab = Normal(torch.ones(len(x), 1), torch.full((len(x), 1), 1e-9))
        self.x = x
        return ps.CodePosterior(SpikeSlab(torch.full((len(x), 1), math.log(0.3 / 0.7)), slab))

    def decode(self, z):
        return z * self.x

    def dictionary(self):
        return torch.ones(1, 1)


def test_fidelity_and_its_interval_by_hand():
    """Two layers by hand: token v is 3 e_v, layer 1 adds nothing, layer 2 doubles, all are read.

    What goes on with a share t of 3 e_v ends as 6 t for v and 0 for the other eleven.
    """
    model = tiny_language_model()
    network, eye = model.network, torch.eye(D_IN)
    for parameter in network.parameters():
        parameter.zero_()
    network.embed.weight[:D_IN] = 3 * eye
    network.head.weight[:D_IN] = eye
    network.head.bias[D_IN:] = -1e9  # no token beyond the twelve
    network.layers[1].mlp[0].weight[:D_IN] = eye
    network.layers[1].mlp[2].weight[:, :D_IN] = eye
    ids = torch.arange(D_IN)[:, None].expand(-1, 2)  # every token twice, one prediction each

    def loss(logit):
        return math.log(math.exp(logit) + 11) - logit

    half = splice(model, "layers.0", lambda x: 0.5 * x, ids, keep_first=False)
    assert half.cross_entropy == pytest.approx(loss(6), rel=1e-5)
    assert half.cross_entropy_spliced == pytest.approx(loss(3), rel=1e-5)
    assert half.cross_entropy_zero == pytest.approx(math.log(12), rel=1e-5)
    assert half.cross_entropy_mean == pytest.approx(math.log(12), rel=1e-5)  # 3/12 everywhere
    p = math.exp(6) / (math.exp(6) + 11)
    kl = p * (loss(3) - loss(6)) + (1 - p) * (math.log(math.exp(3) + 11) - loss(6) - 6)
    assert half.kl == pytest.approx(kl, rel=1e-4)
    recovered = (math.log(12) - loss(3)) / (math.log(12) - loss(6))
    assert half.loss_recovered == pytest.approx(recovered, rel=1e-5)
    assert half.loss_recovered_from_mean == pytest.approx(recovered, rel=1e-4)

    # A draw keeps each token with probability .3 and recovers the share that it keeps.
    n_draws = 60
    drawn = splice(model, "layers.0", Seen(), ids, n_draws=n_draws, keep_first=False)
    assert drawn.cross_entropy_spliced == pytest.approx(loss(0.3 * 6), rel=1e-5)  # the mean, .3 x
    kept = drawn.draw_loss_recovered * 12
    torch.testing.assert_close(kept, kept.round(), atol=1e-4, rtol=0)
    groups = kept.round().long().clamp(1, 6).bincount(minlength=7)[1:]  # 0 or 1, 2, ... 6 or more
    below = stats.binom(12, 0.3).cdf(range(6))
    law = np.append(below[1:], 1) - np.append(0, below[1:])
    assert stats.chisquare(groups, n_draws * law).pvalue > FALSE_ALARM_RATE
    ends = np.quantile(kept.round().numpy(), [0.05, 0.95])
    assert drawn.interval(0.9) == pytest.approx(tuple(ends / 12), abs=1e-5)


def test_seed_fixes_the_draws_and_touches_no_other():
    before = torch.get_rng_state()
    results = [
        splice(tiny_language_model(), "layers.0", Coin(), IDS, n_draws=4, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0].draw_kl, results[1].draw_kl)
    assert not torch.equal(results[0].draw_kl, results[2].draw_kl)
    lower, upper = results[0].interval(0.5)
    recovered = results[0].draw_loss_recovered
    assert float(recovered.min()) <= lower < upper <= float(recovered.max())


class Counted(Coin):
    def __init__(self):
        super().__init__()
        self.n_calls = 0

    def encode(self, x):
        self.n_calls += 1
        return super().encode(x)


def test_a_killed_splice_goes_on_to_the_same_values(tmp_path):
    folder, said = tmp_path / "kept", tmp_path / "kept.waits"
    process = subprocess.Popen([sys.executable, "-m", "tests.lm.kill_me", str(folder)])
    deadline = time.monotonic() + 120
    while not said.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(list(folder.glob("batch-*.safetensors"))) == 3  # of six contexts

    options = {"batch_size": 1, "n_draws": 2}
    coin = Counted()
    whole = splice(tiny_language_model(), "layers.0", Coin(), IDS, **options)
    resumed = splice(tiny_language_model(), "layers.0", coin, IDS, checkpoint=folder, **options)
    assert coin.n_calls == 1 + 3  # the last batch that was kept, again, and those that were not
    for name, value in vars(whole).items():
        assert torch.equal(getattr(resumed, name), value), name


def test_a_splicer_keeps_and_goes_on_too(tmp_path):
    splicer = Splicer(tiny_language_model(), "layers.0", IDS, batch_size=4)
    first = splicer.splice(Coin(), n_draws=2, checkpoint=tmp_path / "kept")
    (tmp_path / "kept" / "batch-1.safetensors").unlink()
    again = splicer.splice(Coin(), n_draws=2, checkpoint=tmp_path / "kept")
    assert torch.equal(first.draw_kl, again.draw_kl)


def test_a_checkpoint_of_another_splice_is_refused(tmp_path):
    model, folder = tiny_language_model(), tmp_path / "kept"
    splice(model, "layers.0", Coin(), IDS, batch_size=4, checkpoint=folder)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = [
        ("layers.1", IDS, {}, "hook layers.0 and not layers.1"),
        ("layers.0", IDS.flip(0), {}, "token_ids"),
        ("layers.0", IDS, {"n_draws": 1}, "n_draws 0 and not 1"),
        ("layers.0", IDS, {"seed": 1}, "seed 0 and not 1"),
        ("layers.0", IDS, {"keep_first": False}, "keep_first True and not False"),
        ("layers.0", IDS, {"batch_size": 2}, "batch_size"),
        ("layers.0", IDS, {"mean": torch.zeros(D_IN)}, "mean of the text"),
    ]
    for hook, ids, options, message in others:
        with pytest.raises(ValueError, match=message):
            splice(model, hook, Coin(), ids, checkpoint=folder, **({"batch_size": 4} | options))
    with pytest.raises(ValueError, match="another dictionary or other weights"):
        splice(model, "layers.0", torch.zeros_like, IDS, batch_size=4, checkpoint=folder)
    with torch.no_grad():
        model.network.head.bias.add_(torch.arange(VOCABULARY) / VOCABULARY)
    with pytest.raises(ValueError, match="another dictionary or other weights"):
        splice(model, "layers.0", Coin(), IDS, batch_size=4, checkpoint=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    with pytest.raises(FileExistsError, match="holds no checkpoint"):
        splice(model, "layers.0", Coin(), IDS, checkpoint=tmp_path)


def test_context_interval():
    """Contexts that are all alike leave nothing to chance; others do, around the estimate."""
    original = torch.ones(40, 5)
    noise = torch.randn(40, 1).expand(40, 5)
    draws = torch.zeros(0, 40, 5)
    alike = SpliceResult(original, 1.5 * original, 3 * original, original, original, draws, draws)
    assert alike.context_interval() == pytest.approx((0.75, 0.75))
    spread = SpliceResult(
        original, 1.5 * original + 0.2 * noise, 3 * original, original, original, draws, draws
    )
    lower, upper = spread.context_interval(0.95)
    # Loss recovered is linear in the spliced loss: its standard error is known.
    error = float((0.1 * noise[:, 0]).std()) / math.sqrt(40)
    assert upper - lower == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert lower < spread.loss_recovered < upper


def test_downstream_error():
    model = tiny_gpt2()
    later = ["transformer.h.1", "transformer.h.2"]
    exact = downstream_fvu(model, "transformer.h.0", signed_identity(16), IDS, later)
    assert list(exact) == later
    assert max(exact.values()) < 1e-10
    mean = read_tokens(model, "transformer.h.2", IDS).mean(0)
    fvu = downstream_fvu(
        model, "transformer.h.2", constant(mean), IDS, ["transformer.h.2"], batch_size=4
    )
    assert fvu == {"transformer.h.2": pytest.approx(1, rel=1e-5)}


def test_where_ablation_does_no_damage_nothing_is_recovered():
    loss = torch.rand(2, 3)
    draws = torch.stack([loss, 2 * loss])
    result = SpliceResult(loss, 1.5 * loss, loss, loss, loss, draws, draws)
    assert math.isnan(result.loss_recovered)
    assert bool(result.draw_loss_recovered.isnan().all())


def test_bad_arguments():
    model = tiny_language_model()
    with pytest.raises(ValueError, match="at least 2 positions"):
        splice(model, "layers.0", lambda x: x, IDS[:, :1])
    with pytest.raises(ValueError, match="pass the dictionary itself"):
        splice(model, "layers.0", lambda x: x, IDS, n_draws=2)
    result = splice(model, "layers.0", Coin(), IDS, n_draws=1)
    with pytest.raises(ValueError, match="at least 2 posterior draws"):
        result.interval()
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        splice(model, "layers.0", Coin(), IDS, n_draws=2).interval(1.0)
    with pytest.raises(ValueError, match="at least 2 of them"):
        splice(model, "layers.0", lambda x: x, IDS[:1]).context_interval()


@pytest.mark.slow
def test_dictionary_inside_smollm2(smollm2, corpus):
    text = corpus[0].read_text(encoding="utf-8")[:20_000]
    ids = torch.tensor(smollm2.tokenize([text])[0][: 8 * 64]).view(8, 64)
    pca = ps.baselines.PCA(d_sae=64).fit(read_tokens(smollm2, "model.layers.7", ids))
    result = splice(smollm2, "model.layers.7", pca, ids, batch_size=4)
    assert result.cross_entropy < result.cross_entropy_spliced < result.cross_entropy_zero
    assert result.cross_entropy_spliced < result.cross_entropy_mean
    assert 0.3 < result.loss_recovered < 1
    assert result.cross_entropy < math.log(49_152) / 2
    lower, upper = result.context_interval()
    assert lower < result.loss_recovered < upper


@pytest.mark.slow
def test_posterior_draws_inside_smollm2(smollm2, corpus):
    """Draws decode to what the mean does but for the codes' spread: each costs something."""
    text = corpus[0].read_text(encoding="utf-8")[:20_000]
    ids = torch.tensor(smollm2.tokenize([text])[0][: 24 * 64]).view(24, 64)
    hook = "model.layers.7"
    x = read_tokens(smollm2, hook, ids)
    dictionary = ps.SpikeSlabDictionary(d_in=576, d_sae=256)
    ps.fit(dictionary, x, n_steps=150, batch_size=256)
    result = splice(smollm2, hook, dictionary, ids[:4], n_draws=6)
    assert result.draw_cross_entropy.shape == (6, 4, 63)
    lower, upper = result.interval(0.9)
    assert 0.3 < lower < upper < result.loss_recovered < 1
    # Draws of many tokens' independent codes agree: the interval is narrower than over other text.
    text_lower, text_upper = result.context_interval(0.9)
    assert upper - lower < text_upper - text_lower
    token_lower, token_upper = result.token_interval(0.9)
    is_certain = token_upper == token_lower
    assert bool(is_certain[:, 0].all())  # the first position is left alone, and predicts the next
    assert not bool(is_certain[:, 1:].any())
