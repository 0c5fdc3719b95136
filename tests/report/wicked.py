"""A corpus, names and effects that try to be markup or script."""

from __future__ import annotations

import tempfile

import torch

from probsae import Report
from probsae.comparison import Row
from probsae.metrics.calibration import reliability
from probsae.report import Page, gather_features, token_text
from tests.report.planted import Planted, planted_activations, store_of

WICKED = (
    "</script><script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 2">',
    "<!--<script>",
    "</style><style>*{display:none}",
    "\"'`&amp;&#60;b>",
    "{{ 7 * 7 }}{% raw %}",
    "${window.pwned = 3}",
    "javascript:window.pwned=4",
    "\u2028\u2029\u202e",
    "\x00\n\t",
)


def wicked_page(n_tokens: int = 400, d_in: int = 12) -> Page:
    """Show `WICKED` wherever a run's strings are shown."""
    x = planted_activations(n_tokens, d_in)
    ids = torch.arange(n_tokens) % len(WICKED)
    with tempfile.TemporaryDirectory() as folder:
        text = token_text(store_of(f"{folder}/s", x, ids), decode=lambda i: [WICKED[j] for j in i])
    name = WICKED[0]
    p = torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
    return Page(
        title=WICKED[1],
        facts={name: WICKED[1], "plain": "fact"},
        features=gather_features(
            Planted(d_in), x, text=text, stability=torch.linspace(0, 1, d_in),
            logit_effects=[[(name, 1.5), (WICKED[1], -0.5)]] * d_in,
        ),
        report=Report((Row(name, 8, 0.25, 0.5, 2.0, 7),), 1000, {name: name}),
        reliability={name: reliability(p, torch.rand(p.shape) < p)},
        history={"step": [1, 2], "elbo": [-3.0, -2.0], "fvu": [0.9, 0.5], "l0": [9.0, 5.0]},
    )  # fmt: skip
