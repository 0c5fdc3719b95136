"""Splice a coin into the tiny model, and wait to be killed in the fourth batch: ... FOLDER."""

import sys
import time
from pathlib import Path

from tests.lm.test_splice import IDS, Coin
from tests.lm.tiny import tiny_language_model


class Slow(Coin):
    """Says when it waits, in its fourth batch."""

    def __init__(self, said: Path):
        super().__init__()
        self.n_calls, self.said = 0, said

    def encode(self, x):
        self.n_calls += 1
        if self.n_calls == 4:
            self.said.touch()
            time.sleep(600)
        return super().encode(x)


if __name__ == "__main__":
    from probsae.lm import splice

    folder = Path(sys.argv[1])
    slow = Slow(folder.with_suffix(".waits"))
    splice(tiny_language_model(), "layers.0", slow, IDS, batch_size=1, n_draws=2, checkpoint=folder)
