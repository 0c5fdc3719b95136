"""A dictionary's reconstruction in place of a language model's activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from probsae.activations.hooks import edited, find_hook
from probsae.activations.language_model import LanguageModel


@dataclass(frozen=True)
class SpliceResult:
    """Next-token prediction with and without a replacement, means over predicted tokens.

    Attributes
    ----------
    cross_entropy : float
        Of the untouched model, nats per token.
    cross_entropy_spliced, cross_entropy_zero : float
        With the reconstruction, and with zeros, in place of the activations.
    kl : float
        KL(untouched || spliced) of the next-token distributions, nats per token.
    n_tokens : int
        Predicted tokens.
    """

    cross_entropy: float
    cross_entropy_spliced: float
    cross_entropy_zero: float
    kl: float
    n_tokens: int

    @property
    def loss_recovered(self) -> float:
        """Share of zero ablation's damage that the reconstruction avoids; 1 is best."""
        damage = self.cross_entropy_zero - self.cross_entropy
        return (self.cross_entropy_zero - self.cross_entropy_spliced) / damage


@torch.no_grad()
def splice(
    model: LanguageModel,
    hook: str,
    reconstruct: Callable[[Float[Tensor, "token d_in"]], Float[Tensor, "token d_in"]],
    token_ids: Int[Tensor, "context position"],
    *,
    batch_size: int = 16,
    keep_first: bool = True,
    progress: bool | None = None,
) -> SpliceResult:
    """Measure what a language model loses when `reconstruct` replaces the activations at a hook.

    Parameters
    ----------
    model : LanguageModel
        The model, loaded.
    hook : str
        Where, as for `harvest`.
    reconstruct : callable
        Maps activations (token, d_in) to their replacement: `lambda x: d.decode(d.encode(x).mean)`
        for a dictionary or baseline `d`.
    token_ids : Tensor, shape (context, position)
        Text to predict, at least two positions.
    batch_size : int
        Contexts of a forward pass.
    keep_first : bool, default True
        Leave each context's first position as it is, as `harvest` leaves it out by default: its
        massive activations were never shown to the dictionary. Zero ablation keeps it too, so
        the scale of loss recovered is not stretched by destroying it.

    Returns
    -------
    SpliceResult
        Cross-entropies and KL.

    Raises
    ------
    ValueError
        If the hook is unknown, or the token ids are not (context, position) with 2 positions.
    """
    if token_ids.ndim != 2 or token_ids.shape[1] < 2 or len(token_ids) == 0:
        raise ValueError(
            f"token_ids must have shape (context, position) with at least 2 positions, "
            f"got {tuple(token_ids.shape)}"
        )
    point = find_hook(model.network, hook)
    first = int(keep_first)

    def replace(x: Tensor) -> Tensor:
        flat = x[:, first:].flatten(0, 1)
        replaced = reconstruct(flat.float()).to(x).view_as(x[:, first:])
        return torch.cat([x[:, :first], replaced], dim=1)

    def zero(x: Tensor) -> Tensor:
        return torch.cat([x[:, :first], torch.zeros_like(x[:, first:])], dim=1)

    sums = torch.zeros(4, dtype=torch.float64)
    quiet = None if progress is None else not progress
    for ids in tqdm(token_ids.split(batch_size), desc="splice", delay=2, disable=quiet):
        original = _log_probabilities(model, ids)
        with edited(point, replace):
            spliced = _log_probabilities(model, ids)
        with edited(point, zero):
            zeroed = _log_probabilities(model, ids)
        target = ids[:, 1:].to(original.device).flatten()
        kl = F.kl_div(spliced, original, reduction="sum", log_target=True)
        losses = [F.nll_loss(p, target, reduction="sum") for p in (original, spliced, zeroed)]
        sums += torch.stack([*losses, kl]).double().cpu()
    n_tokens = token_ids[:, 1:].numel()
    original, spliced, zeroed, kl = (sums / n_tokens).tolist()
    return SpliceResult(original, spliced, zeroed, kl, n_tokens)


def _log_probabilities(
    model: LanguageModel, ids: Int[Tensor, "context position"]
) -> Float[Tensor, "prediction vocabulary"]:
    """Log-probabilities of each next token."""
    return F.log_softmax(model.logits(ids)[:, :-1].flatten(0, 1), dim=-1)
