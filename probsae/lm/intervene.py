"""Change single features inside a running language model: ablate, pin, steer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsae.activations.hooks import by_context, edited, find_hook
from probsae.activations.language_model import LanguageModel
from probsae.dictionary import Dictionary
from probsae.lm.contexts import check_contexts, read_contexts, tokens_of, with_tokens

Features: TypeAlias = int | Sequence[int]
Values: TypeAlias = float | Sequence[float] | Float[Tensor, " feature"]

# What a network is handed that goes on from earlier positions: attention's, Mamba's, RWKV's.
_CACHES = ("past_key_values", "cache_params", "state")


def ablate(
    model: LanguageModel,
    hook: str,
    dictionary: Dictionary,
    features: Features,
    *,
    keep_first: bool = True,
) -> AbstractContextManager[None]:
    """Take features out inside the block: their codes become 0.

    Everything else stays: what changes is x + decode(z') - decode(z), so that what the dictionary
    does not explain passes by. z is the posterior mean.

    Parameters
    ----------
    model : LanguageModel
        The model, loaded.
    hook : str
        Where the dictionary was fitted.
    dictionary : Dictionary
        A fitted dictionary or baseline.
    features : int or sequence of int
        Which.
    keep_first : bool, default True
        Leave each context's first position as it is; positions that a generation adds are never
        first.

    Returns
    -------
    context manager
        Inside the block every forward pass of the model is changed; afterwards it is as before.

    Raises
    ------
    IndexError
        On entering the block, if there is no such feature, or one is named twice.
    ValueError
        On entering the block, if the hook is unknown.
    """
    return pin(model, hook, dictionary, features, 0.0, keep_first=keep_first)


def pin(
    model: LanguageModel,
    hook: str,
    dictionary: Dictionary,
    features: Features,
    values: Values,
    *,
    keep_first: bool = True,
) -> AbstractContextManager[None]:
    """Hold features at values inside the block, on every token.

    Parameters
    ----------
    model, hook, dictionary, features, keep_first
        As for `ablate`.
    values : float, or one for each feature
        What the codes become, units of the activations; `maximum_codes` tells how far they go by
        themselves.

    Returns
    -------
    context manager
        Inside the block every forward pass of the model is changed; afterwards it is as before.

    Raises
    ------
    IndexError
        On entering the block, if there is no such feature, or one is named twice.
    ValueError
        On entering the block, if the hook is unknown, or there is neither one value nor one for
        each feature.
    """
    return _changed(model, hook, dictionary, features, values, Tensor.index_copy, keep_first)


def steer(
    model: LanguageModel,
    hook: str,
    dictionary: Dictionary,
    features: Features,
    amounts: Values,
    *,
    keep_first: bool = True,
) -> AbstractContextManager[None]:
    """Add to features inside the block, on every token: x + amount w, for a linear decoder.

    Parameters
    ----------
    model, hook, dictionary, features, keep_first
        As for `ablate`.
    amounts : float, or one for each feature
        Added to the codes, units of the activations.

    Returns
    -------
    context manager
        Inside the block every forward pass of the model is changed; afterwards it is as before.

    Raises
    ------
    IndexError, ValueError
        As for `pin`.
    """
    return _changed(model, hook, dictionary, features, amounts, Tensor.index_add, keep_first)


@torch.no_grad()
def maximum_codes(
    model: LanguageModel,
    hook: str,
    dictionary: Dictionary,
    token_ids: Int[Tensor, "context position"],
    *,
    keep_first: bool = True,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Float[Tensor, " d_sae"]:
    """Return each feature's largest posterior mean on some text, units of the activations.

    Parameters
    ----------
    model, hook, dictionary, keep_first
        As for `ablate`.
    token_ids : Tensor, shape (context, position)
        The text.
    batch_size : int, default 16
        Contexts of a forward pass.
    progress : bool, optional
        Show a bar; by default on terminals, where it takes longer than two seconds.

    Returns
    -------
    Tensor, shape (d_sae,)
        Units of the activations.

    Raises
    ------
    ValueError
        If `token_ids` hold no token, or none but first positions, or the hook is unknown.
    """
    check_contexts(token_ids, n_positions=1 + keep_first)
    largest = None
    for x in read_contexts(model, hook, token_ids, batch_size=batch_size, progress=progress):
        here = dictionary.encode(tokens_of(x, int(keep_first))).mean.amax(0)
        largest = here if largest is None else torch.maximum(largest, here)
    assert largest is not None
    return largest


@contextmanager
def _changed(
    model: LanguageModel,
    hook: str,
    dictionary: Dictionary,
    features: Features,
    values: Values,
    change: Callable[[Tensor, int, Tensor, Tensor], Tensor],
    keep_first: bool,
) -> Iterator[None]:
    """Replace x by x + decode(z') - decode(z), with z' = change(z, -1, features, values)."""
    index, new = _matched(features, values, len(dictionary.dictionary()))
    point = find_hook(model.network, hook)

    @torch.no_grad()
    def edit(x: Tensor) -> Tensor | None:
        first = int(keep_first and start.is_first)
        tokens = tokens_of(by_context(x, start.shape), first)
        if len(tokens) == 0:
            return None
        z = dictionary.encode(tokens).mean
        changed = change(z, -1, index.to(z.device), new.to(z).expand(len(z), -1))
        shift = dictionary.decode(changed) - dictionary.decode(z)
        return with_tokens(x, first, tokens + shift.to(tokens), start.shape)

    with _WatchedStart(model) as start, edited(point, edit):
        yield


class _WatchedStart:
    """Tells whether the forward pass at work begins contexts or goes on from a cache; its shape.

    Attributes
    ----------
    is_first : bool
        Whether its positions begin contexts.
    shape : tuple of int
        (context, position) of its tokens.
    """

    def __init__(self, model: LanguageModel):
        self.network = model.network
        self.is_first, self.shape = True, (0, 0)

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.is_first = not any(_has_begun(kwargs.get(name)) for name in _CACHES)
        inputs = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        self.shape = next(x.shape[:2] for x in inputs if isinstance(x, Tensor))

    def __enter__(self) -> _WatchedStart:
        self._handle = self.network.register_forward_pre_hook(self._look, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def _has_begun(cache: Any) -> bool:
    """Whether a cache holds earlier positions, or what a recurrent network keeps of them."""
    if cache is None or isinstance(cache, list):
        return cache is not None  # RWKV's states are not there before its first step
    try:
        return cache.get_seq_length() > 0
    except ValueError:  # a cache without attention in it counts no positions
        return cache.has_previous_state()


def _matched(features: Features, values: Values, d_sae: int) -> tuple[Tensor, Tensor]:
    """Return indices and values of one length."""
    index = torch.as_tensor(features).reshape(-1)
    if len(index) == 0 or int(index.min()) < 0 or int(index.max()) >= d_sae:
        raise IndexError(f"features must be indices from 0 to {d_sae - 1}, got {features}")
    if len(index.unique()) < len(index):
        raise IndexError(f"each feature can be named once, got {features}")
    new = torch.as_tensor(values, dtype=torch.float32).reshape(-1)
    if len(new) not in (1, len(index)):
        raise ValueError(f"there must be one value, or one for each feature, got {len(new)}")
    return index, new.expand(len(index))
