"""Run a study: what is missing, then the report."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from probsae.study.execute import Outcome, is_cuda, try_to_execute
from probsae.study.folder import StudyFolder
from probsae.study.group import Group
from probsae.study.plan import plan, summaries
from probsae.study.processes import execute_in_processes, processes_that_fit
from probsae.study.ray_tasks import execute_on_ray
from probsae.study.report import check_packages, write_report
from probsae.study.scale import Scale


def run_study(
    path: str | Path,
    scale: Scale,
    *,
    seed: int = 0,
    device: str | None = None,
    n_processes: int | None = None,
    ray: bool = False,
    ray_address: str | None = None,
    progress: bool | None = None,
) -> Path:
    """Run every group that has no results in `path` yet, and draw the report from all of them.

    A run that was killed goes on where it was: what a finished group left is never touched, and
    nothing of an unfinished one is there.

    Parameters
    ----------
    path : str or Path
        The study's folder.
    scale : Scale
        `FULL`, `MEDIUM`, `SMALL`, or sizes of your own.
    seed : int, default 0
        Of the data and of all fits.
    device : str, optional
        Where to fit; a GPU where there is one, by default.
    n_processes : int, optional
        Groups run at a time on this machine, each on a thread of its own: small fits gain nothing
        from two. By default as many as there are processors and memory for; 1 on a GPU.
    ray : bool, default False
        Run the groups as Ray tasks, each on one CPU, or one GPU where the cluster has any.
    ray_address : str, optional
        Of a running cluster; where None, Ray is started on this machine.
    progress : bool, optional
        Show a bar; by default on terminals.

    Returns
    -------
    Path
        Of the report, a page of HTML; its pictures lie beside it.

    Raises
    ------
    FileExistsError
        If `path` holds a study of another scale or seed.
    ModuleNotFoundError
        If Ray is asked for and not installed, or the report could not be drawn.
    GroupsFailedError
        If groups raised, once all others have run.
    """
    check_packages()
    folder = StudyFolder(Path(path), scale, seed)
    if n_processes is None:
        n_processes = 1 if is_cuda(device) else processes_that_fit()
    run_groups(
        folder, plan(scale, seed), device=device, n_processes=n_processes, ray=ray,
        ray_address=ray_address, progress=progress,
    )  # fmt: skip
    run_groups(folder, summaries(scale, seed, folder.groups), device=device, progress=progress)
    return write_report(folder.path)


def run_groups(
    folder: StudyFolder,
    groups: Sequence[Group],
    *,
    device: str | None = None,
    n_processes: int = 1,
    ray: bool = False,
    ray_address: str | None = None,
    progress: bool | None = None,
) -> None:
    """Run those of `groups` that have no results in `folder` yet; as for `run_study`."""
    missing = folder.missing(groups)
    if not missing:
        return
    if ray:
        outcomes: Iterable[tuple[Group, Outcome]] = execute_on_ray(missing, device, ray_address)
    elif n_processes > 1:
        outcomes = execute_in_processes(missing, device, n_processes)
    else:
        outcomes = _execute_here(missing, device)
    bar = tqdm(
        total=len(groups), initial=len(groups) - len(missing), unit="group",
        disable=None if progress is None else not progress,
    )  # fmt: skip
    failures = {}
    with bar:
        for group, outcome in outcomes:
            if isinstance(outcome, str):
                failures[group.name] = outcome
                bar.write(f"{group.name} failed: {_last_line(outcome)}", file=sys.stderr)
                continue
            folder.write(group, outcome)
            bar.set_postfix_str(group.name)
            bar.update()
    if failures:
        raise GroupsFailedError(failures)


class GroupsFailedError(RuntimeError):
    """Some groups of a study raised; the others are finished and kept.

    Attributes
    ----------
    failures : dict of str to str
        The traceback of each, by the group's name.
    """

    def __init__(self, failures: dict[str, str]):
        self.failures = failures
        reasons = "; ".join(f"{name}: {_last_line(text)}" for name, text in failures.items())
        first = next(iter(failures.values()))
        super().__init__(
            f"{len(failures)} groups failed ({reasons}); what the others left is kept, and another "
            f"run tries these again. The first said:\n\n{first}"
        )


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def _execute_here(groups: Sequence[Group], device: str | None) -> Iterator[tuple[Group, Outcome]]:
    for group in groups:
        yield group, try_to_execute(group, device)
