"""What `import probsae` brings: all public names, and nothing slow that may not be used."""

import subprocess
import sys

import probsae as ps

SLOW = {
    "sklearn",
    "kmedoids",
    "torch._inductor",
    "arviz",
    "wandb",
    "transformers",
    "matplotlib",
    "ray",
}


def test_importing_leaves_slow_libraries_to_their_first_use():
    script = f"import sys, probsae; print(sorted({SLOW!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert set(ps.__all__) <= set(dir(ps))
    for name in ps.__all__:
        assert getattr(ps, name) is not None
