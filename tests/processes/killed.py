"""A fit of which the last process is killed, after a checkpoint, the first time that it is run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from probsae import inference
from probsae.processes import ProcessGroup, launched
from tests.processes.cases import Outcome, built, fitted

CHECKPOINT_EVERY, KILLED_AT = 10, 25


class Kill(inference.Callback):
    """Let nothing of this process end in order."""

    def on_step(self, state: inference.FitState) -> None:
        if state.step == KILLED_AT and state.processes.rank == state.processes.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(group: ProcessGroup | None, folder: Path) -> Outcome:
    checkpoint = inference.Checkpoint(folder, every=CHECKPOINT_EVERY)
    is_begun = folder.exists()
    return fitted(
        built("SpikeSlabDictionary"),
        callbacks=[checkpoint] if is_begun else [checkpoint, Kill()],
        resume=folder if is_begun else None,
        process_group=group,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with launched() as group:
        outcome = fit(group, Path(sys.argv[1]))
        if group is None or group.rank() == 0:
            torch.save(outcome, sys.argv[2])
