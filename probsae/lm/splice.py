"""A dictionary's reconstruction in place of a language model's activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from probsae.activations.hooks import edited, find_hook, recorded
from probsae.activations.language_model import LanguageModel
from probsae.activations.resources import check_memory
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
    _check_draws(n_draws, dictionary)
    text = _Text(model, hook, token_ids, mean, batch_size, keep_first, progress)
    originals = (_untouched(text, ids) for ids in token_ids.split(batch_size))
    return _spliced(text, originals, dictionary, n_draws, seed, progress)


class Splicer:
    """Splices dictionaries into the same text, each as `splice` would, in less time.

    What does not depend on the dictionary is computed once: the untouched model's predictions, the
    mean activation and both ablations. A dictionary then takes one forward pass instead of four,
    and one for each draw.

    Parameters
    ----------
    model, hook, token_ids, mean, batch_size, keep_first, progress
        As for `splice`.

    Raises
    ------
    ValueError
        As for `splice`.
    MemoryError
        If the untouched log-probabilities would not fit where the model is: 4 bytes for each
        prediction and entry of the vocabulary (.8 GB for 4,096 tokens of 49,152).
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LanguageModel,
        hook: str,
        token_ids: Int[Tensor, "context position"],
        *,
        mean: Float[Tensor, " d_in"] | None = None,
        batch_size: int = 16,
        keep_first: bool = True,
        progress: bool | None = None,
    ):
        self._text = _Text(model, hook, token_ids, mean, batch_size, keep_first, progress)
        self._originals: list[_Untouched] = []
        for ids in shown(token_ids.split(batch_size), "untouched model", "batch", progress):
            if len(self._originals) == 1:
                held = self._originals[0].log_probabilities
                _check_fits(held, len(token_ids) / len(held) - 1)
            self._originals.append(_untouched(self._text, ids))

    @torch.no_grad()
    def splice(
        self,
        dictionary: Dictionary | Reconstruct,
        *,
        n_draws: int = 0,
        seed: int = 0,
        progress: bool | None = None,
    ) -> SpliceResult:
        """Measure one dictionary; arguments, result and errors are those of `splice`."""
        _check_draws(n_draws, dictionary)
        return _spliced(self._text, self._originals, dictionary, n_draws, seed, progress)


class _Text:
    """A language model, a place in it, and contexts to predict."""

    def __init__(
        self,
        model: LanguageModel,
        hook: str,
        token_ids: Int[Tensor, "context position"],
        mean: Float[Tensor, " d_in"] | None,
        batch_size: int,
        keep_first: bool,
        progress: bool | None,
    ):
        check_contexts(token_ids)
        self.model, self.point = model, find_hook(model.network, hook)
        self.first = int(keep_first)
        self.n_batches = -(-len(token_ids) // batch_size)
        self.mean = mean
        if mean is None:
            self.mean = _mean_activation(model, hook, token_ids, batch_size, self.first, progress)


class _Untouched(NamedTuple):
    """Some contexts without a dictionary."""

    ids: Int[Tensor, "context position"]
    tokens: Float[Tensor, "token d_in"]
    """Activations at the hook."""
    log_probabilities: Float[Tensor, "context prediction vocabulary"]
    cross_entropies: list[Float[Tensor, "context prediction"]]
    """Untouched, with zeros, with the mean."""


def _untouched(text: _Text, ids: Int[Tensor, "context position"]) -> _Untouched:
    assert text.mean is not None
    with recorded([text.point]) as seen:
        original = _log_probabilities(text.model, ids)
    tokens = tokens_of(seen[text.point.name], text.first)
    untouched = _Untouched(ids, tokens, original, [_cross_entropy(original, ids)])
    for replacement in (torch.zeros_like(tokens), text.mean.to(tokens).expand_as(tokens)):
        changed = _predictions_with(text, untouched, replacement)
        untouched.cross_entropies.append(_cross_entropy(changed, ids))
    return untouched


def _check_draws(n_draws: int, dictionary: Dictionary | Reconstruct) -> None:
    if n_draws < 0 or (n_draws and not isinstance(dictionary, Dictionary)):
        raise ValueError(
            f"n_draws must be at least 0, and 0 where the replacement is a plain callable, got "
            f"{n_draws}; pass the dictionary itself to have draws of its codes"
        )


def _spliced(
    text: _Text,
    originals: Iterable[_Untouched],
    dictionary: Dictionary | Reconstruct,
    n_draws: int,
    seed: int,
    progress: bool | None,
) -> SpliceResult:
    """Put the dictionary into each batch of contexts, and join what that shows."""
    cuda = [text.model.device] if text.model.device.type == "cuda" else []
    bar = shown(originals, "splice", "batch", progress, total=text.n_batches)
    parts: list[Tensor] = []
    kl_parts: list[Tensor] = []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for untouched in bar:
            cross_entropies, divergences = list(untouched.cross_entropies), []
            for replacement in _replacements(untouched.tokens, dictionary, n_draws):
                changed = _predictions_with(text, untouched, replacement)
                cross_entropies.append(_cross_entropy(changed, untouched.ids))
                divergences.append(_kl(untouched.log_probabilities, changed))
            parts.append(torch.stack(cross_entropies))
            kl_parts.append(torch.stack(divergences))
    cross_entropy, kl = (torch.cat(each, dim=1).cpu() for each in (parts, kl_parts))
    return SpliceResult(
        token_cross_entropy=cross_entropy[0],
        token_cross_entropy_zero=cross_entropy[1],
        token_cross_entropy_mean=cross_entropy[2],
        token_cross_entropy_spliced=cross_entropy[3],
        token_kl=kl[0],
        draw_cross_entropy=cross_entropy[4:],
        draw_kl=kl[1:],
    )


def _predictions_with(
    text: _Text, untouched: _Untouched, replacement: Float[Tensor, "token d_in"]
) -> Float[Tensor, "context prediction vocabulary"]:
    """Return the log-probabilities with `replacement` in the activations' place."""
    with edited(text.point, lambda x: with_tokens(x, text.first, replacement)):
        return _log_probabilities(text.model, untouched.ids)


def _replacements(
    tokens: Float[Tensor, "token d_in"], dictionary: Dictionary | Reconstruct, n_draws: int
) -> Iterator[Float[Tensor, "token d_in"]]:
    """Yield the reconstruction, and decoded draws, one at a time."""
    if not isinstance(dictionary, Dictionary):
        yield dictionary(tokens)
        return
    posterior = dictionary.encode(tokens)
    yield dictionary.decode(posterior.mean)
    for _ in range(n_draws):
        yield dictionary.decode(posterior.sample()[0])


def _kl(
    original: Float[Tensor, "context prediction vocabulary"],
    changed: Float[Tensor, "context prediction vocabulary"],
) -> Float[Tensor, "context prediction"]:
    """Return KL(original || changed) of each prediction; a context at a time spares memory."""
    return torch.stack(
        [
            F.kl_div(after, before, reduction="none", log_target=True).sum(-1)
            for before, after in zip(original, changed, strict=True)
        ]
    )


def _cross_entropy(
    log_probabilities: Float[Tensor, "context prediction vocabulary"],
    ids: Int[Tensor, "context position"],
) -> Float[Tensor, "context prediction"]:
    target = ids[:, 1:, None].to(log_probabilities.device)
    return -log_probabilities.gather(-1, target)[..., 0]


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


def _check_fits(held: Tensor, n_times: float) -> None:
    """Raise MemoryError unless `n_times` as much as `held` fits beside it."""
    free = torch.cuda.mem_get_info(held.device)[0] if held.is_cuda else None
    check_memory(n_times * held.numel() * held.element_size(), "a text's log-probabilities", free)
