"""One representation's figures on one concept."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.fit_overhead import commit
from experiments.concept_probing.concepts import Concept
from experiments.concept_probing.representations import Representation
from experiments.concept_probing.rows import Row
from experiments.concept_probing.settings import Settings
from probsae.metrics import probing
from probsae.metrics.probing.selectivity import percentile_interval
from probsae.metrics.probing.significance import Correction

LEVEL = 0.05
CORRECTIONS: tuple[Correction, ...] = ("bonferroni", "holm", "benjamini-hochberg")


class ConceptProbe:
    """A concept's tokens and tasks; makes the rows of all representations on it.

    Parameters
    ----------
    settings : Settings
        Number of controls.
    concept : Concept
        Labels and types.
    x : Tensor, shape (token, d_in)
        Raw activations.
    seed : int
        Of folds, controls and resamples.

    Raises
    ------
    ValueError
        If a probe of the raw activations is no better than its controls.
    """

    def __init__(self, settings: Settings, concept: Concept, x: Tensor, seed: int):
        self.name, self.x = concept.name, x
        self.labels, self.types = torch.tensor(concept.labels), torch.tensor(concept.types)
        self.held_out, self.recurring = (
            probing.concept_task(
                self.labels, self.types, n_controls=settings.n_controls, hold_out_types=hold_out,
                seed=seed,
            )
            for hold_out in (True, False)
        )  # fmt: skip
        self.raw = probing.selectivity(self.held_out, x)
        if self.raw.value <= 0:
            raise ValueError(f"the raw probe is not selective: {self.raw.value:.3f}")

    def row(self, name: str, method: Representation) -> Row:
        """Return the row of the representation called `name`."""
        z = method.codes(self.x)
        result: probing.Localisation | probing.PosteriorLocalisation
        if method.draws is None:
            result = sparse = probing.localise(z, self.raw)
            codes_interval = None
        else:
            result = probing.localise_posterior(method.draws(self.x), self.raw)
            sparse, codes_interval = result.of_draws[0], result.interval()
        everything = probing.selectivity(self.held_out, z)
        memory = probing.selectivity(self.recurring, z)
        return Row(
            dictionary=name,
            concept=self.name,
            score=result.score,
            interval=percentile_interval(result.score_draws, 0.9),
            codes_interval=codes_interval,
            chance=result.chance,
            fidelity=result.fidelity.tolist(),
            accuracy=[probe.accuracy for probe in sparse.sparse],
            selectivity=[probe.value for probe in sparse.sparse],
            selectivity_interval=[probe.interval() for probe in sparse.sparse],
            full_accuracy=everything.accuracy,
            full_selectivity=everything.value,
            full_interval=everything.interval(),
            memory_accuracy=memory.accuracy,
            memory_control=float(memory.control_accuracies.mean()),
            memory_interval=memory.interval(),
            n_tests=z.shape[1],
            n_different=n_different(z, self.labels, self.types),
            commit=commit(),
            score_draws=[round(draw, 5) for draw in result.score_draws.tolist()],
        )


def n_different(z: Tensor, labels: Tensor, types: Tensor) -> dict[str, int]:
    """Count features whose means differ at .05, by correction, on one token of each type."""
    first = {int(t): i for i, t in reversed(list(enumerate(types.tolist())))}
    rows = torch.tensor(sorted(first.values()))
    p = probing.welch_tests(z[rows], labels[rows]).p_value
    corrected = {name: probing.adjust_p_values(p, name) for name in CORRECTIONS}
    return {name: int((q <= LEVEL).sum()) for name, q in {"none": p, **corrected}.items()}
