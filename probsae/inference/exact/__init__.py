"""Gold posteriors of small problems: enumeration, Gibbs sampling, NUTS."""

from probsae.inference.exact.enumeration import MAX_FEATURES, enumerate_supports
from probsae.inference.exact.gibbs import GibbsDraws, gibbs
from probsae.inference.exact.nuts import nuts

__all__ = ["MAX_FEATURES", "GibbsDraws", "enumerate_supports", "gibbs", "nuts"]
