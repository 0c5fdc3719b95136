"""How large a study is: every number of it, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# The study's number of features: its decays are meant for as many.
_STUDY_FEATURES = 512
# Counts, and the least that each may be: t-SNE needs some neighbours.
_COUNTS = {
    **dict.fromkeys(("d_in", "n_features", "batch_size", "n_steps", "look_every"), 1),
    **dict.fromkeys(("n_evaluation_tokens", "n_medoid_tokens"), 1),
    "n_exploration_tokens": 4,
}
_STUDY_PENALTIES = (0.01, 0.02, 0.03, 0.06, 0.1, 0.18)


@dataclass(frozen=True)
class Scale:
    """The sizes of a study.

    Decays are named as in the study of 512 features. With fewer, each is raised to the power
    512 / n_features, so that the rarest feature is as much rarer than the commonest as there.

    Raises
    ------
    ValueError
        If a number is out of its range, or numbers do not fit each other.
    """

    name: str
    d_in: int
    n_features: int
    n_active: float
    batch_size: int
    n_steps: int
    ratios: tuple[float, ...]
    """Dictionary sizes, over the number of true features."""
    relu_rate: float
    """Learning rate of the L1 SAEs."""
    laplace_rate: float
    """Learning rate of the Laplace dictionaries."""
    look_every: int
    """Steps between two looks at the features."""
    n_evaluation_tokens: int
    classical_sizes: tuple[int, ...]
    """Tokens that the classical methods are given, ascending."""
    n_medoid_tokens: int
    """Tokens that K-medoids is given at most: its distances are quadratic in them."""
    n_exploration_tokens: int = 2_048
    penalties: tuple[float, ...] = _STUDY_PENALTIES
    """L1 coefficients, on the squared error summed over d_in."""
    decays: tuple[float, ...] = (0.95, 0.99, 1.0)
    grid_decay: float = 0.99
    """The decay that the whole grid is run at; the others have ratio 1 only."""

    def __post_init__(self) -> None:
        """Raise ValueError where a study of this scale would end in its middle."""
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"{name} must be a whole number of at least {least}, got {value!r}"
                )
        for name in ("n_active", "relu_rate", "laplace_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("ratios", "penalties", "decays", "classical_sizes"):
            self._check_list(name, getattr(self, name))
        self._check_lists_fit()

    def _check_list(self, name: str, values: tuple[float, ...]) -> None:
        """Raise unless there are values, positive, and told apart by the names of their groups."""
        printed = {f"{value:g}" for value in values}
        if not values or not all(value > 0 for value in values) or len(printed) < len(values):
            raise ValueError(f"{name} must hold different positive numbers, got {values}")

    def _check_lists_fit(self) -> None:
        few = [ratio for ratio in self.ratios if round(ratio * self.n_features) < 1]
        if few:
            raise ValueError(
                f"ratios must leave at least one dictionary entry of {self.n_features} features, "
                f"got {few[0]:g}: {few[0] * self.n_features:g}"
            )
        if 1 not in self.ratios or len(self.ratios) < 2:
            raise ValueError(
                "ratios must hold 1, where single features are looked at, and another, whose "
                f"dictionaries are compared with those, got {self.ratios}"
            )
        if self.grid_decay not in self.decays:
            raise ValueError(f"grid_decay must be one of {self.decays}, got {self.grid_decay}")
        if list(self.classical_sizes) != sorted(self.classical_sizes):
            raise ValueError(f"classical_sizes must be ascending, got {self.classical_sizes}")
        if self.classical_sizes[-1] < self.n_features:
            raise ValueError(
                f"classical_sizes must reach n_features={self.n_features} tokens, which as many "
                f"means need, got {self.classical_sizes}"
            )
        if max(self.decays) > 1:
            raise ValueError(f"decays must be at most 1, got {self.decays}")
        if self.n_active > self.n_features:
            raise ValueError(
                f"n_active must be at most n_features={self.n_features}, got {self.n_active}"
            )

    @property
    def is_the_studys(self) -> bool:
        """Whether figures may be held against the study's own."""
        return (self.d_in, self.n_features, self.n_active) == (256, _STUDY_FEATURES, 5)

    def decay_per_feature(self, decay: float) -> float:
        """Return the ratio of successive firing probabilities that stands for the study's."""
        return decay ** (_STUDY_FEATURES / self.n_features)

    def d_sae(self, ratio: float) -> int:
        """Return the number of dictionary entries at `ratio`."""
        return round(ratio * self.n_features)

    def to_dict(self) -> dict[str, Any]:
        """Return every number, as JSON holds it."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scale:
        """Read what `to_dict` returned."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**fields)


FULL = Scale(
    name="full",
    d_in=256,
    n_features=_STUDY_FEATURES,
    n_active=5,
    batch_size=4_096,
    n_steps=30_000,
    ratios=(0.25, 0.5, 1, 2, 4, 8, 16, 32),
    relu_rate=3e-3,
    laplace_rate=5e-3,
    look_every=100,
    n_evaluation_tokens=32_768,
    classical_sizes=(1_600, 6_400, 25_600, 102_400, 409_600),
    n_medoid_tokens=25_600,
)
"""The study's own figures: 96 SAEs, 30,000 steps of 4,096 tokens each."""

# Few steps need high rates: those of `probsae compare`, found on seed 100 at 800 steps.
SMALL = Scale(
    name="small",
    d_in=64,
    n_features=128,
    n_active=3,
    batch_size=512,
    n_steps=500,
    ratios=(0.25, 0.5, 1, 2, 4),
    relu_rate=0.03,
    laplace_rate=0.04,
    look_every=25,
    n_evaluation_tokens=8_192,
    classical_sizes=(400, 1_600, 6_400, 25_600),
    n_medoid_tokens=6_400,
)
"""A quarter of each width, for a laptop."""

MEDIUM = dataclasses.replace(SMALL, name="medium", ratios=FULL.ratios)
"""`SMALL` at every size of the study: 96 SAEs, and dictionaries of 32 entries a feature."""

SCALES = {scale.name: scale for scale in (SMALL, MEDIUM, FULL)}
"""The scales by name."""
