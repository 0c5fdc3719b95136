"""The type checker of the tests finds what it is there for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import probsae as ps
from tests.typecheck import checked

Codes = Float[Tensor, "token d_sae"]


@checked
def product(codes: Codes, directions: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "token d_in"]:
    return codes @ directions


@checked
def one_by_one(codes: Codes, n_tokens: int) -> Iterator[Float[Tensor, "other d_sae"]]:
    yield from codes[:n_tokens].split(1)


@checked
def halves(codes: Codes) -> Codes:
    return torch.cat([product(half, torch.eye(half.shape[1])) for half in codes.chunk(2)])


@checked
def first(codes: Codes) -> Codes:
    return codes[:1]


class Model:
    @checked
    @property
    def size(self) -> float:
        return self._size

    @checked
    @staticmethod
    def count(n: int) -> int:
        return n


@checked
@dataclass
class Pair:
    one: Float[Tensor, " n"]
    other: Float[Tensor, " n"]


def test_axes_have_one_size_within_a_call_and_others_in_those_that_it_makes():
    assert product(torch.ones(4, 3), torch.ones(3, 2)).shape == (4, 2)
    assert halves(torch.ones(4, 3)).shape == (4, 3)
    assert Pair(torch.ones(3), torch.ones(3)).one.shape == (3,)
    with pytest.raises(TypeCheckError):
        product(torch.ones(4, 3), torch.ones(2, 3))
    with pytest.raises(TypeCheckError):
        product(torch.ones(4, 3), torch.ones(3, 2).long())
    with pytest.raises(TypeCheckError):
        first(torch.ones(4, 3))
    with pytest.raises(TypeCheckError):
        Pair(torch.ones(3), torch.ones(2))


def test_generators_are_checked_when_they_are_made_and_not_where_they_are_used():
    @checked
    def uses(codes: Codes, more: Iterator[Codes]) -> int:
        return len(list(more))

    assert uses(torch.ones(4, 3), one_by_one(torch.ones(5, 2), 3)) == 3
    with pytest.raises(TypeCheckError):
        one_by_one(torch.ones(5, 2), 3.0)


def test_properties_and_static_methods_are_checked_and_an_int_is_a_float():
    model = Model()
    model._size = 3
    assert model.size == 3
    assert Model.count(3) == 3
    model._size = "3"
    with pytest.raises(TypeCheckError):
        model.size  # noqa: B018
    with pytest.raises(TypeCheckError):
        Model.count(3.0)


def test_the_package_is_checked():
    model = ps.TopKSAE(4, 8, k=2)
    with pytest.raises(TypeCheckError):
        model.decode(torch.ones(3, 8).long())
    with pytest.raises(TypeCheckError):
        ps.TopKSAE(4, 8, k="2")


@pytest.mark.usefixtures("unchecked_types")
def test_it_can_be_left():
    assert Model.count(3.0) == 3.0
