"""Random numbers of a block's own: the caller's go on as if nothing had been drawn."""

import pytest
import torch

from probsae.seeding import seeded

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", PLACES)
def test_the_callers_numbers_go_on(device):
    torch.manual_seed(0)
    expected = torch.randn(6, device=device)
    torch.manual_seed(0)
    before = torch.randn(3, device=device)
    with seeded(1, device):
        inside = torch.randn(3, device=device)
    after = torch.randn(3, device=device)
    torch.testing.assert_close(torch.cat([before, after]), expected, rtol=0, atol=0)
    with seeded(1, device):
        torch.testing.assert_close(torch.randn(3, device=device), inside, rtol=0, atol=0)
    assert not torch.equal(inside, before)


@pytest.mark.parametrize("device", PLACES)
def test_what_is_drawn_outside_has_the_callers_numbers(device):
    torch.manual_seed(0)
    expected = torch.randn(4, device=device)
    with seeded(1, device):
        inside = torch.randn(4, device=device)
    torch.manual_seed(0)
    drawn, own = [], []
    with seeded(1, device) as block:
        for item in block.drawn_outside(torch.randn(1, device=device) for _ in range(3)):
            drawn.append(item)
            own.append(torch.randn(1, device=device))
    after = torch.randn(1, device=device)
    torch.testing.assert_close(torch.cat([*drawn, after]), expected, rtol=0, atol=0)
    with seeded(1, device):
        again = [torch.randn(1, device=device) for _ in range(3)]
    torch.testing.assert_close(torch.cat(own), torch.cat(again), rtol=0, atol=0)
    assert not torch.equal(inside, expected)


def test_after_an_error_too():
    def fail():
        with seeded(1):
            torch.rand(1)
            raise ZeroDivisionError

    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
def test_a_block_on_the_cpu_leaves_gpus_alone():
    state = torch.cuda.get_rng_state()
    with seeded(1):
        assert torch.equal(torch.cuda.get_rng_state(), state)
