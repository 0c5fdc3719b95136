"""A dictionary's reconstruction in place of a language model's activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from probsae.activations.hooks import HookPoint, edited, find_hook, recorded
from probsae.activations.language_model import LanguageModel
from probsae.dictionary import Dictionary
from probsae.lm.contexts import check_contexts, read_contexts, tokens_of, with_tokens
from probsae.lm.splice_result import SpliceResult
from probsae.progress import shown

Reconstruct: TypeAlias = Callable[[Tensor], Tensor]
"""Activations (token, d_in) to their replacement."""


@torch.no_grad()
def splice(
    model: LanguageModel,
    hook: str,
    dictionary: Dictionary | Reconstruct,
    token_ids: Int[Tensor, "context position"],
    *,
    n_draws: int = 0,
    mean: Float[Tensor, " d_in"] | None = None,
    batch_size: int = 16,
    keep_first: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> SpliceResult:
    """Measure what a language model loses when a dictionary replaces the activations at a hook.

    Parameters
    ----------
    model : LanguageModel
        The model, loaded.
    hook : str
        Where, as for `harvest`.
    dictionary : Dictionary or callable
        A fitted dictionary or baseline, which reconstructs from the posterior mean of its codes;
        or any map from activations (token, d_in) to their replacement. Both are given activations
        as they are, in the units of the fit.
    token_ids : Tensor, shape (context, position)
        Text to predict, at least two positions.
    n_draws : int, default 0
        Posterior draws of the codes to splice in as well, each in a pass of its own.
    mean : Tensor, shape (d_in,), optional
        What mean ablation puts in; the mean over `token_ids` where None.
    batch_size : int, default 16
        Contexts of a forward pass.
    keep_first : bool, default True
        Leave each context's first position as it is, as `harvest` leaves it out by default: its
        massive activations were never shown to the dictionary. Ablations keep it too, so the
        scale of loss recovered is not stretched by destroying it.
    seed : int, default 0
        Of the draws. The caller's generators are not touched.
    progress : bool, optional
        Show a bar; by default on terminals, for runs longer than two seconds.

    Returns
    -------
    SpliceResult
        Cross-entropies, KL and loss recovered, with single tokens' values.

    Raises
    ------
    ValueError
        If the hook is unknown, the token ids are not (context, position) with 2 positions, or
        draws are asked of a plain callable.

    Notes
    -----
    Source: Bricken et al. (2023), "Towards monosemanticity", for zero ablation as the zero of the
    scale.
    """
    check_contexts(token_ids)
    if n_draws < 0 or (n_draws and not isinstance(dictionary, Dictionary)):
        raise ValueError(
            f"n_draws must be at least 0, and 0 where the replacement is a plain callable, got "
            f"{n_draws}; pass the dictionary itself to have draws of its codes"
        )
    point, first = find_hook(model.network, hook), int(keep_first)
    if mean is None:
        mean = _mean_activation(model, hook, token_ids, batch_size, first, progress)
    cuda = [model.device] if model.device.type == "cuda" else []
    parts: list[Tensor] = []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for ids in shown(token_ids.split(batch_size), "splice", "batch", progress):
            parts.append(_losses(model, point, ids, dictionary, mean, n_draws, first))
    cross_entropy, kl = torch.cat(parts, dim=2).cpu()
    return SpliceResult(
        token_cross_entropy=cross_entropy[0],
        token_cross_entropy_zero=cross_entropy[1],
        token_cross_entropy_mean=cross_entropy[2],
        token_cross_entropy_spliced=cross_entropy[3],
        token_kl=kl[3],
        draw_cross_entropy=cross_entropy[4:],
        draw_kl=kl[4:],
    )


def _losses(
    model: LanguageModel,
    point: HookPoint,
    ids: Int[Tensor, "context position"],
    dictionary: Dictionary | Reconstruct,
    mean: Float[Tensor, " d_in"],
    n_draws: int,
    first: int,
) -> Float[Tensor, "kind variant context prediction"]:
    """Cross-entropy and KL of each token: untouched, with zeros, mean, reconstruction, draws."""
    with recorded([point]) as seen:
        original = _log_probabilities(model, ids)
    tokens = tokens_of(seen[point.name], first)
    target = ids[:, 1:, None].to(original.device)
    losses = [_compare(original, original, target)]
    for replacement in _replacements(tokens, dictionary, mean, n_draws):
        with edited(point, lambda x, new=replacement: with_tokens(x, first, new)):
            losses.append(_compare(original, _log_probabilities(model, ids), target))
    return torch.stack(losses, dim=1)


def _replacements(
    tokens: Float[Tensor, "token d_in"],
    dictionary: Dictionary | Reconstruct,
    mean: Float[Tensor, " d_in"],
    n_draws: int,
) -> Iterator[Float[Tensor, "token d_in"]]:
    """Yield zeros, the mean, the reconstruction, and decoded draws, one at a time."""
    yield torch.zeros_like(tokens)
    yield mean.to(tokens).expand_as(tokens)
    if not isinstance(dictionary, Dictionary):
        yield dictionary(tokens)
        return
    posterior = dictionary.encode(tokens)
    yield dictionary.decode(posterior.mean)
    for _ in range(n_draws):
        yield dictionary.decode(posterior.sample()[0])


def _compare(
    original: Float[Tensor, "context prediction vocabulary"],
    spliced: Float[Tensor, "context prediction vocabulary"],
    target: Int[Tensor, "context prediction 1"],
) -> Float[Tensor, "kind context prediction"]:
    """Return each token's cross-entropy under `spliced` and KL(original || spliced)."""
    cross_entropy = -spliced.gather(-1, target)[..., 0]
    kl = F.kl_div(spliced, original, reduction="none", log_target=True).sum(-1)
    return torch.stack([cross_entropy, kl])


def _log_probabilities(
    model: LanguageModel, ids: Int[Tensor, "context position"]
) -> Float[Tensor, "context prediction vocabulary"]:
    """Log-probabilities of each next token."""
    return F.log_softmax(model.logits(ids)[:, :-1], dim=-1)


def _mean_activation(
    model: LanguageModel,
    hook: str,
    token_ids: Int[Tensor, "context position"],
    batch_size: int,
    first: int,
    progress: bool | None,
) -> Float[Tensor, " d_in"]:
    total = None
    for x in read_contexts(model, hook, token_ids, batch_size=batch_size, progress=progress):
        part = tokens_of(x, first).double().sum(0)
        total = part if total is None else total + part
    assert total is not None
    return (total / token_ids[:, first:].numel()).float()
