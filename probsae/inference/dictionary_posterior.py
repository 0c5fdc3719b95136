"""What the data leave open about the features themselves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from scipy.stats import beta as beta_law
from torch import Tensor
from torch.distributions import Beta, Gamma

from probsae.inference.dictionary_statistics import Rows
from probsae.levels import square_quantiles, tails
from probsae.models.files import atomic_write

_FILE = "posterior.safetensors"


@dataclass(frozen=True, repr=False)
class DictionaryPosterior:
    r"""q(W) q(rates) q(1 / noise variance), given a data set's codes.

    Rows of the dictionary are normal, with one covariance over features, and alike in every
    dimension: W ~ MatrixNormal(mean, C, I). C is that given the codes, scaled feature by feature to
    the variance that the data show (`polish`).

    Attributes
    ----------
    rows : Rows
        Mean of the rows, and their precision over features in units of that of the noise.
    rate : Beta, batch shape (d_sae,)
        Firing rates.
    noise_precision : Gamma
        1 / noise variance, units of the activations to the power of -2.
    log_odds_real : Tensor, shape (d_sae,), or None
        What a feature adds to the log evidence of all tokens, less what its direction and rate
        cost, nats; None for priors without an atom at zero.
    held_out_elbo : list of (float, float)
        ELBO of held-out tokens with the encoder's and with the refined posterior, nats per
        token: before the first pass, and after each.
    variance_dof : Tensor, shape (d_sae,), or None
        Degrees of freedom that the variance of each direction is known with: its relative error
        is sqrt(2 / variance_dof). None where it is taken for certain.

    Notes
    -----
    Source: Hoffman, Blei, Wang and Paisley (2013), "Stochastic variational inference"; the matrix
    normal follows from the exact ELBO, see docs/posteriors.md. It covers what is open given this
    mode, not other modes: for those compare seeds.
    """

    rows: Rows
    rate: Beta
    noise_precision: Gamma
    log_odds_real: Float[Tensor, " d_sae"] | None
    held_out_elbo: list[tuple[float, float]]
    variance_dof: Float[Tensor, " d_sae"] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(d_sae={self.mean.shape[0]}, d_in={self.mean.shape[1]})"

    @property
    def mean(self) -> Float[Tensor, "d_sae d_in"]:
        """Expected directions, unit rows: the model's."""
        return self.rows.mean

    @cached_property
    def row_variance(self) -> Float[Tensor, " d_sae"]:
        """Variance of each entry of a row, the diagonal of C."""
        return self.rows.relative_variance / self.noise_precision.mean

    @property
    def direction_variance(self) -> Float[Tensor, " d_sae"]:
        """Expected 1 - cosine between a feature's direction and its mean, in [0, 1).

        A row m + e, with e normal of variance v in each of d dimensions, has to first order the
        cosine |m| / sqrt(|m|^2 + (d - 1) v) with m.
        """
        return self._turned_by(1.0)

    def direction_interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Equal-tailed interval of each feature's 1 - cosine with its true direction.

        To first order d - 1 components across the mean turn a direction, with a variance that is
        known with `variance_dof` degrees of freedom: their mean square is that variance times
        F(d - 1, variance_dof).

        Parameters
        ----------
        level : float, default 0.9
            Probability that it holds.

        Returns
        -------
        lower, upper : Tensor, shape (d_sae,)
            From 0 to 1.

        Raises
        ------
        ValueError
            If `level` is not strictly between 0 and 1.
        """
        ends = square_quantiles(tails(level), self.mean.shape[1] - 1, self.variance_dof)
        lower, upper = (self._turned_by(torch.as_tensor(end).to(self.mean)) for end in ends)
        return lower, upper

    def _turned_by(self, square: Tensor | float) -> Float[Tensor, " d_sae"]:
        """Return 1 - cosine where components across have `square` times their expected square."""
        across = (self.mean.shape[1] - 1) * self.row_variance * square
        return 1 - (1 + across).rsqrt()

    @property
    def p_real(self) -> Float[Tensor, " d_sae"]:
        """Probability that the data have this feature, against none in its place, at even odds.

        Raises
        ------
        ValueError
            If the prior has no atom at zero, so that all features are always there.
        """
        if self.log_odds_real is None:
            raise ValueError(
                "p_real needs a spike-and-slab prior: under others no feature is absent"
            )
        return torch.sigmoid(self.log_odds_real)

    def rate_interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Equal-tailed credible interval of each firing rate.

        Parameters
        ----------
        level : float, default 0.9
            Probability that it holds.

        Returns
        -------
        lower, upper : Tensor, shape (d_sae,)
            From 0 to 1.

        Raises
        ------
        ValueError
            If `level` is not strictly between 0 and 1.
        """
        ends = tails(level)
        a, b = (c.cpu().numpy() for c in (self.rate.concentration1, self.rate.concentration0))
        device = self.rate.concentration1.device
        lower, upper = (torch.from_numpy(beta_law.ppf(u, a, b)).to(device) for u in ends)
        return lower, upper

    def sample(self, n_draws: int = 1) -> Float[Tensor, "draw d_sae d_in"]:
        """Draw dictionaries; their rows are near unit norm, not at it.

        Parameters
        ----------
        n_draws : int, default 1
            How many, with torch's global generator.

        Returns
        -------
        Tensor, shape (draw, d_sae, d_in)
            On the posterior's device.

        Raises
        ------
        ValueError
            If `n_draws` is below 1.
        """
        if n_draws < 1:
            raise ValueError(f"n_draws must be at least 1, got {n_draws}")
        noise_scale = self.noise_precision.mean.rsqrt()
        standard = torch.randn_like(self.mean.expand(n_draws, -1, -1))
        return self.mean + noise_scale * self.rows.deviation(standard)

    def save(self, path: str | Path) -> None:
        """Write to a folder, as safetensors, atomically.

        Parameters
        ----------
        path : str or Path
            Folder; replaced as a whole if it holds a dictionary posterior.

        Raises
        ------
        FileExistsError
            If it holds anything else.
        """
        rate, precision = self.rate, self.noise_precision
        tensors = {
            "mean": self.rows.mean,
            "cholesky": self.rows.cholesky,
            "rate": torch.stack([rate.concentration1, rate.concentration0]),
            "noise_precision": torch.stack([precision.concentration, precision.rate]),
            "held_out_elbo": torch.tensor(self.held_out_elbo, dtype=torch.float64),
        }
        for name in ("log_odds_real", "variance_dof"):
            value = getattr(self, name)
            if value is not None:
                tensors[name] = value
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        with atomic_write(path, (_FILE,)) as folder:
            save_file(tensors, folder / _FILE)

    @classmethod
    def load(cls, path: str | Path) -> DictionaryPosterior:
        """Read what `save` wrote.

        Parameters
        ----------
        path : str or Path
            The folder.

        Returns
        -------
        DictionaryPosterior
            On the CPU.

        Raises
        ------
        FileNotFoundError
            If there is no posterior at `path`.
        """
        file = Path(path) / _FILE
        if not file.exists():
            raise FileNotFoundError(f"no dictionary posterior at {path}: it needs {_FILE}")
        saved = load_file(file)
        return cls(
            rows=Rows(saved["mean"], saved["cholesky"]),
            rate=Beta(saved["rate"][0], saved["rate"][1]),
            noise_precision=Gamma(saved["noise_precision"][0], saved["noise_precision"][1]),
            log_odds_real=saved.get("log_odds_real"),
            held_out_elbo=[(a, b) for a, b in saved["held_out_elbo"].tolist()],
            variance_dof=saved.get("variance_dof"),
        )
