"""Each feature's logit effects, as far as the language model behind a store is at hand."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from probsae.activations.store import ActivationStore
from probsae.progress import shown
from probsae.report.features import LogitEffects

# Instead of a model's name: show no effects.
NO_EFFECTS = "none"
# What may keep a model from being read: where nobody asked for it by name, a page goes without.
CANNOT_READ = (ValueError, FileNotFoundError, ModuleNotFoundError, MemoryError)
# Tokens raised and lowered that a page shows of a feature.
_N_TOKENS = 6
# Effects on the whole vocabulary that are held at once: 100 MB.
_MAX_EFFECTS = 2**25


def effects_of(
    store: ActivationStore,
    directions: Tensor,
    name: str | None = None,
    *,
    progress: bool | None = None,
) -> tuple[LogitEffects | None, str]:
    """Return the tokens whose logits each feature raises and lowers most; or None, and why.

    Parameters
    ----------
    store : ActivationStore
        What the dictionary was fitted to: it names the model and the hook.
    directions : Tensor, shape (feature, d_in)
        The dictionary; the language model is put where it is.
    name : str, optional
        Language model to read them from; "none" for no effects. By default the store's own, where
        it is a file or folder here and the hook lies on the residual stream.
    progress : bool, optional
        Show a bar; by default on terminals, for what takes longer than two seconds.

    Returns
    -------
    effects : LogitEffects or None
        For each feature tokens with what it adds to their logits.
    remark : str
        Why there are none.

    Raises
    ------
    ValueError
        If a model was named and the hook's directions do not reach the residual stream linearly.
    """
    if name is not None:
        return (
            (None, "not asked for")
            if name in ("", NO_EFFECTS)
            else (_read(name, store, directions, progress), "")
        )
    name = str(store.index["model"])
    if not name:
        return None, "the store names no language model; --effects MODEL does"
    if not Path(name).exists():
        return None, f"{name!r} is no file or folder here; --effects MODEL names another place"
    try:
        return _read(name, store, directions, progress), ""
    except CANNOT_READ as error:
        return None, str(error)


def _read(
    name: str, store: ActivationStore, directions: Tensor, progress: bool | None
) -> LogitEffects:
    from probsae.activations.language_model import load_language_model
    from probsae.lm.effects import logit_effects, top_tokens

    model = load_language_model(name, device=directions.device)
    found: list[list[tuple[str, float]]] = []
    n_vocabulary = model.logits(directions.new_zeros(1, 1).long()).shape[-1]
    parts = directions.split(max(1, _MAX_EFFECTS // n_vocabulary))
    for rows in shown(parts, "logit effects", "batch", progress):
        effects = logit_effects(model, rows, hook=store.index["hook"])
        for raised, lowered in zip(
            top_tokens(model, effects, _N_TOKENS),
            top_tokens(model, effects, _N_TOKENS, largest=False),
            strict=True,
        ):
            found.append([*raised, *lowered])
    return found
