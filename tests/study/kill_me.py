"""Run three groups in a folder, of which the second waits to be killed: python -m ... FOLDER."""

import sys
from pathlib import Path

from probsae.study.folder import StudyFolder
from probsae.study.run import run_groups
from tests.study.tiny import TINY, Marked

if __name__ == "__main__":
    path = Path(sys.argv[1])
    log = path / "log"
    groups = [Marked(1, log), Marked(2, log, waits_first=True), Marked(3, log)]
    run_groups(StudyFolder(path, TINY, 0), groups, progress=False)
