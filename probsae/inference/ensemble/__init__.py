"""Many dictionaries fitted in one batched program."""

from probsae.inference.ensemble.fit_ensemble import fit_ensemble
from probsae.inference.ensemble.fits import DivergedMemberWarning

__all__ = ["DivergedMemberWarning", "fit_ensemble"]
