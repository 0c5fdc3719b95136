"""Does a probe of 312 tokens x 16,384 features reach its optimum? Ours and scikit-learn's solvers.

    python -m experiments.concept_probing.convergence --store stores/model.layers.7

Takes the word concepts of words.json through the hook of a store, their codes in a TopK dictionary
of 16,384 features (fitted briefly to the store; few of them vary over 312 tokens) and on as many
random directions (ReLU; all vary), and fits to all tokens the probe of each concept and of a
control task. At what a solver returns the gradient g of the very objective that it minimises is
computed afresh; the objective is strongly convex in the weights, so that they are at most
|g| / penalty away from its optimum. Prints and writes the table.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

import probsae as ps
from benchmarks.fit_overhead import commit, device_name
from experiments.concept_probing.concepts import last_activations, word_concepts
from experiments.smollm2.model import smollm2_path
from probsae.activations import ActivationStore
from probsae.activations.language_model import load_language_model
from probsae.activations.shards import write_bytes
from probsae.metrics import probing

RESULTS = Path(__file__).parent / "convergence.json"
_MEASURED = ("warned", "gradient", "distance_bound", "weight_norm", "seconds")

Encode = Callable[[torch.Tensor], torch.Tensor]


class Solution(NamedTuple):
    """What a solver returned, and the objective that it was given."""

    x: np.ndarray
    """Features, tokens by features."""
    weight: np.ndarray
    intercept: float
    token_weights: np.ndarray
    penalty: float

    def gradient(self, labels: np.ndarray) -> float:
        """Norm of the gradient of sum_i s_i log(1 + exp(-y_i m_i)) + penalty/2 |w|^2."""
        error = self.token_weights * (expit(self.x @ self.weight + self.intercept) - labels)
        by_weight = self.x.T @ error + self.penalty * self.weight
        return float(np.hypot(np.linalg.norm(by_weight), error.sum()))


Solver = Callable[[np.ndarray, np.ndarray], Solution]


def _balanced(labels: np.ndarray) -> np.ndarray:
    return np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())


def _standardised(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the features as `fit_probe` sees them, and their units."""
    varying = codes[:, np.ptp(codes, axis=0) > 0]
    scale = varying.std(axis=0) * np.sqrt(varying.shape[1])
    return (varying - varying.mean(axis=0)) / scale, scale


def fit_probe(codes: np.ndarray, labels: np.ndarray) -> Solution:
    """Return the library's own probe, in the features' standardised units."""
    probe = probing.fit_probe(torch.from_numpy(codes), torch.from_numpy(labels))
    varies = np.ptp(codes, axis=0) > 0
    u, scale = _standardised(codes)
    weight = probe.weight.numpy()[varies]
    intercept = probe.intercept + float(weight @ codes[:, varies].mean(axis=0))
    return Solution(u, weight * scale, intercept, _balanced(labels), probing.PENALTY)


def scikit_learn(solver: str, *, standardise: bool, n_steps: int = 100) -> Solver:
    """Return one of scikit-learn's solvers, by default with as many steps as it is given there.

    Standardised it has the objective of `fit_probe`; otherwise the codes as they are, C = 1.
    """

    def solve(codes: np.ndarray, labels: np.ndarray) -> Solution:
        n = len(codes)
        x = _standardised(codes)[0] if standardise else codes
        penalty = probing.PENALTY if standardise else 1 / n
        model = LogisticRegression(
            C=1 / (penalty * n), solver=solver, max_iter=n_steps,  # pyright: ignore
            class_weight="balanced" if standardise else None,
        ).fit(x, labels)  # fmt: skip
        weights = _balanced(labels) if standardise else np.full(n, 1 / n)
        return Solution(x, model.coef_[0], float(model.intercept_[0]), weights, penalty)

    return solve


SOLVERS: dict[str, Solver] = {
    "fit_probe": fit_probe,
    "lbfgs, same objective": scikit_learn("lbfgs", standardise=True),
    "saga, same objective": scikit_learn("saga", standardise=True),
    "lbfgs, codes as they are, C = 1": scikit_learn("lbfgs", standardise=False),
    "saga, codes as they are, C = 1": scikit_learn("saga", standardise=False),
}


def measure(solve: Solver, codes: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Run a solver once: time, whether it warned, and how far from the optimum it may be."""
    start = time.thread_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = solve(codes, labels)
    seconds = time.thread_time() - start
    gradient = solution.gradient(labels)
    return {
        "seconds": seconds,
        "warned": any(issubclass(w.category, ConvergenceWarning) for w in caught),
        "gradient": gradient,
        "distance_bound": gradient / solution.penalty,
        "weight_norm": float(np.linalg.norm(solution.weight)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out the solvers: medians, and the worst of the probes."""
    lines = [
        "| codes | solver | warned | gradient: median | worst | weights off by, at most | "
        "their norm | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    pairs = dict.fromkeys((row["codes"], row["solver"]) for row in rows)
    for codes, name in pairs:
        own = [row for row in rows if (row["codes"], row["solver"]) == (codes, name)]
        of = {key: np.array([row[key] for row in own]) for key in own[0] if key in _MEASURED}
        lines.append(
            f"| {codes} | {name} | {of['warned'].sum()} of {len(own)} | "
            f"{np.median(of['gradient']):.1e} | {of['gradient'].max():.1e} | "
            f"{of['distance_bound'].max():.1e} | {np.median(of['weight_norm']):.2g} | "
            f"{np.median(of['seconds']):.2f} |"
        )
    return "\n".join(lines)


def encoders(data: ActivationStore, d_sae: int, n_steps: int, seed: int) -> dict[str, Encode]:
    """Return the maps from activations to codes."""
    torch.manual_seed(seed)
    dictionary = ps.TopKSAE(data.d_in, d_sae, k=32)
    ps.fit(dictionary, data, n_steps=n_steps, batch_size=512, seed=seed)
    directions = torch.nn.functional.normalize(torch.randn(data.d_in, d_sae), dim=0)
    return {
        "TopK": lambda x: dictionary.encode(x).mean.detach(),
        "random directions": lambda x: ((x - x.mean(0)) @ directions).relu(),
    }


def main(
    store: Path,
    model: str | None = None,
    d_sae: int = 16_384,
    n_steps: int = 40,
    n_words: int | None = None,
    seed: int = 0,
    out: Path = RESULTS,
) -> None:
    """Fit, probe, print and write."""
    torch.set_num_threads(1)
    data = ActivationStore(store)
    representations = encoders(data, d_sae, n_steps, seed)
    language_model = load_language_model(model or smollm2_path())
    rows: list[dict[str, Any]] = []
    for concept in tqdm(word_concepts(language_model, n_words), unit="concept"):
        x = last_activations(language_model, data.index["hook"], concept.contexts)
        task = probing.concept_task(
            torch.tensor(concept.labels), torch.tensor(concept.types), n_controls=2, seed=seed
        )
        for codes, encode in representations.items():
            z = encode(x).double().numpy()
            about = {"concept": concept.name, "codes": codes, "tokens": z.shape[0]}
            about |= {"features": z.shape[1], "varying": int((np.ptp(z, axis=0) > 0).sum())}
            for kind, labels in zip(("concept", "control"), task.assignments, strict=False):
                for name, solve in SOLVERS.items():
                    row = about | {"labels": kind, "solver": name}
                    rows.append(row | measure(solve, z, labels))
    result = {
        "settings": {"d_sae": d_sae, "n_steps": n_steps, "seed": seed},
        "machine": f"{device_name(torch.device('cpu'))}, 1 thread",
        "commit": commit(),
        "table": table(rows),
        "rows": rows,
    }
    write_bytes(out, (json.dumps(result, indent=1) + "\n").encode())
    print(result["table"])


if __name__ == "__main__":
    tyro.cli(main)
