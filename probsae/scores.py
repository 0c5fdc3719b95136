"""One dictionary against held-out tokens and, where it is known, the truth."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from probsae.dictionary import Dictionary
from probsae.inference.elbo import elbo_terms
from probsae.metrics import calibration, recovery
from probsae.metrics.coverage import posterior_given_active
from probsae.models.base import SparseDictionary
from probsae.models.code_posterior import CodePosterior

# Cosine from which a true feature counts as found, and is scored for calibration.
FOUND_COSINE = 0.9


class Scores:
    """One dictionary's figures, from sums over pieces of the held-out tokens."""

    def __init__(self, d_sae: int, learned: Tensor, features: Tensor | None):
        self.learned, self.features = learned, features
        self.squared_error = self.squared_error_hard = self.p_sum = self.elbo = 0.0
        self.width_sum, self.n_active = 0.0, 0
        self.ever = torch.zeros(d_sae, dtype=torch.bool)
        self.p: list[Tensor] = []
        self.size: list[Tensor] = []
        self.true: list[Tensor] = []
        self.covered, self.n_positive, self.n_missing = 0, 0, 0
        self.is_point = True
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
        self.is_point &= posterior.is_point
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
        # A match at chance level is none. Its column predicts nothing, right or wrong, as if the
        # learned feature had been left over by the assignment.
        is_active = (p > 0.5) & self.found
        hits, n_predicted = int((is_active & true).sum()), int(is_active.sum())
        n_true = int(true.sum()) + self.n_missing
        score = (size if self.is_point else p) * self.found
        best, _ = recovery.best_threshold_f1(score, true, self.n_missing)
        row: dict[str, Any] = {
            "precision": hits / n_predicted if n_predicted else 0.0,
            "recall": hits / n_true if n_true else 0.0,
            "f1": 2 * hits / max(1, n_predicted + n_true),
            "best_f1": best,
        }
        chance = recovery.support_chance(true, self.n_missing)
        row |= {f"{name}_chance": value for name, value in chance._asdict().items()}
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
    with torch.no_grad():
        kl = model.kl(posterior)
        x_hat = model.decode(posterior.sample(8))
        log_likelihood = Normal(x_hat, model.noise_scale).log_prob(x).sum(-1).mean(0)
        return float((log_likelihood - kl).double().sum())
