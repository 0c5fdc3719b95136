"""One table over any dictionaries: recovery, reconstruction, sparsity, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from probsae.activations.source import (
    ActivationData,
    check_activations,
    check_tokens_differ,
    take,
)
from probsae.comparison import Report, Row
from probsae.dictionary import Dictionary, posterior_batches
from probsae.metrics.arrays import ArrayLike, as_tensor
from probsae.models.base import SparseDictionary
from probsae.scores import Scores
from probsae.seeding import own_stream
from probsae.synthetic import SyntheticActivations


def evaluate(
    dictionaries: Dictionary | Sequence[Dictionary] | Mapping[str, Dictionary],
    data: ActivationData,
    truth: SyntheticActivations | tuple[ArrayLike, ArrayLike] | None = None,
    *,
    n_tokens: int = 32_768,
    seed: int = 1,
    progress: bool | None = None,
) -> Report:
    """Compare dictionaries on the same held-out tokens.

    Parameters
    ----------
    dictionaries : Dictionary, sequence, or mapping from name
        Fitted models and baselines.
    data : tensor, array, ActivationStore, synthetic source or iterable of batches
        Held-out activations. From a synthetic source fresh tokens are drawn with their codes.
    truth : SyntheticActivations, or (features, codes), optional
        Known features (feature, d_in) and the codes (token, feature) of `data`'s tokens. Taken
        from `data` where that is synthetic. A source beside activations gives its features only:
        which of them made those activations it does not know, so nothing is said of supports.
    n_tokens : int, default 32,768
        Tokens to evaluate on; all of the data where there are fewer. A feature that fires on
        one token in 3,000 is then alive with probability .99998.
    seed : int, default 1
        Of the choice, or draw, of tokens: those of a synthetic source are the ones that its
        `sample(n_tokens, seed=seed)` gives, so fit to others.
    progress : bool, optional
        Show a bar for each dictionary; by default on terminals, where it takes longer than two
        seconds.

    Returns
    -------
    Report
        A row for each dictionary; recovery and calibration where the truth is known.

    Raises
    ------
    ValueError
        If there is no dictionary, names repeat, widths differ, the codes do not fit the data, or
        there are not two different tokens.
    TypeError
        If something else than a dictionary came, `truth` is neither a source nor a pair, or `data`
        are no activations.
    """
    named = _named(dictionaries)
    x, features, z = _held_out(data, truth, n_tokens, seed)
    check_tokens_differ(x)
    rows = []
    for name, item in named.items():
        with own_stream("evaluate", seed, item.dictionary().device):
            rows.append(_row(name, item, x, features, z, progress))
    return Report(tuple(rows), len(x), {"seed": seed})


def _held_out(
    data: ActivationData,
    truth: SyntheticActivations | tuple[ArrayLike, ArrayLike] | None,
    n_tokens: int,
    seed: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the tokens and, as far as they are known, true features and codes; on the CPU."""
    if not (truth is None or isinstance(truth, tuple) or hasattr(truth, "features")):
        raise TypeError(
            "truth must be a SyntheticActivations or the pair (features, codes), got "
            f"{type(truth).__name__}"
        )
    if isinstance(truth, tuple):
        features, z = (as_tensor(part).cpu() for part in truth)
        x = check_activations(data)[:n_tokens].cpu()
        z = z[: len(x)]
        if z.shape != (len(x), len(features)):
            raise ValueError(
                f"truth must be (features, codes) with codes of shape {(len(x), len(features))}, "
                f"got {tuple(z.shape)}"
            )
        return x, features, z
    if isinstance(data, SyntheticActivations):
        x, z = data.to("cpu").sample(n_tokens, seed=seed)
        features = (data if truth is None else truth).features.cpu()
        is_own = torch.equal(features, data.features.cpu())
        return x, features, z if is_own else None
    x = take(data, n_tokens, seed=seed, device="cpu")
    return x, None if truth is None else truth.features.cpu(), None


def _row(
    name: str,
    dictionary: Dictionary,
    x: Tensor,
    features: Tensor | None,
    z: Tensor | None,
    progress: bool | None,
) -> Row:
    learned = dictionary.dictionary().cpu()
    scores = Scores(len(learned), learned, features)
    for where, piece, posterior in posterior_batches(dictionary, x, name, progress=progress):
        scores.add(dictionary, piece, posterior, None if z is None else z[where])
    is_probabilistic, noise = False, None
    if isinstance(dictionary, SparseDictionary) and not dictionary.is_deterministic:
        is_probabilistic, noise = True, float(dictionary.noise_scale.detach())
    return Row(
        method=name,
        d_sae=len(learned),
        noise_scale=noise,
        **scores.unsupervised(x, is_probabilistic),
        **({} if features is None else scores.recovery()),
        **({} if z is None else scores.support(is_probabilistic)),
    )


def _named(
    dictionaries: Dictionary | Sequence[Dictionary] | Mapping[str, Dictionary],
) -> dict[str, Dictionary]:
    if isinstance(dictionaries, Dictionary):
        dictionaries = [dictionaries]
    if isinstance(dictionaries, Mapping):
        named = dict(dictionaries)
    else:
        named = {}
        for item in dictionaries:
            name, n = type(item).__name__, 2
            while name in named:
                name, n = f"{type(item).__name__} {n}", n + 1
            named[name] = item
    if not named:
        raise ValueError("evaluate needs at least one dictionary, got none")
    for item in named.values():
        if not isinstance(item, Dictionary):
            raise TypeError(
                "evaluate compares fitted models and baselines, which encode and decode, got "
                f"{type(item).__name__}; pass a model, a list of them, or a dict of names to them"
            )
    return {name: _fitted(item) for name, item in named.items()}


def _fitted(item: Dictionary) -> Dictionary:
    """Return the model inside a scikit-learn estimator, and anything else itself."""
    from probsae.estimator import DictionaryEstimator  # and scikit-learn, in half a second

    if not isinstance(item, DictionaryEstimator):
        return item
    item.dictionary()  # which says so where it is not fitted
    return item.dictionary_
