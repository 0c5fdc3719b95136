"""Coordinate ascent on the codes: it climbs, it arrives, and it is exact where that is possible."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys

import pytest
import torch

import probsae as ps
from probsae.distributions import SpikeSlab, TiltedSpikeSlab
from probsae.inference import elbo_terms
from probsae.inference.refine import Refinement, _Ascent, _Law, spike_slab_prior
from probsae.models import CodePosterior

MODELS = {
    "truncated": lambda d_in, d_sae: ps.SpikeSlabDictionary(d_in, d_sae),
    "normal": lambda d_in, d_sae: ps.SpikeSlabDictionary(d_in, d_sae, slab="normal"),
    "half": lambda d_in, d_sae: ps.SpikeSlabDictionary(d_in, d_sae, slab="half_normal"),
    "rectified": lambda d_in, d_sae: ps.RectifiedGaussianDictionary(d_in, d_sae),
    "vae": lambda d_in, d_sae: ps.SparseVAE(d_in, d_sae),
}


def problem(name: str, d_in: int = 8, d_sae: int = 12, n_tokens: int = 40):
    """A model that knows the features, and tokens that it explains imperfectly."""
    torch.manual_seed(0)
    data = ps.SyntheticActivations(d_in, d_sae, 2, decay=0.9, noise_scale=0.1, seed=0)
    model = MODELS[name](d_in, d_sae)
    model.initialize_(data.sample(2_000)[0])
    with torch.no_grad():
        model.W_dec.copy_(data.features)
        model.W_enc.copy_(data.features.T)
        model.b_dec.zero_()
        model.log_noise_scale.fill_(0.1).log_()
        model.code_prior.rate_logit.copy_(data.firing_probability.logit())
    return model, data.sample(n_tokens)[0]


@pytest.mark.parametrize("name", MODELS)
def test_no_token_loses_and_more_sweeps_gain(name):
    model, x = problem(name)
    elbos = [elbo_terms(model, x).elbo.detach()]
    for n_sweeps in (1, 3, 10):
        refined = ps.refine(model, x, n_sweeps=n_sweeps)
        elbos.append(elbo_terms(model, x, refined).elbo.detach())
    for before, after in itertools.pairwise(elbos):
        assert (after - before).min() > -1e-4
        assert (after - before).mean() >= 0
    assert (elbos[1] - elbos[0]).mean() > 0.05


@pytest.mark.parametrize("name", MODELS)
def test_where_it_arrives_no_factor_can_be_improved(name):
    model, x = problem(name)
    q = ps.refine(model, x, n_sweeps=40, n_candidates=12).distribution
    best = elbo_terms(model, x, CodePosterior(q)).elbo.detach()
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        feature = int(torch.randint(12, (), generator=generator))
        logits, loc, scale = q.logits.clone(), q.slab.loc.clone(), q.slab.scale.clone()
        step = 0.3 * torch.randn(3, generator=generator)
        logits[:, feature] += step[0]
        loc[:, feature] += step[1] * scale[:, feature]
        scale[:, feature] *= step[2].exp()
        other = SpikeSlab(logits, type(q.slab)(loc, scale, validate_args=False))
        worse = elbo_terms(model, x, CodePosterior(other)).elbo.detach()
        assert (worse - best).max() < 2e-4


@pytest.mark.parametrize("name", ["truncated", "normal", "half", "rectified"])
def test_it_is_the_exact_posterior_where_features_do_not_overlap(name):
    model, x = problem(name, d_in=8, d_sae=8)
    with torch.no_grad():
        model.W_dec.copy_(torch.eye(8))
    exact = ps.inference.enumerate_supports(model, x)
    refined = ps.refine(model, x)
    gap = exact.log_evidence - elbo_terms(model, x, refined).elbo.detach()
    assert gap.abs().max() < 2e-3
    torch.testing.assert_close(refined.p_active, exact.p_active.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(refined.mean, exact.mean.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(refined.variance, exact.variance.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("d_in", "n_tokens", "n_sweeps", "bound"), [(6, 20, 10, 0.3), (16, 40, 3, 0.1)]
)
@pytest.mark.parametrize("name", MODELS)
def test_it_nears_the_gold_posterior(name, d_in, n_tokens, n_sweeps, bound):
    """With room for the features within .1 nats of the evidence; the price of crowding is more."""
    model, x = problem(name, d_in=d_in, d_sae=8, n_tokens=n_tokens)
    exact = ps.inference.enumerate_supports(model, x, n_points=64)

    def distances(posterior: CodePosterior) -> tuple[float, ...]:
        gap = exact.log_evidence - elbo_terms(model, x, posterior).elbo.detach()
        assert gap.min() > -2e-3  # a lower bound, token by token
        errors = (posterior.p_active - exact.p_active, posterior.mean - exact.mean)
        return float(gap.mean()), *(float(error.abs().mean()) for error in errors)

    posterior = ps.refine(model, x, n_sweeps=n_sweeps)
    encoder, refined = distances(model.encode(x)), distances(posterior)
    assert all(after < before for before, after in zip(encoder, refined, strict=True))
    assert refined[0] < bound
    if d_in == 16:
        assert refined[1] < 0.01
        mean_variance = exact.variance.float().mean()
        torch.testing.assert_close(posterior.variance.mean(), mean_variance, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["truncated", "normal"])
def test_no_other_start_arrives_at_a_better_factorised_posterior(name):
    """Eight features in six dimensions: what is left of the gap is the mean field's own."""
    model, x = problem(name, d_in=6, d_sae=8, n_tokens=60)
    prior, directions = spike_slab_prior(model), model.dictionary()
    slab, precision = type(prior.slab), model.noise_scale.detach().reciprocal().square()
    reached = elbo_terms(model, x, ps.refine(model, x, n_sweeps=10)).elbo.detach()
    best = reached.clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        is_on = torch.rand(60, 8, generator=generator) < 0.25
        mean = is_on * torch.rand(60, 8, generator=generator)
        order = torch.randperm(8, generator=generator)
        shuffled = _Law(*(value[:, order] for value in _Law.of(prior, 60)))
        correlation = ((x - model.decode(mean)) @ directions.T).detach()[:, order]
        gram = (directions @ directions.T)[order][:, order].expand(60, 8, 8)
        ascent = _Ascent(
            shuffled.as_distribution(slab), precision, gram, correlation, mean[:, order]
        )
        q, mean = None, ascent.mean
        for _ in range(12):
            q = TiltedSpikeSlab(ascent.prior, ascent.sweep(mean), precision)
            mean = q.mean
        assert q is not None
        law = _Law(*(value[:, order.argsort()] for value in _Law.of(q, 60)))
        elbo = elbo_terms(model, x, CodePosterior(law.as_distribution(slab))).elbo.detach()
        best = torch.maximum(best, elbo)
    assert float((best - reached).mean()) < 0.01


def test_encode_refines_on_request():
    model, x = problem("truncated")
    torch.testing.assert_close(model.encode(x, refine=True).mean, ps.refine(model, x).mean)


@pytest.mark.parametrize(
    ("n_candidates", "limit", "chunk"),
    [(12, 12 * 12 * 7, 7), (1, 24, 2)],  # the Gram matrix is widest; all features' codes are
)
def test_tokens_do_not_depend_on_the_chunk_they_are_in(monkeypatch, n_candidates, limit, chunk):
    model, x = problem("truncated")
    whole = ps.refine(model, x, n_candidates=n_candidates)
    module = importlib.import_module("probsae.inference.refine")
    improve, sizes, with_gram = module._improve, [], []

    def counted(starts, prior, precision, n_sweeps, directions, gram):
        sizes.append(sum(len(start.index) for start in starts))
        with_gram.append(gram is not None)
        return improve(starts, prior, precision, n_sweeps, directions, gram)

    monkeypatch.setattr(module, "_MAX_NUMBERS", limit)
    monkeypatch.setattr(module, "_improve", counted)
    torch.testing.assert_close(ps.refine(model, x, n_candidates=n_candidates).mean, whole.mean)
    assert max(sizes) == chunk
    assert sum(sizes) == len(x)
    assert set(with_gram) == {n_candidates == 12}  # 144 pairs of features are over the other limit


def test_pieces_and_pairs_do_not_matter(monkeypatch):
    model, x = problem("truncated")
    whole = ps.refine(model, x, n_candidates=5)
    module = importlib.import_module("probsae.inference.refine")
    monkeypatch.setattr(module, "_MIN_PIECE_TOKENS", 3)
    monkeypatch.setattr(module, "_PIECE", 1)
    torch.testing.assert_close(ps.refine(model, x, n_candidates=5).mean, whole.mean)
    one_by_one = torch.cat([ps.refine(model, row, n_candidates=5).mean for row in x.split(1)])
    torch.testing.assert_close(one_by_one, whole.mean)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truncated", "normal", "rectified"])
def test_compiled_it_says_the_same_of_batches_of_any_size(name):
    # A process of its own: the shape checks of this one are no part of what is compiled.
    script = f"from {__name__} import compare_compiled; compare_compiled({name!r})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def compare_compiled(name: str) -> None:
    """Compare the codes that a compiled `Refinement` finds with those of `refine`."""
    model, x = problem(name)
    compiled = Refinement(model, 3, 12, compile=True)

    def check(tokens: torch.Tensor) -> None:
        whole, again = ps.refine(model, tokens, 3, 12), compiled(tokens)
        for what in ("mean", "variance", "p_active"):
            pair = getattr(again, what), getattr(whole, what)
            torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-3)

    check(x)
    check(x[:17])
    with torch.no_grad():  # polishing changes the model between batches
        model.log_noise_scale.add_(0.5)
        model.W_dec.copy_(model.W_dec.roll(1, 0))
    check(x)


@pytest.mark.parametrize("name", MODELS)
def test_the_moments_it_keeps_are_those_of_its_law(name):
    model, x = problem(name)
    q = ps.refine(model, x).distribution
    law = SpikeSlab(q.logits, q.slab, validate_args=False)
    for what in ("mean", "variance", "p_active"):
        torch.testing.assert_close(getattr(q, what), getattr(law, what), rtol=1e-4, atol=1e-6)


def test_other_features_keep_the_encoders_posterior():
    model, x = problem("truncated")
    encoder, refined = model.encode(x), ps.refine(model, x, n_candidates=3)
    is_changed = (encoder.p_active - refined.p_active).abs() > 1e-6
    assert is_changed.sum() > 0
    assert is_changed.sum(1).max() <= 3


def test_says_what_it_cannot_refine():
    x = torch.randn(3, 8)
    with pytest.raises(TypeError, match="LaplaceDictionary has none"):
        ps.refine(ps.LaplaceDictionary(8, 12), x)
    with pytest.raises(TypeError, match="TopKSAE has none"):
        ps.TopKSAE(8, 12, k=2).encode(x, refine=True)
    with pytest.raises(ValueError, match="linear decoder"):
        ps.refine(ps.SparseVAE(8, 12, decoder_hidden=4), x)
    with pytest.raises(ValueError, match="n_sweeps"):
        ps.refine(ps.SpikeSlabDictionary(8, 12), x, n_sweeps=0)
    with pytest.raises(ValueError, match="d_in=8 columns"):
        ps.refine(ps.SpikeSlabDictionary(8, 12), x[:, :5])
