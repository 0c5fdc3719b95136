"""What reaches the end of the residual stream of what is added to it: measured, not read off."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probsae.activations.hooks import HookPoint, capture, edited
from probsae.activations.language_model import LanguageModel

# Size of what is added, far above any activation's: SmolLM2's largest is some 1e4. float16 ends
# at 65,504.
_SIZE = 1e8
# Share of the addition that later layers may make of it: they add 1e-4 of it or so in float32.
_TOLERANCE = 0.1
# How near to 1 is 1: bfloat16 rounds to .4%.
_ONE = 0.01
_N_POSITIONS = 8


@torch.no_grad()
def direct_gain(
    model: LanguageModel, start: HookPoint, end: HookPoint, shape: tuple[int, int]
) -> float | None:
    """Return what a unit added at `start` adds at `end`, past all layers between; None if nothing.

    Layers that read the stream through norms make something bounded of whatever they read. So
    the stream's end shows of a huge addition what comes there directly: the addition times a
    factor, 1 in most families, a config's multiplier in some (Granite's .22 of each part, the
    square root of the width behind an embedding). Where it passes a norm itself nothing is left,
    and where it is gated each token has a factor of its own: None.

    Parameters
    ----------
    model : LanguageModel
        The model, with norms.
    start, end : HookPoint
        Where a vector of the stream's width is added, and where the stream ends.
    shape : (int, int)
        Sizes of the vocabulary and of the stream.
    """
    n_vocabulary, d_model = shape
    ids = torch.arange(_N_POSITIONS)[None] % n_vocabulary
    unit = torch.randn(d_model, generator=torch.Generator().manual_seed(0))
    unit = unit / unit.norm()
    added = []

    def add(x: Tensor) -> Tensor:
        added.append(min(_SIZE, torch.finfo(x.dtype).max / 8))
        return x + (added[0] * unit).to(x)

    before = _read(model, end, ids)
    with edited(start, add):
        after = _read(model, end, ids)
    # Without the first position, where activations may be massive.
    change = ((after - before).reshape(_N_POSITIONS, d_model)[1:].double() / added[0]).cpu()
    gain = (change @ unit.double()).median()
    strays = (change - gain * unit).norm(dim=1)
    if gain == 0 or not bool((strays <= _TOLERANCE * gain.abs()).all()):
        return None
    return 1.0 if abs(gain - 1) < _ONE else float(gain)


def _read(
    model: LanguageModel, end: HookPoint, ids: Int[Tensor, "context position"]
) -> Float[Tensor, "..."]:
    return capture([end], lambda: model.run(ids))[0].float()
