"""The text behind a store's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from probsae.activations.store import ActivationStore

Decode = Callable[[Sequence[int]], Sequence[str]]


@dataclass(frozen=True)
class TokenText:
    """What each token reads, and where contexts begin.

    Attributes
    ----------
    strings : tuple of str
        The different tokens of the text.
    index : array, shape (token,)
        Each token's place in `strings`.
    starts : array
        Rows at which a context begins, ascending, the first is 0.
    """

    strings: tuple[str, ...]
    index: Int[np.ndarray, " token"]
    starts: Int[np.ndarray, " context"]

    def __len__(self) -> int:
        return len(self.index)


def token_text(
    store: ActivationStore, n_tokens: int | None = None, decode: Decode | None = None
) -> TokenText | None:
    """Read the text of a store's first tokens; None where it keeps no token ids.

    A context is a run of neighbouring positions of one document. `harvest` leaves out each
    context's first position by default, so that one token is missing between two contexts.

    Parameters
    ----------
    store : ActivationStore
        With the labels that `harvest` writes.
    n_tokens : int, optional
        How many; all of the view by default.
    decode : callable, optional
        Token ids to their texts, `LanguageModel.decode`; by default a token reads `#` and its id.

    Returns
    -------
    TokenText or None

    Examples
    --------
    >>> import tempfile, torch
    >>> from probsae.activations import StoreWriter
    >>> writer = StoreWriter(tempfile.mkdtemp() + "/store", d_in=2)
    >>> writer.append(torch.randn(4, 2), tokens=torch.tensor([5, 6, 5, 7]),
    ...               documents=torch.zeros(4).int(), positions=torch.tensor([1, 2, 1, 2]))
    >>> writer.finish()
    >>> token_text(ActivationStore(writer.path))
    TokenText(strings=('#5', '#6', '#7'), index=array([0, 1, 0, 2]), starts=array([0, 2]))
    """
    n_tokens = len(store) if n_tokens is None else min(n_tokens, len(store))
    ids, documents, positions = (
        store.labels(name, torch.arange(n_tokens)).numpy()
        for name in ("tokens", "documents", "positions")
    )
    if (ids < 0).any():
        return None
    unique, index = np.unique(ids, return_inverse=True)
    strings = [f"#{i}" for i in unique] if decode is None else decode(unique.tolist())
    is_next = (documents[1:] == documents[:-1]) & (positions[1:] == positions[:-1] + 1)
    starts = np.flatnonzero(np.concatenate([[True], ~is_next]))
    return TokenText(tuple(strings), index, starts)
