"""Variational EM from the fit on: the dictionary, rates, noise and slabs in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from probsae.activations.source import (
    ActivationData,
    batches,
    batches_after,
    check_activations,
    size_of,
)
from probsae.inference.compiling import has_compiler
from probsae.inference.dictionary_posterior import DictionaryPosterior
from probsae.inference.start import check_divides
from probsae.inference.variational_em import (
    Expectation,
    HeldOutGuard,
    Maximum,
    Probe,
    Sums,
    maximize,
)
from probsae.models.base import SparseDictionary
from probsae.models.files import describe
from probsae.processes import Processes, ProcessGroup

# Tokens of a pass over data without a size.
_N_TOKENS = 200_000
# Least share of a pass that is taken: where its halves show less error of the fit than this,
# they could not have shown more.
_LEAST_SHARE = 0.02
# Codes from which compiling, some 15 s of a CPU core, is repaid: it saves 130 ns of one a code.
_COMPILE_FROM = 1.5e8
# Above this many features a block of S is no wider: it would take 2 GiB.
_MAX_BLOCK = 16_384
_TOO_FEW = "data must hold more than one batch: the first is held out"


@torch.no_grad()
def polish(
    model: SparseDictionary,
    data: ActivationData,
    *,
    n_tokens: int | None = None,
    n_passes: int = 1,
    batch_size: int = 4_096,
    prior_weight: float = 1.0,
    forgetting_rate: float = 0.0,
    block_size: int | None = None,
    n_sweeps: int = 2,
    n_candidates: int = 16,
    seed: int = 0,
    compile: bool | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> DictionaryPosterior:
    r"""Give a fitted dictionary its optimum in closed form, and say how certain that is.

    A pass takes the codes' (refined) posterior of each token and sums S = sum E[z z^T] and
    T = sum E[z]^T (x - b). Then, with P the energy of `prior_weight` activations of each feature
    at its present direction D,

        q(W) = MatrixNormal((S + P)^-1 (T + P D), noise variance (S + P)^-1, I),
        q(rate_i) = Beta(a + sum gamma_i, b + sum (1 - gamma_i)),
        q(1 / noise variance) = Gamma(N d_in / 2, sum E|x - b - z W|^2 / 2),

    and each slab has the moments of its feature's active codes. The model is set to their means,
    its encoder's filters turn with the directions, and the rows' norms go into the codes. A
    feature that the data do not show (log odds of being there below zero) keeps direction and slab.

    Parameters
    ----------
    model : SparseDictionary
        Fitted, with a linear decoder and a prior; updated in place.
    data : tensor, array, ActivationStore, synthetic source or iterable of batches
        Activations, (token, d_in). The first batch is held out.
    n_tokens : int, optional
        Tokens of a pass, in whole batches; all that are not held out where the data have a size
        (never more: a token counts once), else at most 200,000.
    n_passes : int, default 1
        Passes, each from codes under the dictionary of the one before.
    batch_size : int, default 4096
        Tokens at a time.
    prior_weight : float, default 1
        Activations that the fit's direction and slab of each feature count as.
    forgetting_rate : float, default 0
        Share of the past that each batch makes forgotten: with one, the model is updated after
        each batch (natural-gradient SVI) and not once a pass.
    block_size : int, optional
        Features whose codes' covariance is taken into account, in blocks of consecutive ones: all
        by default, up to 16,384. With 1 only a feature's own energy is.
    n_sweeps, n_candidates : int
        Of `refine`, for spike-and-slab priors.
    seed : int, default 0
        Of the order of the data.
    compile : bool, optional
        Whether to take the codes' inference through torch.compile: a spike-and-slab's then takes
        less than half the time. By default where that repays compiling on a CPU.
    process_group : torch.distributed.ProcessGroup, optional
        Processes that share each pass, each with its rows of the batches: all call `polish` with
        the same arguments and end with the same model and posterior. Not for iterators, nor with
        a `forgetting_rate`. The first one shows the bar.
    progress : bool, optional
        Show a bar; by default on terminals, for passes longer than two seconds.

    Returns
    -------
    DictionaryPosterior
        Of directions, rates and noise, given the last pass's codes and, for the directions, what
        the fit knew besides. Its mean is the model's dictionary.

    Raises
    ------
    ValueError
        If an argument or the data are not usable, or the decoder is not linear.
    TypeError
        If the model is deterministic or in half precision, or its encoder cannot follow
        (`SparseVAE`).

    Notes
    -----
    Codes are inferred under the dictionary D at hand, so (S + P)^-1 (T + P D) stays behind the
    optimum of EM run to its end. A pass goes on to that, D + step / o, with o the share of the
    information that is observed (Dempster, Laird and Rubin, 1977), found on the held-out batch.
    How uncertain the optimum is, is told by how far two halves of the tokens differ on it, and not
    by the noise variance: the matrix normal's rows are scaled to that (Huber's sandwich). So it
    is right for a wrong noise scale too, one at its floor for example.

    The fit, which had tokens of its own, is an estimate of the dictionary too. Each feature goes
    the share f / (f + v) of the way from the fit to the optimum, where v is that one's variance
    and f the fit's, and q(W) then has share times v. f is what the two halves say alike of the
    step from the fit. The share is no less than that of the pass's tokens in the data, where
    these have a size: the fit had no others. With a forgetting rate batches are taken whole, and
    q(W) is that above.

    The ELBO of the held-out batch never falls, neither with the encoder's posterior nor with the
    refined one: a pass that would lower it is taken half as far, and so on; `held_out_elbo` says
    what came of it. Source: Titsias and Lazaro-Gredilla (2011); Hoffman et al. (2013),
    "Stochastic variational inference", for the form that forgets.

    Examples
    --------
    >>> import probsae as ps
    >>> data = ps.SyntheticActivations(d_in=16, n_features=24, n_active=2, seed=0)
    >>> model = ps.SpikeSlabDictionary(d_in=16, d_sae=32)
    >>> result = ps.fit(model, data, n_steps=50, batch_size=64)
    >>> posterior = ps.polish(model, data, n_tokens=2_000, batch_size=500)
    >>> posterior
    DictionaryPosterior(d_sae=32, d_in=16)
    >>> tuple(posterior.direction_variance.shape)
    (32,)
    """
    _check_arguments(n_passes, batch_size, n_tokens, block_size, prior_weight, forgetting_rate)
    processes = Processes(process_group)
    size = size_of(data)
    if n_passes > 1 and isinstance(data, Iterator):
        raise ValueError("an iterator can be passed over once; give polish a tensor or a store")
    if size == 1:
        raise ValueError("data must hold at least two tokens, of which one is held out, got 1")
    if size:  # no more than a tenth is held out, and no token of it used
        largest = size // 10 - size // 10 % processes.size
        batch_size = min(batch_size, max(processes.size, largest))
        n_tokens = min(n_tokens or size, size - batch_size)
    n_tokens = n_tokens or _N_TOKENS
    if processes.size > 1 and forgetting_rate:
        raise ValueError("passes that forget take one batch after another: use one process")
    settings = [describe(model), n_tokens, n_passes, prior_weight, block_size, n_sweeps, seed]
    device = model.b_dec.device
    check_divides(processes, data, batch_size, settings, device)
    least_share = max(_LEAST_SHARE, n_tokens / size if size else 0.0)
    if compile is None:
        n_codes = n_tokens * n_passes * model.d_sae
        compile = not model.b_dec.is_cuda and n_codes > _COMPILE_FROM and has_compiler()
    expectation = Expectation(model, n_sweeps, n_candidates, compile)
    sums = Sums(model, block_size or min(model.d_sae, _MAX_BLOCK), prior_weight)
    maximum = errors = None
    guard = HeldOutGuard(expectation)
    with guard.undo_on_error():
        for _ in range(n_passes):
            stream = batches(data, batch_size, seed=seed, device=device)
            held_out = _first(stream, model.d_in)
            guard.begin(held_out)
            if processes.size > 1:
                part = processes.rows(batch_size)
                stream = batches_after(data, 1, batch_size, seed=seed, device=device, part=part)
            tokens = _pass(stream, n_tokens // processes.size, progress)
            if forgetting_rate:
                maximum = _online(expectation, sums, tokens, forgetting_rate)
            else:
                probe = Probe(expectation, held_out)
                maximum = _whole(expectation, sums, tokens, probe, processes)
            errors = errors or maximum.errors  # later passes see the same tokens, better placed
            guard.check(errors.fit_error.clamp(least_share, 1))
            processes.share_(model.state_dict().values())
    assert maximum is not None
    assert errors is not None
    rows = maximum.posterior.rows._replace(mean=model.dictionary().double())
    rows = rows.spread(errors.fit_error.clamp(least_share, 1))
    return replace(
        maximum.posterior, rows=rows, held_out_elbo=guard.history, variance_dof=errors.dof
    )


def _check_arguments(
    n_passes: int,
    batch_size: int,
    n_tokens: int | None,
    block_size: int | None,
    prior_weight: float,
    forgetting_rate: float,
) -> None:
    counts = {"n_passes": n_passes, "batch_size": batch_size}
    counts |= {"n_tokens": n_tokens, "block_size": block_size}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not (0 < prior_weight < math.inf and 0 <= forgetting_rate < 1):
        raise ValueError(
            "prior_weight must be positive and forgetting_rate at least 0 and below 1, "
            f"got {prior_weight} and {forgetting_rate}"
        )


def _whole(
    expectation: Expectation,
    sums: Sums,
    tokens: Iterator[Tensor],
    probe: Probe,
    processes: Processes,
) -> Maximum:
    """Pass over the tokens, then set the model to its optimum."""
    sums.clear()
    for x in tokens:
        rows = processes.rows(len(x) * processes.size)
        sums.skip(rows.start)
        sums.add(x, expectation(x))
        sums.skip(len(x) * processes.size - rows.stop)
    sums.join(processes)
    if not sums.n_tokens:
        raise ValueError(_TOO_FEW)
    return maximize(expectation.model, sums, probe)


def _online(
    expectation: Expectation, sums: Sums, tokens: Iterator[Tensor], forgetting_rate: float
) -> Maximum:
    """Set the model to its optimum after each batch, given those before it, the less the older."""
    sums.clear()
    maximum = None
    for x in tokens:
        sums.fade(1 - forgetting_rate)
        sums.add(x, expectation(x))
        maximum = maximize(expectation.model, sums)
    if maximum is None:
        raise ValueError(_TOO_FEW)
    return maximum


def _first(stream: Iterator[Tensor], d_in: int) -> Tensor:
    first = next(stream, None)
    if first is None:
        raise ValueError("data must hold more than one batch, got an iterator at its end")
    return check_activations(first, d_in)


def _pass(stream: Iterator[Tensor], n_tokens: int, progress: bool | None) -> Iterator[Tensor]:
    """Yield whole batches of at most `n_tokens` tokens together; part of one that is larger.

    The rest of a pass, less than a batch, is left out: a last batch of another size would be
    compiled for.
    """
    is_hidden = None if progress is None else not progress
    with tqdm(
        total=n_tokens, desc="polish", unit="token", unit_scale=True, delay=2, disable=is_hidden
    ) as bar:
        for x in stream:
            x = x[:n_tokens]
            yield x
            bar.update(len(x))
            n_tokens -= len(x)
            if n_tokens < len(x):  # before the next one is asked for: making it costs something
                return
