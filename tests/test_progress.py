"""Bars: what is yielded stays as it is, and `progress` says whether one shows."""

import pytest
import torch

import probsae as ps
from probsae import baselines
from probsae.compare import compare
from probsae.lm import (
    downstream_fvu,
    excitation_graph,
    loops,
    maximum_codes,
    read_contexts,
    read_tokens,
    score_hypothesis,
    splice,
    token_profile,
)
from probsae.lm.effects import final_scale
from probsae.metrics import probing
from probsae.progress import shown
from probsae.report.features import gather_features
from tests.lm.tiny import VOCABULARY, signed_identity, tiny_llama

IDS = torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
HOOK = "model.layers.1"
X = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
TASK = probing.concept_task(torch.arange(20) % 2 == 0, n_controls=2, n_folds=2)


def test_items_pass_and_nothing_shows_off_a_terminal(capsys):
    assert list(shown([3, 1, 2], "name", "item", None)) == [3, 1, 2]
    assert capsys.readouterr().err == ""


def spike_slab():
    return ps.SpikeSlabDictionary(d_in=16, d_sae=8)


LOOPS = {
    "evaluate": lambda p: ps.evaluate([signed_identity(16), spike_slab()], X, progress=p),
    "refine": lambda p: ps.refine(spike_slab(), X, progress=p),
    "gibbs": lambda p: ps.inference.gibbs(spike_slab(), X, n_draws=2, n_warmup=1, progress=p),
    "read_contexts": lambda p: list(read_contexts(tiny_llama(), HOOK, IDS, progress=p)),
    "read_tokens": lambda p: read_tokens(tiny_llama(), HOOK, IDS, progress=p),
    "maximum_codes": lambda p: maximum_codes(
        tiny_llama(), HOOK, signed_identity(16), IDS, progress=p
    ),
    "final_scale": lambda p: final_scale(tiny_llama(), IDS, progress=p),
    "score_hypothesis": lambda p: score_hypothesis(
        signed_identity(16), X, torch.arange(20) - 9.5, progress=p
    ),
    "token_profile": lambda p: token_profile(
        signed_identity(16), X, torch.arange(20), torch.tensor([0]), 20, progress=p
    ),
    "loops": lambda p: loops(excitation_graph(torch.ones(3, 3), torch.arange(3)), progress=p),
    "splice": lambda p: splice(tiny_llama(), HOOK, signed_identity(16), IDS, progress=p),
    "downstream_fvu": lambda p: downstream_fvu(
        tiny_llama(), HOOK, signed_identity(16), IDS, ["model.layers.2"], progress=p
    ),
    "selectivity": lambda p: probing.selectivity(TASK, X, progress=p),
    "gather_features": lambda p: gather_features(signed_identity(16), X, progress=p),
}


@pytest.fixture
def bars(monkeypatch):
    """Whether each bar that is asked for is disabled."""
    seen = []

    def bar(items, *, disable, **_):
        seen.append(disable)
        return items

    monkeypatch.setattr("probsae.progress.tqdm", bar)
    return seen


CHOICES = ((None, None), (True, False), (False, True))


@pytest.mark.parametrize("name", LOOPS)
def test_long_loops_show_a_bar_where_asked(name, bars):
    for progress, disable in CHOICES:
        bars.clear()
        LOOPS[name](progress)
        assert set(bars) == {disable}


def test_draws_of_the_codes_show_one_bar_for_all(bars):
    labels = torch.arange(20) % 2 == 0
    codes = labels[:, None] + 0.1 * X[:, :3]
    raw = probing.selectivity(TASK, codes, progress=False)
    for progress, disable in CHOICES:
        bars.clear()
        probing.localise_posterior([codes, codes], raw, budgets=(1, 2), progress=progress)
        assert bars == [disable, True, True]  # that of the draws, none of a draw's folds


@pytest.mark.parametrize(("progress", "is_shown"), [(None, False), (False, False), (True, True)])
def test_a_comparison_spins_on_standard_error_where_asked(capsys, progress, is_shown):
    name = "PCA[/x]"  # as it is: no markup
    methods = {name: lambda data, width: baselines.PCA(width, n_tokens=50)}
    compare(
        ps.SyntheticActivations(d_in=4, n_features=5, n_active=1), methods=methods, d_sae=4,
        progress=progress,
    )  # fmt: skip
    told = capsys.readouterr()
    assert told.out == ""
    assert (name in told.err) == is_shown
