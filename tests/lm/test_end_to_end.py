"""End-to-end objectives: exact identities, the gradient by hand, and what a fit does."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import probsae as ps
from probsae.activations.language_model import LanguageModel
from probsae.inference import Checkpoint, TargetL0, elbo_terms, objective
from probsae.lm import ContextActivations, EndToEnd, downstream_fvu, splice
from probsae.lm.end_to_end import draw
from tests.conftest import FALSE_ALARM_RATE
from tests.killed import KilledAfter
from tests.lm.tiny import VOCABULARY, signed_identity, tiny_language_model, tiny_llama

IDS = torch.randint(VOCABULARY, (32, 9), generator=torch.Generator().manual_seed(0))
HOOK, LATER = "model.layers.0", ["model.layers.1", "model.layers.2"]


def first_batch(contexts, n_tokens=32):
    return next(contexts.batches(n_tokens, seed=0))


def parts(objective_function, model, x, kl_weight=0.7):
    """Loss and gradients of one call."""
    model.zero_grad()
    terms = objective_function(model, x, torch.tensor(kl_weight))
    terms.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return terms, gradients


def make(family, d_in, d_sae):
    torch.manual_seed(0)
    options = {"k": 4} if family is ps.TopKSAE else {}
    return family(d_in=d_in, d_sae=d_sae, **options).eval()


@pytest.mark.parametrize("family", [ps.SpikeSlabDictionary, ps.RectifiedGaussianDictionary,
                                    ps.LaplaceDictionary, ps.TopKSAE, ps.ReLUSAE])  # fmt: skip
def test_local_error_alone_is_the_ordinary_objective(family):
    contexts = ContextActivations(tiny_llama(), HOOK, IDS)
    model, x = make(family, 16, 24), first_batch(contexts)
    end_to_end = EndToEnd(contexts, output_weight=0.0, local_weight=1.0)
    ours, by_ours = parts(end_to_end, model, x)
    ordinary, by_ordinary = parts(objective, model, x)
    for a, b in zip(ours, ordinary, strict=True):
        torch.testing.assert_close(a, b)
    assert by_ours.keys() == by_ordinary.keys()
    for name, gradient in by_ordinary.items():
        torch.testing.assert_close(by_ours[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep_first", [True, False])
def test_identity_has_no_error(keep_first):
    contexts = ContextActivations(tiny_llama(), HOOK, IDS, keep_first=keep_first)
    model, x = signed_identity(16), first_batch(contexts, 36)
    terms, _ = parts(EndToEnd(contexts, later=LATER), model, x, kl_weight=0.0)
    assert float(terms.auxiliary) == pytest.approx(0, abs=1e-5)
    assert float(terms.loss.detach()) == pytest.approx(0, abs=1e-5)


def test_output_error_and_its_gradient_by_hand():
    """At the last layer the output is a linear map of the reconstruction."""
    language_model = tiny_language_model()
    contexts = ContextActivations(language_model, "layers.1", IDS)
    model, x = make(ps.ReLUSAE, 12, 20), first_batch(contexts)
    terms, gradients = parts(EndToEnd(contexts, output_weight=3.0), model, x)

    model.zero_grad()
    head = language_model.network.head
    before, after = (F.log_softmax(head(a), dim=-1) for a in (x, model(x)))
    kl = (before.exp() * (before - after)).sum(-1).mean()
    penalty = 0.7 * elbo_terms(model, x).kl.mean()
    (3 * kl + penalty).backward()
    assert float(terms.loss.detach()) == pytest.approx(float((3 * kl + penalty).detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_agrees_with_splice_and_downstream_fvu():
    """On one batch of all contexts the objective's errors are what the measures say."""
    language_model = tiny_llama()
    contexts = ContextActivations(language_model, HOOK, IDS)
    model, x = make(ps.TopKSAE, 16, 24), first_batch(contexts, contexts.n_tokens)
    fvu = downstream_fvu(language_model, HOOK, model, IDS, LATER)
    terms, _ = parts(EndToEnd(contexts, later=LATER, output_weight=0.0), model, x)
    extra = model.auxiliary_loss(x, model.posterior(x), 1.0).mean().detach()
    assert float(terms.auxiliary - extra) == pytest.approx(sum(fvu.values()) / 2, rel=1e-4)
    # `splice` has no target for the last position, whose prediction the objective counts.
    result = splice(language_model, HOOK, model, torch.cat([IDS, IDS[:, :1]], dim=1))
    terms, _ = parts(EndToEnd(contexts), model, x)
    kl = result.token_kl[:, 1:].mean()
    assert float(terms.auxiliary - extra) == pytest.approx(float(kl), rel=1e-4)


def test_draws_have_the_posteriors_moments_and_carry_gradients():
    model = make(ps.SpikeSlabDictionary, 8, 12)
    posterior = model.posterior(torch.randn(3, 8))
    n_draws = 4_000
    z = torch.stack([draw(model, posterior) for _ in range(n_draws)])
    mean, variance = posterior.mean.detach(), posterior.variance.detach()
    # 72 comparisons; normal draws, whose sample variance deviates by sqrt(2 / n).
    k = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - FALSE_ALARM_RATE / 144)))
    assert bool(((z.mean(0) - mean).abs() < k * (variance / n_draws).sqrt() + 1e-6).all())
    assert bool(((z.var(0) / variance - 1).abs() < k * math.sqrt(2 / n_draws)).all())
    torch.manual_seed(0)
    noise = torch.randn(3, 12)
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(draw(model, posterior).sum(), model.log_step_noise,
                                      retain_graph=True)  # fmt: skip
    by_hand = (posterior.mean + posterior.variance.sqrt() * noise).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(by_hand, model.log_step_noise)[0])


def test_point_posteriors_are_not_drawn():
    model = make(ps.TopKSAE, 8, 12)
    posterior = model.posterior(torch.randn(3, 8))
    assert draw(model, posterior) is posterior.mean or torch.equal(
        draw(model, posterior), posterior.mean
    )


def with_idle_dimensions() -> LanguageModel:
    """A network whose loudest dimensions, the last eight, no later layer reads."""
    language_model = tiny_language_model()
    network = language_model.network
    network.embed.weight[:, 4:] *= 3
    for reader in (network.layers[1].mlp[0], network.head):
        reader.weight[:, 4:] = 0
    return language_model


def test_what_the_output_does_not_depend_on_is_left_out():
    """At equal l0: a local fit spends itself on the loud dimensions, an end-to-end fit does not."""
    language_model, hook, later = with_idle_dimensions(), "layers.0", ["layers.1"]
    contexts = ContextActivations(language_model, hook, IDS)
    objectives = {
        "local": None,
        "output": EndToEnd(contexts),
        "later": EndToEnd(contexts, later=later, later_weight=0.3),
    }
    kl, here, behind = {}, {}, {}
    for name, chosen in objectives.items():
        model = make(ps.TopKSAE, 12, 24)
        result = ps.fit(
            model, contexts, objective=chosen, n_steps=60, batch_size=64, learning_rate=3e-2
        )
        assert result.history["l0"][-1] <= 4
        kl[name] = splice(language_model, hook, model, IDS).kl
        here[name] = ps.evaluate([model], first_batch(contexts, 256)).rows[0].fvu
        behind[name] = downstream_fvu(language_model, hook, model, IDS, later)["layers.1"]
    assert kl["output"] < 0.5 * kl["local"]
    assert kl["output"] < kl["later"] < kl["local"]
    assert here["local"] < here["later"] < here["output"]
    assert behind["later"] < 0.5 * behind["output"]
    assert all(p.grad is None for p in language_model.network.parameters())


def test_probabilistic_dictionary_end_to_end():
    """It learns to predict, and its noise scale is what its codes leave over."""
    language_model = tiny_llama()
    contexts = ContextActivations(language_model, HOOK, IDS)
    model = make(ps.SpikeSlabDictionary, 16, 24)
    x = first_batch(contexts, 256)
    model.initialize_(x)
    before = splice(language_model, HOOK, model, IDS).kl
    end_to_end = EndToEnd(contexts, output_weight=30.0)
    ps.fit(model, contexts, objective=end_to_end, n_steps=100, batch_size=64, learning_rate=1e-2)
    result = splice(language_model, HOOK, model, IDS, n_draws=4)
    assert result.kl < 0.5 * before
    assert float(result.draw_kl.mean()) > result.kl  # a draw carries the posterior's spread
    posterior = model.encode(x)
    left_over = elbo_terms(model, x, posterior).squared_error + posterior.variance.sum(-1)
    variance = float(left_over.detach().mean()) / 16
    assert float(model.noise_scale.detach()) == pytest.approx(math.sqrt(variance), rel=0.1)


def test_noise_gradient_leaves_value_and_the_rest_alone():
    contexts = ContextActivations(tiny_llama(), HOOK, IDS)
    x = first_batch(contexts)
    learned, fixed = (make(ps.SpikeSlabDictionary, 16, 24) for _ in range(2))
    fixed.learn_noise = False
    results = []
    for model in (learned, fixed):
        torch.manual_seed(0)
        results.append(parts(EndToEnd(contexts), model, x))
    (a, by_a), (b, by_b) = results
    torch.testing.assert_close(a.loss, b.loss)
    noise = by_a.pop("log_noise_scale")
    for name in by_a:
        torch.testing.assert_close(by_a[name], by_b[name])
    # d/d log s of .5 (E / s^2 + d log s^2) is d - E / s^2, with s = 1.
    posterior = learned.posterior(x)
    left_over = elbo_terms(learned, x, posterior).squared_error + posterior.variance.sum(-1)
    assert float(noise) == pytest.approx(16 - float(left_over.detach().mean()), rel=1e-4)


def test_batches_are_whole_contexts_that_it_knows():
    contexts = ContextActivations(tiny_llama(), HOOK, IDS)
    assert (contexts.d_in, contexts.n_kept, contexts.n_tokens) == (16, 8, 32 * 8)
    stream = contexts.batches(40, seed=1)
    seen = []
    for x in (next(stream) for _ in range(6)):  # a pass: 6 batches of 5 contexts, 2 left over
        assert x.shape == (40, 16)
        ids = contexts.contexts_of(x)
        again = ContextActivations(tiny_llama(), HOOK, ids)
        every = next(again.batches(10_000, seed=0))
        order = again.contexts_of(every)
        rows = [(ids == row).all(1).nonzero()[0, 0] for row in order]
        torch.testing.assert_close(every.view(5, 8, 16), x.view(5, 8, 16)[torch.stack(rows)])
        seen.append(ids)
    assert len(torch.cat(seen).unique(dim=0)) == 30  # nothing twice in a pass
    assert next(contexts.batches(1)).shape == (8, 16)  # one context at least
    with pytest.raises(ValueError, match="whole batches of the ContextActivations"):
        contexts.contexts_of(x.clone())


def test_resumes_where_it_stopped(tmp_path):
    contexts = ContextActivations(tiny_llama(), HOOK, IDS)
    end_to_end = EndToEnd(contexts, later=LATER)

    def fit(**options):
        model = make(ps.SpikeSlabDictionary, 16, 24)
        ps.fit(model, contexts, objective=end_to_end, n_steps=8, batch_size=32, **options)
        return model.W_dec

    whole = fit(callbacks=[Checkpoint(tmp_path / "state", every=5)])
    torch.testing.assert_close(fit(resume=tmp_path / "state"), whole)


def test_resuming_does_not_run_the_model_on_batches_that_were_had(tmp_path):
    language_model = tiny_language_model()
    contexts = ContextActivations(language_model, "layers.0", IDS)
    block = language_model.network.layers[0]

    def fit(**options):
        model = make(ps.TopKSAE, 12, 24)
        block.n_calls = 0
        ps.fit(model, contexts, n_steps=60, batch_size=256, **options)
        return model.W_dec, block.n_calls

    n_first = 4_096 // 256  # batches that the start looks at
    whole, n_calls = fit(callbacks=[Checkpoint(tmp_path / "state", every=50)])
    assert n_calls == 60
    shutil.copytree(tmp_path / "state", tmp_path / "last")
    killed = make(ps.TopKSAE, 12, 24)
    with pytest.raises(KeyboardInterrupt):
        ps.fit(killed, contexts, n_steps=60, batch_size=256,
               callbacks=[Checkpoint(tmp_path / "state", every=50), KilledAfter(52)])  # fmt: skip
    resumed, n_calls = fit(resume=tmp_path / "state")
    assert n_calls == n_first + 10
    assert torch.equal(resumed, whole)
    finished, n_calls = fit(resume=tmp_path / "last")
    assert n_calls == n_first
    assert torch.equal(finished, whole)


def test_fit_takes_any_objective():
    x = torch.randn(64, 8)
    fits = []
    for options in ({}, {"objective": objective}):
        model = make(ps.SpikeSlabDictionary, 8, 12)
        fits.append(ps.fit(model, x, n_steps=4, batch_size=16, **options).model.W_dec)
    assert torch.equal(*fits)
    with pytest.raises(ValueError, match="either elbo or objective"):
        ps.fit(model, x, elbo=ps.inference.ExactELBO(), objective=objective)


def test_bad_arguments():
    language_model = tiny_llama()
    contexts = ContextActivations(language_model, HOOK, IDS)
    with pytest.raises(ValueError, match="weights must be at least 0"):
        EndToEnd(contexts, output_weight=-1.0)
    with pytest.raises(ValueError, match="the nearest are: model"):
        EndToEnd(contexts, later=["model.layers.9"])
    for hook in (HOOK, "model.embed_tokens"):
        with pytest.raises(ValueError, match=f"must lie behind '{HOOK}', got '{hook}'"):
            EndToEnd(contexts, later=[*LATER, hook])
    non_linear = ps.SparseVAE(d_in=16, d_sae=8, decoder_hidden=4)
    with pytest.raises(ValueError, match="linear decoder"):
        EndToEnd(contexts)(non_linear, first_batch(contexts), 1.0)
    language_model.network.requires_grad_(True)
    with pytest.raises(ValueError, match="only the dictionary is trained"):
        EndToEnd(contexts)


@pytest.mark.slow
def test_smollm2_end_to_end(smollm2, corpus):
    text = corpus[0].read_text(encoding="utf-8")[:8_000]
    ids = torch.tensor(smollm2.tokenize([text])[0][: 16 * 32]).view(16, 32)
    contexts = ContextActivations(smollm2, "model.layers.24", ids)
    model = make(ps.TopKSAE, contexts.d_in, 256)
    model.initialize_(first_batch(contexts, 512))
    before = splice(smollm2, "model.layers.24", model, ids).kl
    end_to_end = EndToEnd(contexts, later=["model.layers.28"])
    ps.fit(model, contexts, objective=end_to_end, n_steps=12, batch_size=124, learning_rate=1e-3)
    assert splice(smollm2, "model.layers.24", model, ids).kl < 0.9 * before


@pytest.mark.slow
def test_the_number_of_active_features_can_be_chosen_end_to_end():
    """The noise scale is in no error of its own here; without its price steering would run away."""
    ids = torch.randint(VOCABULARY, (64, 17), generator=torch.Generator().manual_seed(0))
    contexts = ContextActivations(tiny_llama(), "model.layers.0", ids)
    torch.manual_seed(0)
    model = ps.SpikeSlabDictionary(d_in=16, d_sae=48, learn_noise=False)
    ps.fit(
        model, contexts, objective=EndToEnd(contexts, output_weight=1e3), n_steps=300,
        batch_size=256, seed=0, callbacks=[TargetL0(4)], device="cpu", progress=False,
    )  # fmt: skip
    x = first_batch(contexts, 512)
    assert float(model.encode(x).p_active.sum(1).mean()) == pytest.approx(4, rel=0.1)
    assert 0.1 < float(model.noise_scale) < 30
