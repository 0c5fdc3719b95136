"""A comparison as a folder: report.md, report.json, posterior.nc and the plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from probsae.compare import Comparison
from probsae.comparison import Report, markdown_cell
from probsae.dictionary import Dictionary
from probsae.models.files import atomic_write, save
from probsae.posterior import to_arviz
from probsae.report import plots, run_files
from probsae.report.comparison import comparison_table
from probsae.report.reliability import Predictions, predictions_of, probabilistic, write_reliability
from probsae.synthetic import SyntheticActivations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Tokens of the t-SNE (the study's) and of the arviz file.
_N_TSNE, _N_POSTERIOR = 2_048, 8

_CAPTIONS = {
    "recovery": "Mean max cosine similarity of the true features, by how often they fire.",
    "reliability": "Probabilities of activity against observed frequencies, with 95% intervals.",
    "losses": "The course of the fits.",
    "tsne": "The data.",
}


RUN_FILES = (
    *("report.md", "report.json", "posterior.nc", "model"),
    *(f"{name}.png" for name in _CAPTIONS),
    *(run_files.DATA, run_files.RELIABILITY, run_files.STABILITY, run_files.POSTERIOR),
    run_files.PAGE,
)
"""Names of what a comparison writes, and of what other commands put beside it."""


def write_comparison(
    comparison: Comparison, data: SyntheticActivations, folder: str | Path
) -> Path:
    """Write everything about a comparison into `folder`, at once or not at all.

    A folder that exists is replaced only if it holds nothing but `RUN_FILES`.

    Parameters
    ----------
    comparison : Comparison
        What `probsae.compare.compare` returned.
    data : SyntheticActivations
        What it was made on; fresh tokens are drawn for the plots.
    folder : str or Path
        Where to write.

    Returns
    -------
    Path
        Of report.md.

    Raises
    ------
    FileExistsError
        If the folder holds anything else.
    """
    folder = Path(folder)
    with atomic_write(folder, RUN_FILES) as partial:
        (partial / "report.json").write_text(comparison.report.to_json())
        predictions = predictions_of(comparison.dictionaries, data)
        for name, figure in _figures(comparison, data, predictions).items():
            figure.savefig(partial / f"{name}.png", dpi=120)
        _write_browsable(comparison.dictionaries, predictions, data, partial)
        _write_posterior(comparison.dictionaries, data, partial / "posterior.nc")
        (partial / "report.md").write_text(_text(comparison, data))
    return folder / "report.md"


def _figures(
    comparison: Comparison, data: SyntheticActivations, predictions: Predictions
) -> dict[str, Figure]:
    directions = {name: d.dictionary().cpu() for name, d in comparison.dictionaries.items()}
    x, z = data.sample(_N_TSNE, seed=0)
    return {
        "recovery": plots.recovery_by_rate(
            directions, data.features.cpu(), data.firing_probability.cpu()
        ),
        "reliability": plots.reliability_diagram(predictions),
        "losses": plots.loss_curves(comparison.histories),
        "tsne": plots.tsne(x.cpu(), z.cpu()),
    }


def _write_browsable(
    dictionaries: dict[str, Dictionary],
    predictions: Predictions,
    data: SyntheticActivations,
    folder: Path,
) -> None:
    """Write what `probsae report` makes a page of: the first probabilistic model's features."""
    write_reliability(folder, predictions)
    for name, model in list(probabilistic(dictionaries).items())[:1]:
        save(model, folder / "model")
        (folder / run_files.DATA).write_text(run_files.describe_synthetic(data, name))


def _write_posterior(
    dictionaries: dict[str, Dictionary], data: SyntheticActivations, path: Path
) -> None:
    """Write the first probabilistic model's posterior of a few tokens."""
    model = next(iter(probabilistic(dictionaries).values()), None)
    if model is not None:
        x, _ = data.sample(_N_POSTERIOR, seed=3)
        to_arviz(model, x, n_draws=200).to_netcdf(path)


def _table(report: Report) -> str:
    """Lay out a method a column: there are more figures than methods."""
    table = comparison_table(report)
    methods = map(markdown_cell, table.methods)
    lines = [["figure", *methods, "is"], ["---"] * (len(table.methods) + 2)]
    for line in table.lines:
        cells = [f"**{cell.text}**" if cell.is_best else cell.text for cell in line.cells]
        lines.append([line.name, *cells, line.meaning])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(comparison: Comparison, data: SyntheticActivations) -> str:
    report = comparison.report
    facts = "\n".join(f"- {name}: {value}" for name, value in report.facts.items())
    figures = "\n\n".join(
        f"![{caption}]({name}.png)\n\n{caption}" for name, caption in _CAPTIONS.items()
    )
    return f"""# {len(report.rows)} dictionaries on synthetic activations with known features

{data.n_features} features in {data.d_in} dimensions, {data.n_active} active a token on average,
probability decaying by {data.decay} a feature, correlation {data.correlation}, noise
{data.noise_scale}; {report.n_tokens:,} held-out tokens. The best of a line is bold where there is
a better and a worse; `-`: the method has no such figure.

{_table(report)}

{facts}

{figures}

`posterior.nc` holds the codes' posterior of {_N_POSTERIOR} tokens:
`arviz.from_netcdf("posterior.nc")`. `probsae report` on this folder writes a browser of the
features in model/.
"""
