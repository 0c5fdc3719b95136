"""`python -m probsae`: the `probsae` command."""

from probsae.cli import main

if __name__ == "__main__":  # worker processes of a study import this module
    main()
