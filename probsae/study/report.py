"""A study's report: one page of HTML, its pictures as PNG, and the answer as a table."""

from __future__ import annotations

import base64
import io
from importlib.metadata import version
from pathlib import Path

from probsae.models.files import atomic_write
from probsae.report.html import template_environment
from probsae.report.plots import new_figure
from probsae.study.results import Results, read_results
from probsae.study.sections import answer, classical, course, exploration, matrices, represented
from probsae.study.sections.section import Section
from probsae.study.table import answer_tables

_DPI = 100
_FAILED = (
    "Fits that stopped before their end, and are measured as they were after their last good step:"
)


def write_report(path: Path) -> Path:
    """Draw the report of the study in the folder `path`, from the results there and nothing else.

    Returns
    -------
    Path
        Of the page, which holds its pictures; answer.md and each picture lie beside it.

    Raises
    ------
    FileNotFoundError
        If results are missing.
    ModuleNotFoundError
        If matplotlib or jinja2 are not installed.
    """
    template = template_environment().get_template("study.html")
    results = read_results(path)
    sections = all_sections(results)
    tables = answer_tables(results)
    pictures = {section.id: _png(section) for section in sections}
    page = template.render(
        scale=results.scale,
        facts=_facts(results),
        sections=sections,
        pictures={name: base64.b64encode(content).decode() for name, content in pictures.items()},
        tables=tables,
        failed=_FAILED,
        failures=results.failures,
        version=version("probsae"),
    )
    with atomic_write(path / "report") as folder:
        (folder / "index.html").write_text(page)
        parts = [table.to_markdown() for table in tables]
        if results.failures:
            parts.append("\n".join([_FAILED, "", *(f"- {line}" for line in results.failures)]))
        text = "\n\n".join(parts)
        (folder / "answer.md").write_text(text + "\n")
        for name, content in pictures.items():
            (folder / f"{name}.png").write_bytes(content)
    return path / "report" / "index.html"


def check_packages() -> None:
    """Raise ModuleNotFoundError if a report could not be drawn: before the work, not after it."""
    template_environment()
    new_figure(1, 1)


def all_sections(results: Results) -> list[Section]:
    """Return the report's sections in their order."""
    return [
        *answer.sections(results),
        exploration.section(results),
        classical.section(results),
        represented.section(results),
        *matrices.sections(results),
        *course.sections(results),
    ]


def _png(section: Section) -> bytes:
    buffer = io.BytesIO()
    # Without matplotlib's version and the like: equal results give equal files.
    section.figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _facts(results: Results) -> dict[str, str]:
    scale, provenance = results.scale, results.provenance

    def distinct(name: str) -> str:
        return ", ".join(sorted({str(value) for value in provenance[name]}))

    return {
        "data": f"d_in {scale.d_in}, {scale.n_features} features, {scale.n_active:g} active",
        "fits": f"{scale.n_steps:,} steps of {scale.batch_size:,} tokens, seed {results.seed}",
        "groups": f"{len(provenance)}, {provenance['seconds'].sum() / 60:.1f} minutes in all",
        "machine": f"{distinct('machine')}, {distinct('device')}, threads {distinct('threads')}",
        "versions": f"probsae {distinct('probsae')}, torch {distinct('torch')}",
        "commit": distinct("commit"),
    }
