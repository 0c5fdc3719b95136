"""Whether a run's features come back in other runs, as a file beside its dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from probsae.activations.shards import write_bytes
from probsae.metrics.stability import reappearance
from probsae.models.files import load
from probsae.report.run_files import DATA, STABILITY, read_json

# Cosine above which a feature is there.
_THRESHOLD = 0.9


def write_stability(run: str | Path, others: Sequence[str | Path]) -> Path:
    """Look for each feature of a run in other runs, and write what is found into its folder.

    A feature's stability is its largest cosine with a feature of another run, averaged over the
    others; in [-1, 1], higher is more stable.

    Parameters
    ----------
    run : str or Path
        Folder that `probsae fit` wrote.
    others : sequence of str or Path
        Such folders: fits from other seeds, of any number of features.

    Returns
    -------
    Path
        Of stability.safetensors: a tensor `stability` of shape (d_sae,), and a description.

    Raises
    ------
    FileNotFoundError
        If a folder holds no dictionary.
    ValueError
        If there are no others, widths differ, or one began from the same seed as `run`: its
        features resemble these for that reason alone.

    Notes
    -----
    See `probsae.metrics.reappearance` for the share of features found, and its chance level.
    """
    run, others = Path(run), [Path(other) for other in others]
    if not others:
        raise ValueError("stability needs at least one other run, got none")
    directions = _directions(run)
    seed = read_json(run / DATA).get("seed")
    for other in others:
        if other.resolve() == run.resolve():
            raise ValueError(f"others must be other runs, got {run} itself")
        if seed is not None and read_json(other / DATA).get("seed") == seed:
            raise ValueError(
                f"{other} began from seed {seed}, as {run} did: a shared start fakes stability; "
                "fit one with another --seed"
            )
    found = reappearance(directions, [_of_width(other, directions) for other in others], _THRESHOLD)
    description = (
        f"largest cosine with a feature of {', '.join(o.name for o in others)}"
        f"{', mean' if len(others) > 1 else ''}; above {_THRESHOLD:g} for {found.rate:.0%} of "
        f"{len(directions):,} features, by chance for {found.chance:.1%}"
    )
    tensors = {"stability": found.cosine.mean(0).float()}
    write_bytes(run / STABILITY, save(tensors, {"description": description}))
    return run / STABILITY


def read_stability(run: str | Path, d_sae: int) -> tuple[Float[Tensor, " d_sae"] | None, str]:
    """Return the stability in a run folder and what it is, None and no word where there is none."""
    path = Path(run) / STABILITY
    if not path.exists():
        return None, ""
    try:
        with safe_open(path, "pt") as file:
            stability = file.get_tensor("stability")
            description = (file.metadata() or {}).get("description", "")
    except SafetensorError as error:
        raise ValueError(f"{path} must hold a tensor 'stability': {error!r}") from error
    if stability.shape != (d_sae,):
        raise ValueError(f"{path} must hold shape ({d_sae},), got {tuple(stability.shape)}")
    return stability, description


def _directions(run: Path) -> Float[Tensor, "d_sae d_in"]:
    if not (run / "model").exists():
        raise FileNotFoundError(
            f"{run} holds no dictionary (model/); pass what `probsae fit` wrote"
        )
    return load(run / "model").dictionary()


def _of_width(run: Path, directions: Tensor) -> Tensor:
    other = _directions(run)
    if other.shape[1] != directions.shape[1]:
        raise ValueError(
            f"runs must be of one width to be compared, got d_in={directions.shape[1]} and "
            f"d_in={other.shape[1]} in {run}"
        )
    return other
