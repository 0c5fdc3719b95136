"""The model of docs/add_a_model.md, as a user would write it: its distributions validate."""

import torch
from torch import nn
from torch.distributions import Laplace, Normal

import probsae as ps
from probsae.models.base import as_event


class LinearLaplace(ps.SparseDictionary):
    """A Laplace prior and a linear encoder."""

    def __init__(self, d_in, d_sae):
        super().__init__(d_in, d_sae)
        self.W_enc = nn.Parameter(self.W_dec.detach().T.contiguous())
        self.log_code_scale = nn.Parameter(torch.zeros(d_sae))

    def prior(self):
        zeros = torch.zeros_like(self.log_code_scale)
        return as_event(Laplace(zeros, zeros + 1))

    def posterior(self, x):
        loc = self.product(x - self.b_dec, self.W_enc)
        return ps.CodePosterior(Normal(loc, self.log_code_scale.exp().expand_as(loc)))

    def hyperparameters(self):
        return {"d_in": self.d_in, "d_sae": self.d_sae}
