"""A small model, and settings of short fits."""

import torch

import probsae as ps

OPTIONS = {"n_steps": 30, "batch_size": 32, "device": "cpu", "progress": False}


def small_model(cls=ps.SpikeSlabDictionary, **options):
    torch.manual_seed(0)
    return cls(d_in=8, d_sae=12, **options)
