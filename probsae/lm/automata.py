"""Features that call each other, or themselves, through the token they predict."""

from __future__ import annotations

import networkx as nx
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsae.dictionary import Dictionary
from probsae.progress import shown


@torch.no_grad()
def token_profile(
    dictionary: Dictionary,
    x: Float[Tensor, "token d_in"],
    token_ids: Int[Tensor, " label"],
    features: Int[Tensor, " feature"],
    n_vocabulary: int,
    *,
    batch_size: int = 4_096,
    progress: bool | None = None,
) -> Float[Tensor, "vocabulary feature"]:
    """Probability that each feature is active where the current token is v, for every v.

    Parameters
    ----------
    dictionary : Dictionary
        A fitted dictionary or baseline.
    x : Tensor, shape (token, d_in)
        Activations.
    token_ids : Tensor, shape (token,)
        The tokens that they are of.
    features : Tensor of ints, shape (feature,)
        Which.
    n_vocabulary : int
        Size of the vocabulary.
    batch_size : int, default 4096
        Tokens encoded at a time.
    progress : bool, optional
        Show a bar; by default on terminals, where it takes longer than two seconds.

    Returns
    -------
    Tensor, shape (vocabulary, feature)
        Mean p_active, with the feature's overall rate as one token's worth of prior: what a token
        that was not seen has.

    Raises
    ------
    ValueError
        If activations and token ids are not equally many.
    """
    if len(x) != len(token_ids):
        raise ValueError(f"each token needs its id, got {len(x)} tokens and {len(token_ids)} ids")
    sums = torch.zeros(n_vocabulary, len(features))
    parts = shown(x.split(batch_size), "token profile", "batch", progress)
    for rows, ids in zip(parts, token_ids.split(batch_size), strict=True):
        p = dictionary.encode(rows).p_active
        sums.index_add_(0, ids.cpu(), p[:, features.to(p.device)].float().cpu())
    counts = torch.bincount(token_ids.cpu(), minlength=n_vocabulary)[:, None]
    return (sums + sums.sum(0) / len(x)) / (counts + 1)


def excitation(
    logit_changes: Float[Tensor, "feature vocabulary"],
    base: Float[Tensor, " vocabulary"],
    profile: Float[Tensor, "vocabulary feature"],
) -> Float[Tensor, "feature feature"]:
    r"""How much more probable each feature makes each feature on the next token.

    Feature i turns the next token's distribution p into p_i ~ p exp(change_i), and feature j is
    active on token v with probability a_j(v):

        E_ij = sum_v (p_i(v) - p(v)) a_j(v).

    Parameters
    ----------
    logit_changes : Tensor, shape (feature, vocabulary)
        code / final_scale * `logit_effects`, at a code that is typical of the active feature.
    base : Tensor, shape (vocabulary,)
        p, probabilities: how frequent tokens are.
    profile : Tensor, shape (vocabulary, feature)
        a, from `token_profile`, of the same features.

    Returns
    -------
    Tensor, shape (feature, feature)
        Change of the probability that the column's feature is active on the next token, for the
        row's; in [-1, 1].

    Notes
    -----
    It follows the direct path to the logits and takes a token's features from the token alone:
    a hypothesis to be compared with `observed_excitation`. Source: Bricken et al. (2023),
    "Towards monosemanticity", section "Finite state automata".
    """
    log_base = base.to(logit_changes).clamp(min=torch.finfo(logit_changes.dtype).tiny).log()
    shifted = torch.softmax(log_base + logit_changes, dim=-1)
    return (shifted - torch.softmax(log_base, dim=-1)) @ profile.to(shifted)


def observed_excitation(
    p_active: Float[Tensor, "context position feature"],
) -> Float[Tensor, "feature feature"]:
    """P(j active next | i active) - P(j active next), from activity in running text.

    It counts what goes together for any reason; it is no proof that i brings j about.

    Parameters
    ----------
    p_active : Tensor, shape (context, position, feature)
        Of the features in question, on whole contexts.

    Returns
    -------
    Tensor, shape (feature, feature)
        Rows of features that are never active are not a number.
    """
    now, following = p_active[:, :-1].flatten(0, 1), p_active[:, 1:].flatten(0, 1)
    given = (now.T @ following) / now.sum(0)[:, None]
    return given - following.mean(0)


def excitation_graph(
    matrix: Float[Tensor, "feature feature"],
    features: Int[Tensor, " feature"],
    *,
    threshold: float = 0.05,
) -> nx.DiGraph:
    """Return a graph with an edge i -> j, of weight E_ij, wherever E_ij exceeds `threshold`.

    Parameters
    ----------
    matrix : Tensor, shape (feature, feature)
        From `excitation` or `observed_excitation`.
    features : Tensor of ints, shape (feature,)
        The nodes' names: indices in the dictionary.
    threshold : float, default 0.05
        Least change of a probability.

    Returns
    -------
    networkx.DiGraph
        Every feature is a node, with edges or without; `weight` is a change of probability.
    """
    graph = nx.DiGraph()
    names = features.tolist()
    graph.add_nodes_from(names)
    for i, j in (matrix > threshold).nonzero().tolist():
        graph.add_edge(names[i], names[j], weight=float(matrix[i, j]))
    return graph


def loops(
    graph: nx.DiGraph, max_length: int = 3, *, progress: bool | None = None
) -> list[tuple[list[int], float]]:
    """Return the closed paths of a graph: features that bring themselves back.

    Parameters
    ----------
    graph : networkx.DiGraph
        From `excitation_graph`.
    max_length : int, default 3
        Nodes of a path, at most.
    progress : bool, optional
        Count the paths as they are found; by default on terminals, after two seconds.

    Returns
    -------
    list of (features, weakest edge)
        Single-node loops first, then longer ones; among equals the strongest first.

    Examples
    --------
    >>> matrix = torch.tensor([[0.4, 0.2], [0.1, 0.0]])
    >>> [path for path, weakest in loops(excitation_graph(matrix, torch.tensor([7, 9])))]
    [[7], [7, 9]]
    """
    found = [
        (_from_least(cycle), _weakest(graph, cycle))
        for cycle in shown(
            nx.simple_cycles(graph, length_bound=max_length), "loops", "loop", progress
        )
    ]
    return sorted(found, key=lambda loop: (len(loop[0]), -loop[1]))


def _from_least(cycle: list[int]) -> list[int]:
    start = cycle.index(min(cycle))
    return cycle[start:] + cycle[:start]


def _weakest(graph: nx.DiGraph, cycle: list[int]) -> float:
    edges = zip(cycle, [*cycle[1:], cycle[0]], strict=True)
    return min(graph.edges[edge]["weight"] for edge in edges)
