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
from probsae.metrics.coverage import posterior_given_active
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
    """MMCS of a random unit dictionary of the same size; so for the other chance levels."""
    mmcs_precision: float | None = None
    mmcs_precision_chance: float | None = None
    mcc: float | None = None
    mcc_chance: float | None = None
    share_found: float | None = None
    """Share of true features with a learned one at cosine above .9."""
    share_found_chance: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    """Of the support p_active > .5, over all true features, unmatched ones counting as missed.
    Codes of learned features without a true one to match are not counted: there is nothing that
    says when they should be active."""
    best_f1: float | None = None
    """At the best threshold on the codes' size (deterministic) or on p_active."""
    f1_chance: float | None = None
    """F1 of calling every feature active, the best that does not look at the token."""
    brier: float | None = None
    """Mean squared difference of p_active and the truth, over found features."""
    brier_ratio: float | None = None
    """Brier score over the base rate's, over found features."""
    band_ece: float | None = None
    """Calibration error of p_active between .02 and .98, over found features."""
    coverage: float | None = None
    """Share of active true codes inside the 90% interval of q(z | z != 0), over found features."""


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
        Known features (feature, d_in) and the codes (token, feature) of `data`'s tokens. Taken
        from `data` where that is synthetic. A source beside activations gives its features only:
        which of them made those activations it does not know, so nothing is said of supports.
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
    x, features, z = _held_out(data, truth, n_tokens, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = tuple(_row(name, item, x, features, z) for name, item in named.items())
    return Report(rows, len(x), {"seed": seed})


def _held_out(
    data: ActivationData,
    truth: SyntheticActivations | tuple[Tensor, Tensor] | None,
    n_tokens: int,
    seed: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the tokens and, as far as they are known, true features and codes."""
    if isinstance(truth, tuple):
        features, z = truth
        x = check_activations(data)[:n_tokens]
        z = z[: len(x)]
        if z.shape != (len(x), len(features)):
            raise ValueError(
                f"truth must be (features, codes) with codes of shape {(len(x), len(features))}, "
                f"got {tuple(z.shape)}"
            )
        return x, features, z
    if isinstance(data, SyntheticActivations):
        source = data if truth is None else truth
        x, z = source.to("cpu").sample(n_tokens, seed=seed)
        return x, source.features.cpu(), z
    x = take(data, n_tokens, seed=seed)
    return x, None if truth is None else truth.features.cpu(), None


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
        **({} if features is None else scores.recovery()),
        **({} if z is None else scores.support(is_probabilistic)),
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
            self._add_truth(mean, p_active, posterior, z)

    def _add_truth(
        self, mean: Tensor, p_active: Tensor, posterior: CodePosterior, z: Tensor
    ) -> None:
        columns, true = self.match.learned, z[:, self.match.true]
        self.p.append(p_active[:, columns].cpu())
        self.size.append(mean[:, columns].abs().cpu())
        is_true = true != 0
        self.true.append(is_true)
        where = is_true & self.found
        lower, upper = posterior_given_active(posterior).interval(0.9)
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

    def recovery(self) -> dict[str, Any]:
        assert self.features is not None
        learned, true = self.learned, self.features
        chance = recovery.chance_level(len(learned), len(true), learned.shape[1])
        return {
            "mmcs": recovery.mmcs(learned, true),
            "mmcs_chance": chance["mmcs"],
            "mmcs_precision": recovery.mmcs_precision(learned, true),
            "mmcs_precision_chance": chance["mmcs_precision"],
            "mcc": float(self.match.cosine.mean()),
            "mcc_chance": chance["mcc"],
            "share_found": recovery.share_recovered(learned, true, FOUND_COSINE),
            "share_found_chance": chance["share_recovered"],
        }

    def support(self, is_probabilistic: bool) -> dict[str, Any]:
        p, size, true = torch.cat(self.p), torch.cat(self.size), torch.cat(self.true)
        # A match at chance level is none: its column predicts nothing.
        p_found, size_found = p * self.found, size * self.found
        hits = int(((p_found > 0.5) & true).sum())
        n_true = int(true.sum()) + self.n_missing
        n_predicted = int((p > 0.5).sum())
        score = p_found if is_probabilistic else size_found
        best, _ = recovery.best_threshold_f1(score, true, self.n_missing)
        row: dict[str, Any] = {
            "precision": hits / n_predicted if n_predicted else 0.0,
            "recall": hits / n_true if n_true else 0.0,
            "f1": 2 * hits / max(1, n_predicted + n_true),
            "best_f1": best,
            "f1_chance": recovery.support_chance(true, self.n_missing).f1,
        }
        return row | self._calibration(p, true, is_probabilistic)

    def _calibration(self, p: Tensor, true: Tensor, is_probabilistic: bool) -> dict[str, Any]:
        p, true = p[:, self.found], true[:, self.found]
        if not true.any():
            return {}
        row: dict[str, Any] = {
            "brier": calibration.brier(p, true),
            "brier_ratio": calibration.brier_ratio(p, true),
        }
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
