"""The likelihood-ratio proxy and a feature's scores against it: by hand, and on two languages."""

import math

import pytest
import torch

import probsae as ps
from probsae.lm import log_likelihood_ratio, score_hypothesis
from tests.lm.tiny import signed_identity

# A text of two kinds: tokens 0-3 of one, 3-6 of the other, 3 of both.
GENERATOR = torch.Generator().manual_seed(0)
ONE = torch.randint(0, 4, (20, 30), generator=GENERATOR)
OTHER = torch.randint(3, 7, (20, 30), generator=GENERATOR)
ALL = torch.cat([ONE, OTHER])


def test_ratio_by_hand():
    """Hypothesis 1 1 2, background 0 0 1 1 2 3, one token's worth of prior."""
    hypothesis, background = torch.tensor([1, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 3])
    ratio = log_likelihood_ratio(torch.arange(4)[None], hypothesis, background)
    by_hand = [1 / 4, (2 / (2 / 6) + 1) / 4, (1 / (1 / 6) + 1) / 4, 1 / 4]
    torch.testing.assert_close(ratio.exp(), torch.tensor([by_hand]))


def test_probabilities_under_the_hypothesis_sum_to_one():
    vocabulary = torch.arange(7)[None]
    ratio = log_likelihood_ratio(vocabulary, ONE, ALL, strength=5.0).double()
    background = torch.bincount(ALL.flatten(), minlength=7) / ALL.numel()
    assert float((ratio.exp() * background).sum()) == pytest.approx(1, rel=1e-6)


def test_more_data_outweighs_the_prior():
    """Token 0 is a quarter of one text and an eighth of all: log 2 in the limit."""
    ratio = log_likelihood_ratio(torch.tensor([[0]]), torch.arange(4).repeat(10_000),
                                 torch.arange(8).repeat(10_000))  # fmt: skip
    assert float(ratio) == pytest.approx(math.log(2), abs=1e-4)


def test_window_sums_the_last_tokens():
    alone = log_likelihood_ratio(ALL, ONE, ALL)
    three = log_likelihood_ratio(ALL, ONE, ALL, window=3)
    torch.testing.assert_close(three[:, 0], alone[:, 0])
    torch.testing.assert_close(three[:, 1], alone[:, :2].sum(1))
    torch.testing.assert_close(three[:, 7], alone[:, 5:8].sum(1))
    torch.testing.assert_close(
        log_likelihood_ratio(ALL, ONE, ALL, window=99), alone.cumsum(1), rtol=1e-4, atol=1e-4
    )
    # Longer strings tell the kinds apart where a shared token alone does not.
    shared = ALL == 3
    is_one = torch.arange(40)[:, None].expand_as(ALL) < 20
    assert set(((alone > 0) == is_one)[shared].tolist()) == {True, False}
    longer = log_likelihood_ratio(ALL, ONE, ALL, window=10)[:, 9:]
    assert bool(((longer > 0) == is_one[:, 9:]).all())


def test_a_set_of_token_types():
    """Restricted to a set, the ratio of its tokens is 1 / P(set), but for the prior."""
    chosen = torch.tensor([4, 5, 6])
    inside = ALL[torch.isin(ALL, chosen)]
    ratio = log_likelihood_ratio(torch.arange(7)[None], inside, ALL)[0].exp()
    share = inside.numel() / ALL.numel()
    torch.testing.assert_close(ratio[4:], torch.full((3,), 1 / share), rtol=0.01, atol=0)
    torch.testing.assert_close(ratio[:4], torch.full((4,), 1 / (inside.numel() + 1)))


def test_scores_by_hand():
    """Features +e0, +e1, -e0, -e1 on five tokens, of which the first two are of the hypothesis."""
    x = torch.tensor([[1.0, 1.0], [2.0, 0.0], [-1.0, 1.0], [0.0, 1.0], [0.0, 3.0]])
    proxy = torch.tensor([1.0, 2.0, -1.0, -1.0, -1.0])
    scores = score_hypothesis(signed_identity(2), x, proxy, batch_size=2)
    torch.testing.assert_close(scores.sensitivity, torch.tensor([1.0, 0.5, 0.0, 0.0]))
    torch.testing.assert_close(scores.specificity, torch.tensor([1.0, 0.0, 2 / 3, 1.0]))
    torch.testing.assert_close(scores.precision[:3], torch.tensor([1.0, 0.25, 0.0]))
    assert scores.precision[3].isnan()
    assert scores.share == pytest.approx(0.4)
    correlations = torch.corrcoef(torch.stack([*torch.relu(x.T), *torch.relu(-x.T), proxy]))
    torch.testing.assert_close(scores.correlation[:3], correlations[-1, :3])
    assert scores.correlation[3] == 0


def test_a_code_that_is_constant_but_for_rounding_tells_nothing():
    """It was infinitely correlated, and so the best of all features."""
    x = torch.stack([torch.arange(9.0), torch.full((9,), 1 / 3)], dim=1)
    x[::2, 1] *= 1 + 2**-23
    scores = score_hypothesis(signed_identity(2), x, torch.arange(9.0) - 4)
    assert scores.correlation.tolist() == pytest.approx([1, 0, 0, 0])


def test_activity_counts_by_its_probability():
    """Scores of a probabilistic dictionary are the expectation over its supports."""
    torch.manual_seed(0)
    model = ps.SpikeSlabDictionary(d_in=4, d_sae=6)
    x, proxy = torch.randn(50, 4), torch.randn(50)
    p = model.encode(x).p_active
    scores = score_hypothesis(model, x, proxy)
    torch.testing.assert_close(scores.sensitivity, p[proxy > 0].mean(0))
    torch.testing.assert_close(scores.specificity, 1 - p[proxy <= 0].mean(0))
    torch.testing.assert_close(scores.precision, p[proxy > 0].sum(0) / p.sum(0))


def test_bad_arguments():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="0 above"):
        score_hypothesis(signed_identity(2), x, torch.zeros(4))
    with pytest.raises(ValueError, match="one proxy value a token"):
        score_hypothesis(signed_identity(2), x, torch.randn(3))
    with pytest.raises(ValueError, match="window must be at least 1"):
        log_likelihood_ratio(ALL, ONE, ALL, window=0)
    with pytest.raises(ValueError, match="0 and 1200 tokens"):
        log_likelihood_ratio(ALL, ONE[:0], ALL)
