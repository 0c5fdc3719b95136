"""The answer over several seeds of the study.

python -m experiments.seed_study.run --scale medium --seed 1     # and so on, into results/
python -m experiments.seed_study.seeds                          # mean ± standard deviation
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import tyro

from experiments.seed_study.run import RESULTS
from probsae.study.results import Frame, Results, read_results
from probsae.study.sections.answer import MEASURES, best_of_grid
from probsae.study.sections.section import DATA_NAMES


def seed_table(studies: Sequence[Results], is_correlated: bool) -> Frame:
    """Compare over seeds, all of one data set.

    Parameters
    ----------
    studies : sequence of Results
        One a seed.
    is_correlated : bool
        Which data set.

    Returns
    -------
    DataFrame
        "mean ± standard deviation" of every measure by method and ratio. L1 SAEs at each ratio are
        those with the best MMCS over penalties, chosen anew on every seed with the truth in hand;
        at ratio NaN stands for each measure the best of the whole grid, chosen for it alone.
    """
    rows: Frame = pd.concat([_rows(study, is_correlated) for study in studies])
    figures = rows.groupby(["method", "ratio"], dropna=False)[list(MEASURES)]
    means, spreads = figures.mean(), figures.std(ddof=1)
    cells = {
        name: [
            _cell(mean, spread, 0 if name == "alive" else 3)
            for mean, spread in zip(means[name], spreads[name], strict=True)
        ]
        for name in MEASURES
    }
    return pd.DataFrame(cells, index=means.index)


def _rows(study: Results, is_correlated: bool) -> Frame:
    answer = study.of(study.answer, is_correlated)
    whole = study.of(study.grid, is_correlated)
    bests = {measure: best_of_grid(whole, measure) for measure in MEASURES}
    best = [
        {
            **{name: float("nan") if row is None else row[name] for name, row in bests.items()},
            "method": f"L1, each figure's best of {len(whole)}",
            "ratio": float("nan"),
        }
    ]
    for _, grid in whole.groupby("ratio"):
        row = best_of_grid(grid, "mmcs")
        if row is not None:
            best.append({**row, "method": "L1, best MMCS"})
    rows: Frame = pd.concat([answer, pd.DataFrame(best)])
    return rows[["method", "ratio", *MEASURES]].astype(dict.fromkeys(MEASURES, float))


def _cell(mean: float, spread: float, digits: int) -> str:
    if pd.isna(mean):
        return "-"
    text = f"{mean:.{digits}f}"
    return text if pd.isna(spread) else f"{text} ± {spread:.{digits}f}"


def main(results: Path = RESULTS, scale: str = "medium") -> None:
    """Print both data sets' tables, of every seed that lies in `results`."""
    folders = [results / scale, *sorted(results.glob(f"{scale}-seed=*"))]
    studies = [read_results(folder) for folder in folders]
    print(f"Seeds {', '.join(str(study.seed) for study in studies)}.")
    for is_correlated, name in DATA_NAMES.items():
        table = seed_table(studies, is_correlated).reset_index()
        table["ratio"] = ["-" if pd.isna(ratio) else f"{ratio:g}" for ratio in table["ratio"]]
        print(f"\nDecay {studies[0].scale.grid_decay:g}, {name}:\n")
        print("| " + " | ".join(c.replace("_", " ") for c in table.columns) + " |")
        print("|" + " --- |" * len(table.columns))
        for row in table.itertuples(index=False):
            print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    tyro.cli(main)
