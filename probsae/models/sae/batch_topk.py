"""BatchTopK SAE: k features a token on average, chosen over the whole batch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from probsae.models.sae.kept import Support
from probsae.models.sae.topk import TopKSAE

# Weight of a new batch in the running threshold: a memory of about 100 steps.
_THRESHOLD_MEMORY = 0.01


class BatchTopKSAE(TopKSAE):
    r"""In training, the k x batch largest of all ReLU pre-activations of a batch.

    In evaluation a code is kept where it exceeds `threshold`, the running mean of the smallest
    code kept in training, so that a token's codes do not depend on its neighbours.

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations, number of features.
    k : int, default 32 (or d_sae, if that is less)
        Features kept a token, on average.
    auxiliary_coefficient, k_auxiliary, dead_after_tokens
        See `TopKSAE`.

    Notes
    -----
    Source: Bussmann, Leask and Nanda (2024), "BatchTopK sparse autoencoders".

    Examples
    --------
    >>> model = BatchTopKSAE(d_in=8, d_sae=16, k=3).train()
    >>> int(model.posterior(torch.randn(10, 8)).p_active.sum())
    30
    """

    threshold: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int | None = None,
        auxiliary_coefficient: float = 1 / 32,
        k_auxiliary: int | None = None,
        dead_after_tokens: int = 100_000,
    ):
        super().__init__(
            d_in,
            d_sae,
            k=k,
            auxiliary_coefficient=auxiliary_coefficient,
            k_auxiliary=k_auxiliary,
            dead_after_tokens=dead_after_tokens,
        )
        self.register_buffer("threshold", torch.full((), -1.0))

    def codes(self, pre_activation: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_sae"]:
        positive = torch.relu(pre_activation)
        if not self.training:
            # Before any training step there is no threshold yet: this batch's own serves.
            own = self._kth_largest(positive)
            threshold = torch.where(self.threshold < 0, own, self.threshold)
            return positive * (positive >= threshold)
        smallest = self._kth_largest(positive.detach())
        self._remember(smallest)
        return positive * (positive >= smallest)

    def support(self, pre_activation: Float[Tensor, "token d_sae"]) -> Support:
        positive = torch.relu(pre_activation)
        smallest = self._kth_largest(positive)
        self._remember(smallest)
        return Support.of_mask(~(positive < smallest) & ~(positive <= 0))

    def _kth_largest(self, values: Float[Tensor, "token d_sae"]) -> Float[Tensor, ""]:
        """Return the smallest of the k x token largest values, over all processes."""
        flat = values.flatten()
        if isinstance(self.k, int):
            n_kept = self.k * len(values) * self.sharing.size
            if self.sharing.size > 1:  # all of them may lie in one process
                largest = flat.topk(min(n_kept, flat.numel()), sorted=False).values
                flat = torch.cat(self.sharing.gather(largest))
            # Selection, twice as fast as sorting the largest.
            return flat.kthvalue(flat.numel() - n_kept + 1).values
        largest = flat.topk(self.k_max * len(values)).values
        return largest.gather(0, (self.k * len(values) - 1).reshape(1))[0]

    @torch.no_grad()
    def _remember(self, smallest: Tensor) -> None:
        running = torch.lerp(self.threshold, smallest, _THRESHOLD_MEMORY)
        self.threshold.copy_(torch.where(self.threshold < 0, smallest, running))
