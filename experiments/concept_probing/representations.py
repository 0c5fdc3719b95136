"""What the methods make of activations, and the fits of their dictionaries."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import probsae as ps
from experiments.concept_probing.settings import Settings, dictionary_facts, digest
from probsae.activations import ActivationStore
from probsae.dictionary import Dictionary
from probsae.inference import Callback, Checkpoint, TargetL0
from probsae.models.base import SparseDictionary
from probsae.models.files import load, save

Map = Callable[[Tensor], Tensor]

_CHECKPOINT_EVERY = 100


class Representation(NamedTuple):
    """What a method makes of activations."""

    codes: Map
    decode: Map | None = None
    """From the codes back to activations, where that is possible."""
    draws: Callable[[Tensor], Iterator[Tensor]] | None = None
    """Posterior draws of the codes, the first of them `codes`; None where codes are given."""


def fitted(settings: Settings, name: str, train: ActivationStore) -> SparseDictionary:
    """Return the dictionary called `name`, from disk where a run of the same facts left it.

    A fit that was killed goes on from its last checkpoint.
    """
    facts = dictionary_facts(settings, train)
    folder = settings.out / "dictionaries" / f"{name}-{digest(facts)}"
    if folder.exists():
        return load(folder)
    checkpoint = folder.with_name(folder.name + "-checkpoint")
    torch.manual_seed(settings.fit_seed)
    model = new(settings, name, train)
    callbacks: list[Callback] = [TargetL0(settings.l0)] if name == "SpikeSlab" else []
    ps.fit(
        model, train, n_steps=settings.n_steps, batch_size=settings.batch_size,
        seed=settings.fit_seed, callbacks=[*callbacks, Checkpoint(checkpoint, _CHECKPOINT_EVERY)],
        resume=checkpoint if checkpoint.exists() else None,
    )  # fmt: skip
    save(model, folder)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return model


def new(settings: Settings, name: str, train: ActivationStore) -> SparseDictionary:
    """Return an unfitted dictionary."""
    if name == "SpikeSlab":
        return ps.SpikeSlabDictionary(train.d_in, settings.d_sae, learn_noise=False)
    if name == "TopK":
        return ps.TopKSAE(train.d_in, settings.d_sae, k=settings.l0)
    # A lone code is pulled down by half the coefficient: a tenth of a typical code's size.
    return ps.ReLUSAE(train.d_in, settings.d_sae, l1_coefficient=2 * train.index["scale"]["scale"])


def representations(settings: Settings, train: ActivationStore) -> dict[str, Representation]:
    """Return what each method makes of activations, by name."""
    n_tokens = min(20_000, train.n_tokens)
    d_sae, seed = settings.d_sae, settings.fit_seed
    plain = {
        "PCA": ps.baselines.PCA(d_sae, n_tokens=n_tokens, seed=seed).fit(train),
        "random directions": ps.baselines.RandomDictionary(d_sae, seed=seed).fit(train),
        "ReLU": fitted(settings, "ReLU", train),
        "TopK": fitted(settings, "TopK", train),
    }
    slab = fitted(settings, "SpikeSlab", train)

    def hard(x: Tensor) -> Tensor:
        posterior = slab.encode(x)
        return posterior.mean * posterior.is_active

    def draws(x: Tensor) -> Iterator[Tensor]:
        posterior = slab.encode(x)
        for number in range(settings.n_draws):
            with torch.random.fork_rng():
                torch.manual_seed(1_000 * settings.seed + number)
                drawn = posterior.sample()[0]
            yield drawn

    return {
        "raw activations": Representation(lambda x: x),
        **{name: Representation(_mean(model), model.decode) for name, model in plain.items()},
        "SpikeSlab, mean": Representation(_mean(slab), slab.decode),
        "SpikeSlab, hard codes": Representation(hard, slab.decode),
        "SpikeSlab, p_active": Representation(lambda x: slab.encode(x).p_active),
        "SpikeSlab, posterior": Representation(lambda x: next(draws(x)), slab.decode, draws),
    }


def _mean(model: Dictionary) -> Map:
    return lambda x: model.encode(x).mean
