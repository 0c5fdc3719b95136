"""A fit that is interrupted on its way."""

from probsae.inference import Callback


class KilledAfter(Callback):
    """Interrupts a fit after so many steps, as Ctrl-C does."""

    def __init__(self, n_steps):
        self.n_steps = n_steps

    def on_step(self, state):
        if state.step == self.n_steps:
            raise KeyboardInterrupt
