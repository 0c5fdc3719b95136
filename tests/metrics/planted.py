"""Codes with a concept planted in them."""

import torch


def planted(n=60, d=8, carriers=1, seed=0, noise=1.0):
    """Labels that are the sign of the sum of the first `carriers` features, with a margin."""
    generator = torch.Generator().manual_seed(seed)
    codes = noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    labels = torch.arange(n) % 2 == 0
    if carriers == 1:
        codes[:, 0] = torch.where(labels, 1.0, -1.0) * (0.5 + codes[:, 0].abs())
    elif carriers:
        codes[:, :carriers] = spread(labels, carriers, generator)
    order = torch.randperm(n, generator=generator)
    return codes[order], labels[order]


def spread(labels, k, generator):
    """k features whose sum says all; noise that sums to 0 over them hides it from fewer.

    The best sum of k - 1 is the label times k - 1, under noise of deviation 10 sqrt(1 - 1/k): for
    k = 5 right in Phi(.45) = .67 of the cases.
    """
    hidden = 10 * torch.randn(len(labels), k, generator=generator, dtype=torch.float64)
    hidden -= hidden.mean(dim=1, keepdim=True)
    return hidden + torch.where(labels, 1.0, -1.0)[:, None]
