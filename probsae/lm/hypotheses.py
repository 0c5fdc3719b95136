"""Does a feature stand for a kind of text? Its activity against a log-likelihood-ratio proxy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsae.activations.source import check_activations
from probsae.dictionary import Dictionary
from probsae.progress import shown


def log_likelihood_ratio(
    token_ids: Int[Tensor, "context position"],
    hypothesis_ids: Int[Tensor, "..."],
    background_ids: Int[Tensor, "..."],
    *,
    window: int = 1,
    strength: float = 1.0,
) -> Float[Tensor, "context position"]:
    r"""Evidence, token by token, that text is of a certain kind rather than of any.

    With s the last `window` tokens up to and including this one, independent under either law,

        log P(s | hypothesis) / P(s) = sum over v in s of log P(v | hypothesis) / P(v).

    Parameters
    ----------
    token_ids : Tensor, shape (context, position)
        Text to judge.
    hypothesis_ids : Tensor of ints, any shape
        Tokens of the hypothesis, as often as they occur in it: a French text for "French", a
        program for "code". For a set of token types alone pass those tokens of the background
        that are in it, `background_ids[torch.isin(background_ids, chosen)]`.
    background_ids : Tensor of ints, any shape
        Text of all kinds, in the proportions of the data; it should include the hypothesis's.
    window : int, default 1
        Tokens of s; fewer at the start of a context. A token alone often belongs to several
        languages, ten of them seldom do.
    strength : float, default 1
        Tokens that the prior is worth: P(v | hypothesis) is the mean under a Dirichlet prior at
        the background, so a token unseen in the hypothesis has a finite ratio.

    Returns
    -------
    Tensor, shape (context, position)
        Nats; above 0 speaks for the hypothesis.

    Raises
    ------
    ValueError
        If there are no hypothesis or background tokens, or `window` or `strength` is not positive.

    Notes
    -----
    Source: Bricken et al. (2023), "Towards monosemanticity", section "Activation specificity".

    Examples
    --------
    >>> text = torch.tensor([[0, 0, 1, 1]])
    >>> log_likelihood_ratio(text, torch.tensor([1, 1, 1]), text).exp()
    tensor([[0.2500, 0.2500, 1.7500, 1.7500]])
    """
    if window < 1 or not strength > 0 or not (hypothesis_ids.numel() and background_ids.numel()):
        raise ValueError(
            "window must be at least 1, strength positive, and both texts hold a token; got "
            f"{window}, {strength}, {hypothesis_ids.numel()} and {background_ids.numel()} tokens"
        )
    size = 1 + max(int(ids.max()) for ids in (token_ids, hypothesis_ids, background_ids))
    here, anywhere = (
        torch.bincount(ids.flatten().cpu(), minlength=size).double()
        for ids in (hypothesis_ids, background_ids)
    )
    # A token that the background lacks counts as seen in it once.
    background = anywhere.clamp(min=1) / anywhere.sum()
    ratio = (here / background + strength) / (here.sum() + strength)
    sums = ratio.log()[token_ids.cpu()].cumsum(1)
    before = torch.nn.functional.pad(sums, (window, 0))[:, : sums.shape[1]]
    return (sums - before).float()


@dataclass(frozen=True)
class HypothesisScores:
    """How well each feature tells tokens of a hypothesis from others.

    Attributes
    ----------
    sensitivity : Tensor, shape (d_sae,)
        P(active | hypothesis): the share of its tokens that the feature is active on.
    specificity : Tensor, shape (d_sae,)
        P(not active | not the hypothesis).
    precision : Tensor, shape (d_sae,)
        P(hypothesis | active); not a number for a feature that is never active. Read it beside
        `share`, its value by chance.
    correlation : Tensor, shape (d_sae,)
        Pearson's, of code and proxy; 0 for a feature whose code never changes.
    share : float
        Share of tokens of the hypothesis.
    n_tokens : int
        Tokens judged.
    """

    sensitivity: Float[Tensor, " d_sae"]
    specificity: Float[Tensor, " d_sae"]
    precision: Float[Tensor, " d_sae"]
    correlation: Float[Tensor, " d_sae"]
    share: float
    n_tokens: int


# Of the mean square: deviations of a millionth, ten times what single precision rounds off.
_ROUNDING = 1e-12


@torch.no_grad()
def score_hypothesis(
    dictionary: Dictionary,
    x: Float[Tensor, "token d_in"],
    proxy: Float[Tensor, " label"],
    *,
    threshold: float = 0.0,
    batch_size: int = 4_096,
    progress: bool | None = None,
) -> HypothesisScores:
    """Score every feature of a dictionary against one hypothesis.

    A token is of the hypothesis where its proxy exceeds `threshold`. Activity counts by its
    probability, so that a feature that is on with p = .3 counts as .3 of a token. The best of
    thousands of features is too good by chance: choose on one half of the text, score on another.

    Parameters
    ----------
    dictionary : Dictionary
        A fitted dictionary or baseline.
    x : Tensor, shape (token, d_in)
        Activations, for instance from `read_tokens`.
    proxy : Tensor, shape (token,)
        From `log_likelihood_ratio` on the same tokens, or any label (1 and 0, threshold .5).
    threshold : float, default 0
        Nats of evidence.
    batch_size : int, default 4096
        Tokens encoded at a time.
    progress : bool, optional
        Show a bar; by default on terminals, where it takes longer than two seconds.

    Returns
    -------
    HypothesisScores
        For each feature, on the CPU; higher is better, `precision` beside `share`.

    Raises
    ------
    ValueError
        If the tokens are not as many as the proxy's values, or all are on one side of the
        threshold.
    """
    x = check_activations(x)
    is_true = proxy > threshold
    n_true = int(is_true.sum())
    if len(x) != len(proxy) or n_true in (0, len(x)):
        raise ValueError(
            "there must be one proxy value a token, some above the threshold and some not; got "
            f"{len(x)} tokens, {len(proxy)} values and {n_true} above {threshold}"
        )
    # Centred, the sums of products below lose no digits to a large mean.
    labels = torch.stack([is_true.double(), proxy.double() - proxy.double().mean()])
    active = torch.zeros(())
    moments = torch.zeros(())
    parts = shown(x.split(batch_size), "hypothesis", "batch", progress)
    for rows, label in zip(parts, labels.split(batch_size, dim=1), strict=True):
        posterior = dictionary.encode(rows)
        p, z = posterior.p_active.double(), posterior.mean.double()
        label = label.to(p)
        active = active + torch.stack([label[0] @ p, p.sum(0)]).cpu()
        moments = moments + torch.stack([z.sum(0), z.square().sum(0), label[1] @ z]).cpu()
    (true_active, all_active), (total, squares, product) = active, moments
    spread = squares - total.square() / len(x)
    # Codes in single precision that differ by rounding alone are constant.
    is_constant = spread <= _ROUNDING * squares
    size = labels[1].square().sum().cpu() * spread
    return HypothesisScores(
        sensitivity=(true_active / n_true).float(),
        specificity=(1 - (all_active - true_active) / (len(x) - n_true)).float(),
        precision=(true_active / all_active).float(),
        correlation=torch.where(is_constant, 0.0, product / size.clamp(min=0).sqrt()).float(),
        share=n_true / len(x),
        n_tokens=len(x),
    )
