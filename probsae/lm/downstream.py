"""How far a replacement at one hook moves the layers behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsae.activations.hooks import by_context, edited, find_hook, recorded
from probsae.activations.language_model import LanguageModel
from probsae.dictionary import Dictionary
from probsae.lm.contexts import check_contexts, tokens_of, with_tokens
from probsae.progress import shown


@torch.no_grad()
def downstream_fvu(
    model: LanguageModel,
    hook: str,
    dictionary: Dictionary,
    token_ids: Int[Tensor, "context position"],
    later: Sequence[str],
    *,
    batch_size: int = 16,
    keep_first: bool = True,
    progress: bool | None = None,
) -> dict[str, float]:
    """Measure the reconstruction error of later layers when a dictionary is spliced in at a hook.

    Parameters
    ----------
    model, hook, dictionary, batch_size, keep_first
        As for `splice`.
    token_ids : Tensor, shape (context, position)
        Text to run on.
    later : sequence of str
        Hooks behind `hook`, such as the residual stream after later blocks.
    progress : bool, optional
        Show a bar; by default on terminals, where it takes longer than two seconds.

    Returns
    -------
    dict of str to float
        For each later hook, |y - y'|^2 over the variance of y, both summed over tokens, where y
        is what passes there untouched and y' with the reconstruction; lower is better.

    Raises
    ------
    ValueError
        If a hook is unknown.
    """
    check_contexts(token_ids)
    point, first = find_hook(model.network, hook), int(keep_first)
    points = [find_hook(model.network, name) for name in later]
    sums: dict[str, list[Tensor]] = {name: [] for name in later}
    for ids in shown(token_ids.split(batch_size), "later layers", "batch", progress):
        with recorded([point, *points]) as before:
            model.logits(ids)
        x = tokens_of(by_context(before[hook], ids.shape), first)
        new = dictionary.decode(dictionary.encode(x).mean)
        with (
            edited(point, lambda x, new=new, ids=ids: with_tokens(x, first, new, ids.shape)),
            recorded(points) as after,
        ):
            model.logits(ids)
        for name in later:
            y, changed = (by_context(seen[name], ids.shape) for seen in (before, after))
            sums[name].append(_moments(y, changed, first))
    return {name: _fvu(torch.stack(parts).sum(0)) for name, parts in sums.items()}


def _moments(before: Tensor, after: Tensor, first: int) -> Float[Tensor, "moment d_in"]:
    """Return number of tokens, sum, sum of squares and squared error of each dimension."""
    y, changed = tokens_of(before, first).double(), tokens_of(after, first).double()
    count = torch.full_like(y[0], len(y))
    return torch.stack([count, y.sum(0), y.square().sum(0), (y - changed).square().sum(0)])


def _fvu(moments: Float[Tensor, "moment d_in"]) -> float:
    count, total, squares, error = moments
    return float(error.sum() / (squares - total.square() / count).sum())
