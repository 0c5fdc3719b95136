"""One table over any dictionaries: recovery, reconstruction, sparsity, calibration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from probsae.activations.source import ActivationData, check_activations, take
from probsae.inference.elbo import elbo_terms
from probsae.metrics import calibration, recovery
from probsae.models.base import CodePosterior, SparseDictionary
from probsae.synthetic import SyntheticActivations

# Codes held at once: 2 ** 25 floats are 128 MB.
_MAX_CODES = 2**25
# Cosine from which a true feature counts as found, and is scored for calibration.
FOUND_COSINE = 0.9
# What a terminal of 80 characters has room for.
_HEADLINE = ("method", "fvu", "l0", "alive", "mmcs", "f1", "best_f1", "band_ece")


@runtime_checkable
class Dictionary(Protocol):
    """What `evaluate` needs: a fitted model or a baseline."""

    def encode(self, x: Tensor) -> CodePosterior: ...

    def decode(self, z: Tensor) -> Tensor: ...

    def dictionary(self) -> Tensor: ...


@dataclass(frozen=True)
class Row:
    """One method's figures; None where the method or the data cannot have it."""

    method: str
    d_sae: int
    fvu: float
    """Fraction of variance unexplained by the posterior mean; lower is better."""
    fvu_hard: float
    """The same from hard codes: the mean where p_active > .5, else 0."""
    l0: float
    """Expected active features a token, mean sum of p_active."""
    alive: int
    """Features with p_active > .5 on at least one held-out token."""
    elbo: float | None = None
    """Held-out lower bound of log p(x), nats per token; probabilistic models only."""
    noise_scale: float | None = None
    """Learned noise, units of the activations."""
    interval_width: float | None = None
    """Mean width of active codes' 90% intervals, units of the activations."""
    mmcs: float | None = None
    mmcs_chance: float | None = None
    """MMCS of a random unit dictionary of the same size."""
    mmcs_precision: float | None = None
    mcc: float | None = None
    share_found: float | None = None
    """Share of true features with a learned one at cosine above .9."""
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    """Of the support p_active > .5, over all true features, unmatched ones counting as missed."""
    best_f1: float | None = None
    """At the best threshold on the codes' size (deterministic) or on p_active."""
    brier_ratio: float | None = None
    """Brier score over the base rate's, over found features."""
    band_ece: float | None = None
    """Calibration error of p_active between .02 and .98, over found features."""
    coverage: float | None = None
    """Share of active true codes inside their 90% interval, over found features."""


@dataclass(frozen=True)
class Report:
    """The comparison, and what it was made on."""

    rows: tuple[Row, ...]
    n_tokens: int
    """Held-out tokens."""
    facts: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, method: str) -> Row:
        for row in self.rows:
            if row.method == method:
                return row
        raise KeyError(f"no method {method!r}; there are {[row.method for row in self.rows]}")

    def to_json(self) -> str:
        """Return the report as JSON text; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote."""
        value = json.loads(text)
        return cls(tuple(Row(**row) for row in value["rows"]), value["n_tokens"], value["facts"])

    def to_markdown(self) -> str:
        """Return the table as Markdown, without empty columns."""
        names, cells = self._cells()
        lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])

    def rich_table(self) -> Table:
        """Return the columns that matter most, to fit a terminal."""
        names, cells = self._cells(_HEADLINE)
        table = Table(title=f"{len(self.rows)} dictionaries on {self.n_tokens:,} held-out tokens")
        for name in names:
            table.add_column(
                name.replace("_", " "),
                justify="left" if name == "method" else "right",
                min_width=max(len(row.method) for row in self.rows) if name == "method" else None,
            )
        for row in cells:
            table.add_row(*row)
        return table

    def _cells(self, names: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
        names = [f.name for f in fields(Row)] if names is None else names
        used = [n for n in names if any(getattr(row, n) is not None for row in self.rows)]
        return used, [[_format(getattr(row, n)) for n in used] for row in self.rows]


def evaluate(
    dictionaries: Sequence[Dictionary] | Mapping[str, Dictionary],
    data: ActivationData,
    truth: SyntheticActivations | tuple[Tensor, Tensor] | None = None,
    *,
    n_tokens: int = 32_768,
    seed: int = 1,
) -> Report:
    """Compare dictionaries on the same held-out tokens.

    Parameters
    ----------
    dictionaries : sequence, or mapping from name
        Fitted models and baselines.
    data : tensor, array, ActivationStore, synthetic source or iterable of batches
        Held-out activations. From a synthetic source fresh tokens are drawn with their codes.
    truth : SyntheticActivations, or (features, codes), optional
        Known features (feature, d_in) and the codes (token, feature) of `data`'s tokens; a
        source stands for fresh tokens of its own. Taken from `data` where that is synthetic.
    n_tokens : int, default 32,768
        Tokens to evaluate on; all of the data where there are fewer. A feature that fires on
        one token in 3,000 is then alive with probability .99998.
    seed : int, default 1
        Of the choice, or draw, of tokens.

    Returns
    -------
    Report
        A row for each dictionary; recovery and calibration where the truth is known.

    Raises
    ------
    ValueError
        If there is no dictionary, names repeat, widths differ or the codes do not fit the data.
    """
    named = _named(dictionaries)
    source = truth if isinstance(truth, SyntheticActivations) else data
    features: Tensor | None = None
    z: Tensor | None = None
    if isinstance(source, SyntheticActivations) and not isinstance(truth, tuple):
        x, z = source.to("cpu").sample(n_tokens, seed=seed)
        features = source.features.cpu()
    elif isinstance(truth, tuple):
        features, z = truth
        x = check_activations(data)[:n_tokens]
        z = z[: len(x)]
        if z.shape != (len(x), len(features)):
            raise ValueError(
                f"truth must be (features, codes) with codes of shape {(len(x), len(features))}, "
                f"got {tuple(z.shape)}"
            )
    else:
        x = take(data, n_tokens, seed=seed)
    rows = tuple(_row(name, item, x, features, z) for name, item in named.items())
    return Report(rows, len(x), {"seed": seed})


def posterior_batches(
    dictionary: Dictionary, x: Float[Tensor, "token d_in"]
) -> Iterator[tuple[slice, Tensor, CodePosterior]]:
    """Encode `x` in pieces that fit in memory; yields where, the piece, and its posterior."""
    width = len(dictionary.dictionary())
    size = max(1, _MAX_CODES // width // 4)
    for start in range(0, len(x), size):
        where = slice(start, min(start + size, len(x)))
        yield where, x[where], dictionary.encode(x[where])


def _row(
    name: str, dictionary: Dictionary, x: Tensor, features: Tensor | None, z: Tensor | None
) -> Row:
    learned = dictionary.dictionary().cpu()
    scores = _Scores(len(learned), learned, features)
    for where, piece, posterior in posterior_batches(dictionary, x):
        scores.add(dictionary, piece, posterior, None if z is None else z[where])
    is_probabilistic, noise = False, None
    if isinstance(dictionary, SparseDictionary) and not dictionary.is_deterministic:
        is_probabilistic, noise = True, float(dictionary.noise_scale.detach())
    return Row(
        method=name,
        d_sae=len(learned),
        noise_scale=noise,
        **scores.unsupervised(x, is_probabilistic),
        **(scores.supervised(is_probabilistic) if features is not None else {}),
    )


class _Scores:
    """Sums over pieces of the held-out tokens."""

    def __init__(self, d_sae: int, learned: Tensor, features: Tensor | None):
        self.learned, self.features = learned, features
        self.squared_error = self.squared_error_hard = self.p_sum = self.elbo = 0.0
        self.width_sum, self.n_active = 0.0, 0
        self.ever = torch.zeros(d_sae, dtype=torch.bool)
        self.p: list[Tensor] = []
        self.size: list[Tensor] = []
        self.true: list[Tensor] = []
        self.covered, self.n_positive, self.n_missing = 0, 0, 0
        if features is not None:
            self.match = recovery.match_features(learned, features)
            self.found = self.match.cosine > FOUND_COSINE

    def add(
        self, dictionary: Dictionary, x: Tensor, posterior: CodePosterior, z: Tensor | None
    ) -> None:
        mean, p_active = posterior.mean.detach(), posterior.p_active.detach()
        is_active = p_active > 0.5
        hard = mean * is_active
        for name, codes in (("squared_error", mean), ("squared_error_hard", hard)):
            x_hat = dictionary.decode(codes).detach().cpu()
            error = (x - x_hat).square().double().sum()
            setattr(self, name, getattr(self, name) + float(error))
        self.p_sum += float(p_active.double().sum())
        self.ever |= is_active.any(dim=0).cpu()
        lower, upper = posterior.interval(0.9)
        self.width_sum += float((upper - lower)[is_active].double().sum())
        self.n_active += int(is_active.sum())
        if isinstance(dictionary, SparseDictionary) and dictionary.has_linear_decoder:
            with torch.no_grad():
                terms = elbo_terms(dictionary, x.to(dictionary.b_dec), posterior)
            self.elbo += float(terms.elbo.double().sum())
        elif isinstance(dictionary, SparseDictionary):
            self.elbo += _sampled_elbo(dictionary, x.to(dictionary.b_dec), posterior)
        if z is not None:
            self._add_truth(mean, p_active, lower, upper, z)

    def _add_truth(
        self, mean: Tensor, p_active: Tensor, lower: Tensor, upper: Tensor, z: Tensor
    ) -> None:
        columns, true = self.match.learned, z[:, self.match.true]
        self.p.append(p_active[:, columns].cpu())
        self.size.append(mean[:, columns].abs().cpu())
        is_true = true != 0
        self.true.append(is_true)
        where = is_true & self.found
        inside = (true >= lower[:, columns].cpu()) & (true <= upper[:, columns].cpu())
        self.covered += int((inside & where).sum())
        self.n_positive += int(where.sum())
        # True features that no learned one is left for (fewer learned than true).
        self.n_missing += int((z != 0).sum()) - int(is_true.sum())

    def unsupervised(self, x: Tensor, is_probabilistic: bool) -> dict[str, Any]:
        total = float((x - x.mean(0)).square().double().sum())
        width = self.width_sum / self.n_active if self.n_active else None
        return {
            "fvu": self.squared_error / total,
            "fvu_hard": self.squared_error_hard / total,
            "l0": self.p_sum / len(x),
            "alive": int(self.ever.sum()),
            "elbo": self.elbo / len(x) if is_probabilistic else None,
            "interval_width": width if is_probabilistic else None,
        }

    def supervised(self, is_probabilistic: bool) -> dict[str, Any]:
        assert self.features is not None
        p, size, true = torch.cat(self.p), torch.cat(self.size), torch.cat(self.true)
        # A match at chance level is none: its column predicts nothing.
        p_found, size_found = p * self.found, size * self.found
        hits = int(((p_found > 0.5) & true).sum())
        n_true = int(true.sum()) + self.n_missing
        n_predicted = int((p > 0.5).sum())
        chance = recovery.chance_level(len(self.learned), len(self.features), self.learned.shape[1])
        score = p_found if is_probabilistic else size_found
        best, _ = recovery.best_threshold_f1(score, true)
        row: dict[str, Any] = {
            "mmcs": recovery.mmcs(self.learned, self.features),
            "mmcs_chance": chance["mmcs"],
            "mmcs_precision": recovery.mmcs_precision(self.learned, self.features),
            "mcc": float(self.match.cosine.mean()),
            "share_found": recovery.share_recovered(self.learned, self.features, FOUND_COSINE),
            "precision": hits / n_predicted if n_predicted else 0.0,
            "recall": hits / n_true if n_true else 0.0,
            "f1": 2 * hits / max(1, n_predicted + n_true),
            "best_f1": best,
        }
        return row | self._calibration(p, true, is_probabilistic)

    def _calibration(self, p: Tensor, true: Tensor, is_probabilistic: bool) -> dict[str, Any]:
        p, true = p[:, self.found], true[:, self.found]
        if not true.any():
            return {}
        row: dict[str, Any] = {"brier_ratio": calibration.brier_skill(p, true)}
        if is_probabilistic:
            ece = calibration.band_ece(p, true)
            row["band_ece"] = None if math.isnan(ece) else ece
            row["coverage"] = self.covered / self.n_positive if self.n_positive else None
        return row


def _sampled_elbo(model: SparseDictionary, x: Tensor, posterior: CodePosterior) -> float:
    """ELBO of a non-linear decoder, summed over tokens, from 8 draws of the codes."""
    from torch.distributions import Normal, kl_divergence

    from probsae.models.base import as_event

    with torch.no_grad():
        kl = kl_divergence(as_event(posterior.distribution), model.prior())
        x_hat = model.decode(posterior.sample(8))
        log_likelihood = Normal(x_hat, model.noise_scale).log_prob(x).sum(-1).mean(0)
        return float((log_likelihood - kl).double().sum())


def _named(dictionaries: Sequence[Dictionary] | Mapping[str, Dictionary]) -> dict[str, Dictionary]:
    if isinstance(dictionaries, Mapping):
        named = dict(dictionaries)
    else:
        named = {}
        for item in dictionaries:
            name, n = type(item).__name__, 2
            while name in named:
                name, n = f"{type(item).__name__} {n}", n + 1
            named[name] = item
    if not named:
        raise ValueError("evaluate needs at least one dictionary, got none")
    return named


def _format(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
