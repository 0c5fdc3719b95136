"""A dictionary's reconstruction in place of a language model's activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from probsae.activations.hooks import by_context, edited, find_hook, recorded
from probsae.activations.language_model import LanguageModel
from probsae.activations.resources import check_memory
from probsae.dictionary import Dictionary
from probsae.lm.contexts import check_contexts, read_contexts, tokens_of, with_tokens
from probsae.lm.kept_batches import KeptBatches, digest
from probsae.lm.splice_result import SpliceResult
from probsae.progress import shown
from probsae.seeding import seeded

Reconstruct: TypeAlias = Callable[[Tensor], Tensor]
"""Activations (token, d_in) to their replacement."""

# How closely tokens' cross-entropies, nats, must come out again for a checkpoint to be gone on
# from: half-precision kernels need not give the same on two machines.
_SAME = 0.01


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
    checkpoint: str | Path | None = None,
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
    checkpoint : str or Path, optional
        Folder that keeps each batch's values as they are made. A run that was killed goes on from
        there when it is called again with the same arguments; the folder can be removed
        afterwards.
    progress : bool, optional
        Show a bar; by default on terminals, for runs longer than two seconds.

    Returns
    -------
    SpliceResult
        Cross-entropies, KL and loss recovered, with single tokens' values.

    Raises
    ------
    ValueError
        If the hook is unknown, the token ids are not (context, position) with 2 positions,
        draws are asked of a plain callable, or the checkpoint is one of other arguments: its last
        batch is computed again, and must come out as it did.
    FileExistsError
        If the checkpoint's folder holds anything else.

    Notes
    -----
    Source: Bricken et al. (2023), "Towards monosemanticity", for zero ablation as the zero of the
    scale.
    """
    _check_draws(n_draws, dictionary)
    text = _Text(model, hook, token_ids, batch_size, keep_first)
    kept = _kept(checkpoint, text, mean, n_draws, seed)
    text.mean = _mean_of(text, mean, kept, progress)
    return _spliced(
        text, lambda i: _untouched(text, text.batches[i]), dictionary, n_draws, seed, kept, progress
    )


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
        text = self._text = _Text(model, hook, token_ids, batch_size, keep_first)
        text.mean = _mean_of(text, mean, KeptBatches(None, {}), progress)
        self._originals: list[_Untouched] = []
        for ids in shown(text.batches, "untouched model", "batch", progress):
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
        checkpoint: str | Path | None = None,
        progress: bool | None = None,
    ) -> SpliceResult:
        """Measure one dictionary, as `probsae.lm.splice` would.

        Parameters
        ----------
        dictionary, n_draws, seed, checkpoint, progress
            As for that function.

        Returns
        -------
        SpliceResult
            Cross-entropies, KL and loss recovered, with single tokens' values.

        Raises
        ------
        ValueError, FileExistsError
            As for that function.
        """
        _check_draws(n_draws, dictionary)
        kept = _kept(checkpoint, self._text, self._text.mean, n_draws, seed)
        return _spliced(
            self._text, self._originals.__getitem__, dictionary, n_draws, seed, kept, progress
        )


class _Text:
    """A language model, a place in it, and contexts to predict."""

    mean: Float[Tensor, " d_in"]

    def __init__(
        self,
        model: LanguageModel,
        hook: str,
        token_ids: Int[Tensor, "context position"],
        batch_size: int,
        keep_first: bool,
    ):
        check_contexts(token_ids)
        self.model, self.point = model, find_hook(model.network, hook)
        self.token_ids, self.batch_size, self.first = token_ids, batch_size, int(keep_first)
        self.batches = token_ids.split(batch_size)

    def settings(self) -> dict[str, Any]:
        """What values of single tokens depend on, JSON-ready."""
        return {
            "language_model": self.model.name,
            "hook": self.point.name,
            "token_ids": digest(ids.long() for ids in self.batches),
            "batch_size": self.batch_size,
            "keep_first": bool(self.first),
        }


def _mean_of(
    text: _Text,
    given: Float[Tensor, " d_in"] | None,
    kept: KeptBatches,
    progress: bool | None,
) -> Float[Tensor, " d_in"]:
    """Return what mean ablation puts in: what was given, or the mean over the text."""
    if given is not None:
        return given
    return kept.once("mean", lambda: {"mean": _mean_activation(text, progress)})["mean"]


def _kept(
    checkpoint: str | Path | None,
    text: _Text,
    mean: Float[Tensor, " d_in"] | None,
    n_draws: int,
    seed: int,
) -> KeptBatches:
    """Open the checkpoint; without one nothing is kept."""
    if checkpoint is None:
        return KeptBatches(None, {})
    of_the_mean = "of the text" if mean is None else digest([mean])
    settings = {**text.settings(), "mean": of_the_mean, "n_draws": n_draws, "seed": seed}
    return KeptBatches(Path(checkpoint), settings)


class _Untouched(NamedTuple):
    """Some contexts without a dictionary."""

    ids: Int[Tensor, "context position"]
    tokens: Float[Tensor, "token d_in"]
    """Activations at the hook."""
    log_probabilities: Float[Tensor, "context prediction vocabulary"]
    cross_entropies: list[Float[Tensor, "context prediction"]]
    """Untouched, with zeros, with the mean."""


def _untouched(text: _Text, ids: Int[Tensor, "context position"]) -> _Untouched:
    with recorded([text.point]) as seen:
        original = _log_probabilities(text.model, ids)
    tokens = tokens_of(by_context(seen[text.point.name], ids.shape), text.first)
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
    original: Callable[[int], _Untouched],
    dictionary: Dictionary | Reconstruct,
    n_draws: int,
    seed: int,
    kept: KeptBatches,
    progress: bool | None,
) -> SpliceResult:
    """Put the dictionary into each batch of contexts, and join what that shows."""
    parts, n = kept.first("batch"), len(text.batches)
    if parts:
        again = _splice_batch(text, original(len(parts) - 1), dictionary, 0, 0)
        _check_same(parts[-1]["cross_entropy"], again["cross_entropy"], kept)
    for i in shown(range(len(parts), n), "splice", "batch", progress, n, n_done=len(parts)):
        entropy = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
        parts.append(_splice_batch(text, original(i), dictionary, n_draws, entropy))
        kept.keep(f"batch-{i}", parts[-1])
    cross_entropy, kl = (
        torch.cat([part[name] for part in parts], dim=1) for name in ("cross_entropy", "kl")
    )
    return SpliceResult(
        token_cross_entropy=cross_entropy[0],
        token_cross_entropy_zero=cross_entropy[1],
        token_cross_entropy_mean=cross_entropy[2],
        token_cross_entropy_spliced=cross_entropy[3],
        token_kl=kl[0],
        draw_cross_entropy=cross_entropy[4:],
        draw_kl=kl[1:],
    )


def _splice_batch(
    text: _Text,
    untouched: _Untouched,
    dictionary: Dictionary | Reconstruct,
    n_draws: int,
    seed: int,
) -> dict[str, Tensor]:
    """Return cross-entropies (untouched, zeros, mean, spliced, draws) and KL (spliced, draws).

    On the CPU, shape (replacement, context, prediction) each.
    """
    cross_entropies, divergences = list(untouched.cross_entropies), []
    with seeded(seed, text.model.device):
        for replacement in _replacements(untouched.tokens, dictionary, n_draws):
            changed = _predictions_with(text, untouched, replacement)
            cross_entropies.append(_cross_entropy(changed, untouched.ids))
            divergences.append(_kl(untouched.log_probabilities, changed))
    return {
        "cross_entropy": torch.stack(cross_entropies).cpu(),
        "kl": torch.stack(divergences).cpu(),
    }


def _check_same(before: Tensor, again: Tensor, kept: KeptBatches) -> None:
    if not torch.allclose(before[: len(again)], again, rtol=_SAME, atol=_SAME, equal_nan=True):
        raise ValueError(
            f"{kept.path} was begun with another dictionary or other weights of the language "
            "model: its last batch comes out differently now; choose another folder"
        )


def _predictions_with(
    text: _Text, untouched: _Untouched, replacement: Float[Tensor, "token d_in"]
) -> Float[Tensor, "context prediction vocabulary"]:
    """Return the log-probabilities with `replacement` in the activations' place."""
    shape = untouched.ids.shape
    with edited(text.point, lambda x: with_tokens(x, text.first, replacement, shape)):
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


def _mean_activation(text: _Text, progress: bool | None) -> Float[Tensor, " d_in"]:
    total = None
    contexts = read_contexts(
        text.model, text.point.name, text.token_ids, batch_size=text.batch_size, progress=progress
    )
    for x in contexts:
        part = tokens_of(x, text.first).double().sum(0)
        total = part if total is None else total + part
    assert total is not None
    return (total / text.token_ids[:, text.first :].numel()).float()


def _check_fits(held: Tensor, n_times: float) -> None:
    """Raise MemoryError unless `n_times` as much as `held` fits beside it."""
    free = torch.cuda.mem_get_info(held.device)[0] if held.is_cuda else None
    check_memory(n_times * held.numel() * held.element_size(), "a text's log-probabilities", free)
