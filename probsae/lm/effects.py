"""What a feature says about the next token: its direction read through the unembedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probsae.activations.hooks import find_hook
from probsae.activations.language_model import LanguageModel
from probsae.lm.contexts import read_contexts
from probsae.lm.direct_path import direct_gain
from probsae.lm.residual import end_of_stream, final_norm, in_residual_stream, where_added


def logit_effects(
    model: LanguageModel,
    directions: Float[Tensor, "feature d_in"],
    *,
    hook: str | None = None,
    head: str | None = None,
    norm: str | None = None,
) -> Float[Tensor, "feature vocabulary"]:
    r"""Change of the next-token logits by one unit of each feature, along the direct path.

    Of all paths from the hook to the logits this is the one past every later layer,

        effect_i = (w_i O G) U^T,   less its mean over the vocabulary,

    with U the unembedding, G the final norm's gain (a LayerNorm also subtracts the mean) and O
    the linear map behind the hook, where the hook is that map's input. The norm divides by the
    residual stream's size, which depends on the token: the effect of a code z is
    z effect / s, with s from `final_scale`.

    Parameters
    ----------
    model : LanguageModel
        The model, loaded.
    directions : Tensor, shape (feature, d_in)
        Rows of `dictionary()`; some of them, for a large vocabulary.
    hook : str, optional
        Where the dictionary was fitted: on the residual stream, or the input of the linear map
        that an MLP or attention writes to it with, such as `model.layers.7.mlp.down_proj:input`.
        Without one the directions are taken to lie in the residual stream.
    head, norm : str, optional
        Dotted names of unembedding and final norm, where they are not found by themselves.

    Returns
    -------
    Tensor, shape (feature, vocabulary)
        Logits per unit of the code; positive raises a token's probability.

    Raises
    ------
    ValueError
        If the directions do not lie in the residual stream and it is not known how they reach
        it, they do not reach its end past the later layers (which divide the stream itself in
        models with norms behind their blocks), or the unembedding is not found.

    Notes
    -----
    With a hook the network runs twice on a few tokens: families multiply embeddings and
    what parts of blocks add by factors of their own, which are measured (`direct_gain`). The mean
    over the vocabulary is taken off because no probability depends on it. A cap or
    factor on the logits behind the unembedding is left out. Source: Elhage et al. (2021), "A
    mathematical framework for transformer circuits" (path expansion).
    """
    weight = folded_unembedding(model, head=head, norm=norm)
    if hook is not None:
        directions = in_residual_stream(model, hook, directions, weight.shape[1], norm=norm)
        directions = directions * _gain(model, hook, head, norm)
    if directions.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"directions must lie in the residual stream, {weight.shape[1]} wide, got shape "
            f"{tuple(directions.shape)}; pass the hook that they were fitted at"
        )
    return directions.to(weight) @ weight.T


def top_tokens(
    model: LanguageModel,
    effects: Float[Tensor, "feature vocabulary"],
    n_tokens: int = 10,
    *,
    largest: bool = True,
) -> list[list[tuple[str, float]]]:
    """Return each feature's most promoted tokens (or most suppressed) with their effects.

    Parameters
    ----------
    model : LanguageModel
        With a tokenizer.
    effects : Tensor, shape (feature, vocabulary)
        From `logit_effects`.
    n_tokens : int, default 10
        Tokens of each feature.
    largest : bool, default True
        Promoted tokens; suppressed ones where False.

    Returns
    -------
    list of list of (str, float)
        For each feature the tokens' texts and effects, the strongest first; logits per unit of the
        code.
    """
    values, index = effects.topk(n_tokens, dim=-1, largest=largest)
    return [
        list(zip(model.decode(tokens), numbers, strict=True))
        for tokens, numbers in zip(index.tolist(), values.tolist(), strict=True)
    ]


@torch.no_grad()
def folded_unembedding(
    model: LanguageModel, *, head: str | None = None, norm: str | None = None
) -> Float[Tensor, "vocabulary d_model"]:
    """Return the unembedding with the final norm's gain folded in, centred over the vocabulary.

    Parameters
    ----------
    model, head, norm
        As for `logit_effects`.

    Returns
    -------
    Tensor, shape (vocabulary, d_model)
        Single precision; logits per unit of the normed residual stream.

    Raises
    ------
    ValueError
        If the unembedding is not found or no linear map, or the final norm is of an odd width.

    Notes
    -----
    The gain is measured, not read, since families store it differently (as g, as 1 + g): a norm
    leaves vectors of +1 and -1 with mean 0 as they are, but for gain and bias.
    """
    weight = _unembedding(model.network, head).weight.float()
    module = final_norm(model, norm)
    if module is not None:
        signs = _alternating(module, weight)
        odd = (module(signs) - module(-signs)).float() / 2
        weight = weight * (odd * signs.float())
        if _is_centering(module, weight):
            weight = weight - weight.mean(1, keepdim=True)
    return weight - weight.mean(0)


@torch.no_grad()
def final_scale(
    model: LanguageModel,
    token_ids: Int[Tensor, "context position"],
    *,
    norm: str | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
) -> float:
    """Return the median over tokens of what the final norm divides by; 1 without a norm.

    Parameters
    ----------
    model, norm
        As for `logit_effects`.
    token_ids : Tensor, shape (context, position)
        Text that is typical of where the effects are to be judged.
    batch_size : int, default 16
        Contexts of a forward pass.
    progress : bool, optional
        Show a bar; by default on terminals, where it takes longer than two seconds.

    Returns
    -------
    float
        Units of the residual stream: `logit_effects` of a code z are z effect / this.
    """
    module = final_norm(model, norm)
    if module is None:
        return 1.0
    name = next(name for name, value in model.network.named_modules() if value is module)
    sizes = []
    hook = f"{name}:input"
    for x in read_contexts(model, hook, token_ids, batch_size=batch_size, progress=progress):
        is_centering = _is_centering(module, x)
        x = x.float()
        if is_centering:
            x = x - x.mean(-1, keepdim=True)
        sizes.append(x.square().mean(-1).sqrt().flatten())
    return float(torch.cat(sizes).median())


def _gain(model: LanguageModel, hook: str, head: str | None, norm: str | None) -> float:
    """Return what a unit at a hook, mapped into the stream, is at the stream's end."""
    unembedding = _unembedding(model.network, head)
    end = end_of_stream(model, unembedding, norm)
    if end is None:
        return 1.0
    n_vocabulary, d_model = unembedding.weight.shape
    gain = direct_gain(model, where_added(model, hook), end, (n_vocabulary, d_model))
    if gain is None:
        raise ValueError(
            f"what is added at {hook} must reach the end of the residual stream past every later "
            "layer, and does not: a norm or a gate stands on its way, which does something else "
            "to each token; where you know what it does, map the directions and pass no hook"
        )
    return gain


def _unembedding(network: nn.Module, name: str | None) -> nn.Linear:
    if name is not None:
        module = find_hook(network, name).module
    else:
        find = getattr(network, "get_output_embeddings", lambda: None)
        module = find()
    if not isinstance(module, nn.Linear):
        raise ValueError(
            "the unembedding must be a linear map from the residual stream to logits, got "
            f"{type(module).__name__}; pass its name as head="
        )
    return module


def _alternating(module: nn.Module, like: Tensor) -> Float[Tensor, " d_model"]:
    """Return +1, -1, +1...: of mean 0 and mean square 1, as wide as `like`."""
    width = like.shape[-1]
    if width % 2:
        raise ValueError(f"the final norm's gain is measured on an even width only, got {width}")
    signs = torch.ones_like(next(module.parameters(), like).flatten()[:1]).repeat(width)
    signs[1::2] = -1
    return signs


def _is_centering(module: nn.Module, like: Tensor) -> bool:
    """Whether a norm subtracts the mean: then all ones and all minus ones are the same to it."""
    ones = _alternating(module, like).abs()
    return torch.equal(module(ones), module(-ones))
