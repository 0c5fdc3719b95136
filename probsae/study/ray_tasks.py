"""Groups as Ray tasks; the only module that imports ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from probsae.study.execute import Outcome, try_to_execute
from probsae.study.group import Group

# Times that a group is given to another worker after its own was lost.
_MAX_RETRIES = 3


def execute_on_ray(
    groups: Sequence[Group], device: str | None, address: str | None = None
) -> Iterator[tuple[Group, Outcome]]:
    """Yield each group and its outcome as they come in.

    The files travel through Ray's object store, so that workers need no folder in common. A group
    whose worker is lost is given to another one, which starts it anew; one that raises is not.

    Parameters
    ----------
    groups : sequence of Group
        What to run, the longest first.
    device : str, optional
        As for `run_study`.
    address : str, optional
        Of a running cluster. A Ray that is running in this process is used; else one is started
        here and shut down at the end.
    """
    ray = _import_ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False)
    try:
        yield from _in_order_of_completion(ray, groups, device)
    finally:
        if is_ours:
            ray.shutdown()


def _in_order_of_completion(
    ray: Any, groups: Sequence[Group], device: str | None
) -> Iterator[tuple[Group, Outcome]]:
    n_gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    task = ray.remote(num_cpus=1, num_gpus=n_gpus, max_retries=_MAX_RETRIES)(try_to_execute)
    pending = {task.remote(group, device): group for group in groups}
    while pending:
        (done, *_), _ = ray.wait(list(pending))
        group = pending.pop(done)
        try:
            outcome = ray.get(done)
        except ray.exceptions.RayError as error:
            outcome = str(error)
        yield group, outcome


def _import_ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--ray needs ray: pip install '.[ray]'") from error
    return ray
