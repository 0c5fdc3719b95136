"""`probsae`: compare | fit | polish | evaluate | inspect | report | harvest | study."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import tyro

from probsae.cli.compare import compare
from probsae.cli.fit import fit, polish
from probsae.cli.harvest import harvest
from probsae.cli.look import evaluate, inspect, report
from probsae.cli.study import study
from probsae.inference.fit import NonFiniteElboError

# What a user can put right, by the command's arguments or by its files.
_USER_ERRORS = (ValueError, TypeError, OSError, MemoryError, ModuleNotFoundError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what a user can put right ends in one line and exit code 2.

    With PROBSAE_TRACEBACK set in the environment, it ends where it was raised.
    """
    verbs = (compare, fit, polish, evaluate, inspect, report, harvest, study)
    commands = {verb.__name__: verb for verb in verbs}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="probsae", args=arguments)
    except (*_USER_ERRORS, NonFiniteElboError) as error:
        if os.environ.get("PROBSAE_TRACEBACK"):
            raise
        print(f"probsae: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
