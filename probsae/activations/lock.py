"""One process at a time writes into a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary, finalize

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class FolderLock:
    """A folder's lock, for as long as this object is referred to; a killed process holds none.

    Writers of one process share it: one that failed may still be referred to by its traceback.
    Where there are no such locks (Windows, some network file systems) it locks nothing.

    Parameters
    ----------
    folder : Path
        That exists.

    Raises
    ------
    FileExistsError
        If another process holds it.
    """

    _held: ClassVar[WeakValueDictionary[Path, FolderLock]] = WeakValueDictionary()

    def __init__(self, folder: Path):
        if fcntl is None:
            return
        handle = os.open(folder, os.O_RDONLY)
        finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"another process is writing to {folder}; wait for it, end it, or choose another "
                "folder"
            ) from error
        except OSError:
            pass

    @classmethod
    def of(cls, folder: Path) -> FolderLock:
        """Return this process's lock of the folder, taken now or before."""
        key = folder.resolve()
        lock = cls._held.get(key)
        if lock is None:
            lock = cls._held[key] = cls(folder)
        return lock
