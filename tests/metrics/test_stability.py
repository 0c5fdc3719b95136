"""Features that come back: by hand, invariances, and fits that do not agree."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from probsae.metrics import (
    DisagreementWarning,
    align,
    auroc,
    chance_reappearance,
    direction_rhat,
    instability_auroc,
    max_cosines,
    mmcs,
    mmcs_table,
    reappearance,
)

EYE = torch.eye(4)
HALF = math.sqrt(0.5)


def random_rows(n: int, d_in: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d_in, generator=generator), dim=-1)


def test_alignment_by_hand():
    order = torch.tensor([2, 0, 3, 1])
    found = align([EYE, 5 * EYE[order], EYE[[3, 1]]])
    assert found.index.tolist() == [[0, 1, 2, 3], [1, 3, 0, 2], [-1, 1, -1, 0]]
    assert found.cosine[:2].tolist() == [[1.0] * 4] * 2
    assert found.cosine[2].isnan().tolist() == [True, False, True, False]
    wide = align([torch.cat([-EYE, EYE])], reference=EYE)
    assert wide.index.tolist() == [[4, 5, 6, 7]]  # a negative is another feature


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 8))
def test_alignment_undoes_a_permutation(seed, n):
    rows = random_rows(n, 6, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    index = align([rows, rows[order]]).index[1]
    torch.testing.assert_close(rows[order][index], rows)


def test_reappearance_by_hand():
    diagonal = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    found = reappearance(EYE, [EYE[:2], diagonal], threshold=0.7)
    assert found.cosine[1].tolist() == pytest.approx([HALF, HALF, 0, 0])
    assert found.share.tolist() == [1, 1, 0, 0]
    assert found.rate == 0.5
    expected = (chance_reappearance(2, 4, 0.7) + chance_reappearance(1, 4, 0.7)) / 2
    assert found.chance == pytest.approx(expected)
    assert reappearance(EYE, [EYE[:2], diagonal], threshold=0.8).share.tolist() == [0.5, 0.5, 0, 0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 9), m=st.integers(2, 9))
def test_reappearance_does_not_depend_on_order_or_scale_and_grows_with_width(seed, n, m):
    generator = torch.Generator().manual_seed(seed)
    rows, other = random_rows(n, 4, seed), random_rows(m, 4, seed + 1)
    found = reappearance(rows, [other], threshold=0.5)
    scaled = other[torch.randperm(m, generator=generator)] * 3
    assert torch.equal(reappearance(rows, [scaled], threshold=0.5).share, found.share)
    wider = reappearance(rows, [torch.cat([other, random_rows(2, 4, seed + 2)])], threshold=0.5)
    assert (wider.share >= found.share).all()
    assert reappearance(rows, [rows], threshold=0.5).rate == 1


@pytest.mark.parametrize(("d_sae", "d_in", "threshold"), [(1, 3, 0.5), (20, 5, 0.7), (64, 8, 0.6)])
def test_chance_is_that_of_random_directions(d_sae, d_in, threshold):
    n = 20_000
    other = torch.stack([random_rows(d_sae, d_in, s) for s in range(20)])
    share = torch.cat(
        [(max_cosines(o, random_rows(n // 20, d_in, 100 + s)) > threshold).double()
         for s, o in enumerate(other)]
    ).reshape(20, -1).mean(1)  # fmt: skip
    # Features looked for in one dictionary are not independent: the error is that over the 20.
    error = float(share.std()) / math.sqrt(20)
    expected = chance_reappearance(d_sae, d_in, threshold)
    assert float(share.mean()) == pytest.approx(expected, abs=4.5 * error)


def test_independent_noise_fits_are_stable_and_random_ones_are_not():
    true = random_rows(40, 32, 0)
    fits = [true[torch.randperm(40)] + 0.05 * random_rows(40, 32, s) for s in (1, 2, 3)]
    assert reappearance(fits[0], fits[1:]).rate == 1
    random = reappearance(random_rows(40, 32, 7), fits)
    assert random.rate <= 0.05
    assert random.chance < 1e-9


def test_mmcs_table_by_hand():
    diagonal = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    table = mmcs_table([EYE, diagonal])
    expected = torch.tensor([[1, HALF], [2 * HALF / 4, 1]], dtype=torch.float64)
    torch.testing.assert_close(table.mmcs, expected)
    assert float(table.mmcs[1, 0]) == pytest.approx(mmcs(diagonal, EYE))


def test_mmcs_chance_is_not_one_on_the_diagonal():
    table = mmcs_table([random_rows(512, 256, 0), random_rows(64, 256, 1)])
    # As measured elsewhere: .19 for 512 in 512 directions of 256 dimensions.
    assert float(table.chance[0, 0]) == pytest.approx(0.19, abs=0.01)
    assert table.chance[1, 0] < table.chance[0, 1]
    assert float(table.mmcs[0, 1]) == pytest.approx(float(table.chance[0, 1]), abs=0.03)


def posterior_draws(mean: torch.Tensor, scale: float, seed: int, n: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + scale * torch.randn(n, *mean.shape, generator=generator)


def test_rhat_sees_which_features_fits_disagree_about():
    mean = random_rows(6, 16, 0)
    other = mean.clone()
    other[2] = normalize(mean[2] + 0.5 * random_rows(1, 16, 3)[0], dim=-1)  # another optimum
    order = torch.tensor([5, 3, 1, 0, 2, 4])
    fits = [
        posterior_draws(mean, 0.02, 1),
        posterior_draws(mean, 0.02, 2),
        posterior_draws(other, 0.02, 3),
    ]
    fits[2][:, 4] *= 1.5  # another norm, one direction
    fits[2] = fits[2][:, order]
    with pytest.warns(DisagreementWarning, match="17% of 6 features"):
        result = direction_rhat(fits)
    assert (result.cosine > 1.1).tolist() == [False, False, True, False, False, False]
    assert (result.norm > 1.1).tolist() == [False, False, False, False, True, False]


def test_surplus_features_may_point_anywhere():
    mean = random_rows(6, 16, 0)
    other = torch.cat([mean[:4], random_rows(2, 16, 5)])
    fits = [posterior_draws(mean, 0.02, 1), posterior_draws(other, 0.02, 2)]
    with pytest.warns(DisagreementWarning):
        direction_rhat(fits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        direction_rhat(fits, is_real=torch.arange(6) < 4)


def test_rhat_of_unit_rows_has_no_norm():
    fits = [normalize(posterior_draws(EYE, 0.1, s), dim=-1) for s in (1, 2)]
    result = direction_rhat([fit.round(decimals=6) for fit in fits])
    assert (result.cosine < 1.2).all()
    exact = direction_rhat([EYE.expand(10, 4, 4)] * 2)
    assert exact.norm.isnan().all()


def test_doubt_that_knows_what_is_missing_elsewhere():
    true = random_rows(30, 32, 0)
    dictionary = torch.cat([true, random_rows(10, 32, 1)])
    found = reappearance(dictionary, [torch.cat([true, random_rows(10, 32, s)]) for s in (2, 3)])
    rate = torch.linspace(0.2, 0.001, 40)
    knows = torch.cat([torch.full((30,), 0.1), torch.full((10,), 0.9)])
    result = instability_auroc(knows, found, rate)
    assert result.auroc == 1
    assert result.share_bad == 0.25
    assert result.baseline == 1  # the rarest are the missing ones here, so doubt adds nothing
    noise = torch.rand(40, generator=torch.Generator().manual_seed(4))
    assert instability_auroc(noise, found, rate).auroc == auroc(noise, found.share < 0.5)
    assert 0.2 < instability_auroc(noise, found, rate).auroc < 0.8


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least one"):
        align([])
    with pytest.raises(ValueError, match="at least one other"):
        reappearance(EYE, [])
    with pytest.raises(ValueError, match="d_in"):
        reappearance(EYE, [torch.eye(3)])
    with pytest.raises(ValueError, match="threshold"):
        chance_reappearance(3, 4, 1.0)
    with pytest.raises((ValueError, TypeError), match=r"one shape|draws"):
        direction_rhat([torch.randn(5, 4, 4), torch.randn(6, 4, 4)])
    with pytest.raises(ValueError, match="two fits"):
        direction_rhat([torch.randn(5, 4, 4)])
    with pytest.raises(ValueError, match="4 draws"):
        direction_rhat([torch.randn(3, 4, 4)] * 2)
