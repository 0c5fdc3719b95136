"""Contexts of token ids, and the activations that a language model has on them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from probsae.activations.hooks import by_context, capture, edited, find_hook
from probsae.activations.language_model import LanguageModel
from probsae.progress import shown


def check_contexts(
    token_ids: Int[Tensor, "context position"], n_positions: int = 2
) -> Int[Tensor, "context position"]:
    """Return `token_ids` if it holds contexts of so many positions: in two there is a next token.

    Raises
    ------
    ValueError
        If it has another shape, no context, or fewer positions.
    """
    if token_ids.ndim != 2 or token_ids.shape[1] < n_positions or len(token_ids) == 0:
        raise ValueError(
            "token_ids must have shape (context, position) with at least one context and at "
            f"least {n_positions} position{'s' if n_positions > 1 else ''}, "
            f"got {tuple(token_ids.shape)}"
        )
    return token_ids


def tokens_of(x: Float[Tensor, "context position d_in"], first: int) -> Float[Tensor, "token d_in"]:
    """Flatten contexts from position `first` on to float32 tokens."""
    return x[:, first:].flatten(0, 1).float()


def with_tokens(
    x: Float[Tensor, "*rows d_in"],
    first: int,
    tokens: Float[Tensor, "token d_in"],
    shape: tuple[int, ...],
) -> Float[Tensor, "*rows d_in"]:
    """Put `tokens` where `tokens_of` took them, in the dtype, shape and on the device of `x`.

    `shape` is (context, position), see `by_context`.
    """
    before = by_context(x, shape)
    replaced = tokens.to(x).reshape(before[:, first:].shape)
    return torch.cat([before[:, :first], replaced], dim=1).reshape(x.shape)


@torch.no_grad()
def read_contexts(
    model: LanguageModel,
    hook: str,
    token_ids: Int[Tensor, "context position"],
    *,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Iterator[Float[Tensor, "context position d_in"]]:
    """Run the model up to a hook and yield what passes it, some contexts at a time.

    Parameters
    ----------
    model, hook
        As for `splice`.
    token_ids : Tensor, shape (context, position)
        What to run on.
    batch_size : int, default 16
        Contexts of a forward pass.
    progress : bool, optional
        Show a bar; by default on terminals, where it takes longer than two seconds.

    Yields
    ------
    Tensor, shape (context, position, d_in)
        Activations of the next `batch_size` contexts, fewer at the end, in the model's dtype and on
        its device.

    Raises
    ------
    ValueError
        If there are no contexts, the hook is unknown, does not give one vector a token, or the
        network trains.
    RuntimeError
        If the model's forward does not pass through the hook.
    """
    check_contexts(token_ids, n_positions=1)
    point = find_hook(model.network, hook)
    for ids in shown(token_ids.split(batch_size), hook, "batch", progress):
        x = capture([point], partial(model.run, ids))[0]
        yield by_context(x, ids.shape)


def read_tokens(
    model: LanguageModel,
    hook: str,
    token_ids: Int[Tensor, "context position"],
    *,
    keep_first: bool = True,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Float[Tensor, "token d_in"]:
    """Gather the activations at a hook, in the order of `token_ids`.

    Parameters
    ----------
    model, hook, token_ids, batch_size, progress
        As for `read_contexts`.
    keep_first : bool, default True
        Leave each context's first position out: the labels that go with the rows are then those of
        `token_ids[:, 1:].flatten()`.

    Returns
    -------
    Tensor, shape (token, d_in)
        Single precision, on the model's device; all of them are held at once.

    Raises
    ------
    ValueError, RuntimeError
        As for `read_contexts`.
    """
    contexts = read_contexts(model, hook, token_ids, batch_size=batch_size, progress=progress)
    return torch.cat([tokens_of(x, int(keep_first)) for x in contexts])


class ContextActivations:
    """Activations of whole contexts, made by the language model while a fit asks for them.

    A source for `fit`. Beside the activations it knows which contexts a batch came from, so that
    an objective can run the rest of the model on it (`EndToEnd`).

    Parameters
    ----------
    model, hook
        As for `splice`.
    token_ids : Tensor, shape (context, position)
        Contexts to train on, of any integers; reshuffled at each pass. They may be mapped from disk
        (`torch.from_file`): only a batch of them is read at a time.
    keep_first : bool, default True
        Leave out each context's first position, whose activations are massive in many models.

    Attributes
    ----------
    d_in : int
        Width at the hook.
    n_tokens : int
        Tokens of a pass.
    n_kept : int
        Tokens that a context gives. A fit's `batch_size` counts tokens and is rounded down to
        whole contexts, at least one.
    """

    def __init__(
        self,
        model: LanguageModel,
        hook: str,
        token_ids: Int[Tensor, "context position"],
        *,
        keep_first: bool = True,
    ):
        self.model, self.hook = model, hook
        self.point = find_hook(model.network, hook)
        self.token_ids = check_contexts(token_ids)
        self.first = int(keep_first)
        self.n_kept = token_ids.shape[1] - self.first
        self.n_tokens = len(token_ids) * self.n_kept
        self.d_in = next(read_contexts(model, hook, token_ids[:1], progress=False)).shape[-1]
        # A batch is forgotten together with its tensor.
        self._ids_of_batch = WeakTensorKeyDictionary()

    def batches(
        self, batch_size: int, *, seed: int = 0, device: torch.device | str | None = None
    ) -> Iterator[Tensor]:
        """Endless activations of whole contexts, shuffled context by context afresh at each pass.

        Parameters
        ----------
        batch_size : int
            Tokens of a batch; rounded down to whole contexts, at least one.
        seed : int, default 0
            Of the contexts' order.
        device : str or torch.device, optional
            Where to yield them; the model's where None.

        Yields
        ------
        Tensor, shape (token, d_in)
            Single precision. Contexts that do not fill a pass's last batch are left out of it.
        """
        return self.batches_after(0, batch_size, seed=seed, device=device)

    def batches_after(
        self,
        n_batches: int,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> Iterator[Tensor]:
        """Return what `batches` yields after its first `n_batches`, without running the model.

        Parameters
        ----------
        n_batches : int
            Batches to leave out.
        batch_size, seed, device
            As for `batches`.

        Yields
        ------
        Tensor, shape (token, d_in)
            As from `batches`.
        """
        n_contexts = min(max(1, batch_size // self.n_kept), len(self.token_ids))
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.token_ids), generator=generator)
            for rows in order[: len(order) // n_contexts * n_contexts].split(n_contexts):
                if n_batches > 0:
                    n_batches -= 1
                    continue
                ids = self.token_ids[rows.to(self.token_ids.device)].long()
                x = next(
                    read_contexts(self.model, self.hook, ids, batch_size=n_contexts, progress=False)
                )
                tokens = tokens_of(x, self.first).to(device)
                self._ids_of_batch[tokens] = ids
                yield tokens

    def contexts_of(self, x: Float[Tensor, "token d_in"]) -> Int[Tensor, "context position"]:
        """Return the token ids of a batch that `batches` yielded.

        Parameters
        ----------
        x : Tensor, shape (token, d_in)
            The very tensor that was yielded.

        Returns
        -------
        Tensor of ints, shape (context, position)
            Its contexts, first positions included.

        Raises
        ------
        ValueError
            If `x` is not such a batch itself (a copy or a part of one is not).
        """
        if x not in self._ids_of_batch:
            raise ValueError(
                "an end-to-end objective needs whole batches of the ContextActivations that it "
                "was made with: pass the same object to fit as data"
            )
        return self._ids_of_batch[x]


def logits_with(
    contexts: ContextActivations,
    token_ids: Int[Tensor, "context position"],
    tokens: Float[Tensor, "token d_in"],
) -> Float[Tensor, "context position vocabulary"]:
    """Logits of the model with `tokens` in place of its activations at the hook."""
    with edited(contexts.point, lambda x: with_tokens(x, contexts.first, tokens, token_ids.shape)):
        return contexts.model.logits(token_ids)
