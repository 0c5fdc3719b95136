"""A look at the data: t-SNE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

from probsae.study.group import RESULT, DataSet, Files, Group, to_json

# scikit-learn's default; with fewer tokens than three times as many, a third of them.
_PERPLEXITY = 30.0


@dataclass(frozen=True)
class Exploration(Group):
    """Tokens of one data set in two dimensions."""

    data: DataSet

    @property
    def name(self) -> str:
        return f"exploration-{self.data.name}"

    def run(self, device: str | None) -> Files:
        """Embed the tokens; what colours them is the rank of their strongest feature."""
        n_tokens = self.data.scale.n_exploration_tokens
        x, z = self.data.activations().sample(n_tokens, seed=self.data.seed)
        perplexity = min(_PERPLEXITY, n_tokens / 3)
        embedding = TSNE(random_state=self.data.seed, init="pca", perplexity=perplexity)
        points = embedding.fit_transform(x.numpy())
        is_any = (z != 0).any(1)
        # Features are numbered by falling probability; -1 where none is active.
        strongest = z.argmax(1).where(is_any, -1)
        result = {
            **self.data.facts(),
            "points": [[round(float(v), 2) for v in point] for point in points],
            "strongest": strongest.tolist(),
            "n_active": float((z != 0).sum(1).double().mean()),
            "share_empty": float((~is_any).double().mean()),
            # Tokens that share their strongest feature with their nearest neighbour.
            "neighbours_agree": share_of_agreeing_neighbours(points, strongest.numpy()),
        }
        return {RESULT: to_json(result)}


def share_of_agreeing_neighbours(points: np.ndarray, strongest: np.ndarray) -> float:
    """Return the share of tokens whose nearest neighbour in the plane has their strongest feature.

    Parameters
    ----------
    points : array, shape (token, 2)
        The plane.
    strongest : array, shape (token,)
        Number of the strongest feature; tokens with -1 have none, and are not asked.

    Examples
    --------
    >>> points = np.array([[0.0, 0.0], [0.0, 1.0], [5.0, 0.0], [5.0, 1.5]])
    >>> share_of_agreeing_neighbours(points, np.array([3, 3, 3, 4]))
    0.5
    """
    nearest = NearestNeighbors(n_neighbors=1).fit(points).kneighbors(return_distance=False)[:, 0]
    is_any = strongest >= 0
    return float((strongest[nearest] == strongest)[is_any].mean())
