"""What `import probsae` brings: all public names, and nothing slow that may not be used."""

import re
import subprocess
import sys
from operator import attrgetter

import pytest

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
    "probsae.lm",
    "probsae.report",
    "probsae.activations.harvest",
}


def test_importing_leaves_slow_libraries_to_their_first_use():
    script = f"import sys, probsae; print(sorted({SLOW!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert set(ps.__all__) <= set(dir(ps))
    for name in ps.__all__:
        assert getattr(ps, name) is not None


def test_names_that_come_late_are_those_of_their_modules():
    from probsae.activations import language_model
    from probsae.activations.harvest import harvest

    assert ps.harvest is harvest
    assert ps.LanguageModel is language_model.LanguageModel
    assert ps.load_language_model is language_model.load_language_model
    assert callable(ps.lm.splice)
    assert callable(ps.report.report_run)
    assert issubclass(ps.TopKSAE, ps.models.DeterministicSAE)
    with pytest.raises(AttributeError, match="no attribute 'harvests'"):
        ps.harvests  # noqa: B018


@pytest.mark.usefixtures("unchecked_types")
def test_what_errors_advise_can_be_called(tmp_path):
    (tmp_path / "index.json").write_text("{}")
    model = ps.TopKSAE(4, 6, k=2)
    for data in ("once upon a time", str(tmp_path)):
        with pytest.raises(TypeError) as told:
            ps.fit(model, data)
        (name,) = re.findall(r"probsae\.([\w.]+)\(", str(told.value))
        assert callable(attrgetter(name)(ps))
