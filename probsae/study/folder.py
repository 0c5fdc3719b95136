"""The folder of a study: what is finished, and what it is a study of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from probsae.activations.shards import write_bytes
from probsae.models.files import atomic_write
from probsae.study.group import RESULT, Files, Group
from probsae.study.scale import Scale


class StudyFolder:
    """Results by group, each written as a whole.

    Parameters
    ----------
    path : Path
        A new folder, or one of a study of the same scale and seed.
    scale : Scale
        Of the study.
    seed : int
        Of the study.

    Raises
    ------
    FileExistsError
        If the folder holds a study of another scale or seed.
    """

    def __init__(self, path: Path, scale: Scale, seed: int):
        self.path, self.groups = path, path / "groups"
        wish = {"scale": scale.to_dict(), "seed": seed}
        file = path / "study.json"
        if file.exists():
            found = json.loads(file.read_text())
            if found != wish:
                raise FileExistsError(
                    f"{path} holds a study of scale {found['scale']['name']!r} and seed "
                    f"{found['seed']}, and this one has {scale.name!r} and {seed}, or other "
                    "sizes; choose another folder"
                )
            return
        self.groups.mkdir(parents=True, exist_ok=True)
        write_bytes(file, json.dumps(wish, indent=1).encode())

    def is_done(self, group: Group) -> bool:
        """Whether the results of `group` are here."""
        return (self.groups / group.name / RESULT).exists()

    def missing(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups that are not done yet."""
        return [group for group in groups if not self.is_done(group)]

    def write(self, group: Group, files: Files) -> None:
        """Write what `group` returned, all of it or nothing."""
        with atomic_write(self.groups / group.name) as partial:
            for name, content in files.items():
                (partial / name).write_bytes(content)
