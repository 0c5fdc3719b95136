"""A family with another prior than its own, as a user would write it: `prior()` overridden."""

import probsae as ps
from probsae.distributions import SpikeSlab
from probsae.models.base import as_event


class OwnPrior(ps.SpikeSlabDictionary):
    """Rarer features, wider slabs than those that the encoder tilts."""

    def prior(self):
        law = self.code_prior()
        slab = type(law.slab)(law.slab.loc, 2 * law.slab.scale, validate_args=False)
        return as_event(SpikeSlab(law.logits - 2, slab, validate_args=False))
