"""Language models that experiments train themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from probsae.models.files import atomic_write

# Steps between two entries of the curve of losses, each their mean.
LOGGED_EVERY = 25
CHECKPOINT_EVERY = 100
# Characters of a text that are read at once.
PIECE = 1 << 20
_LAST_WORD_BREAK = re.compile(r"(?s).*\S(?= \S)")


def pieces(file: Path) -> Iterator[str]:
    """Yield a text piece by piece, cut in front of the space of a word.

    Byte-level BPE of the pieces is that of the whole text: it never merges over such a place.
    A piece without one is cut anywhere.
    """
    rest = ""
    with file.open(encoding="utf-8", errors="replace") as text:
        while new := text.read(PIECE):
            found = _LAST_WORD_BREAK.match(rest + new)
            end = found.end() if found else len(rest + new)
            yield (rest + new)[:end]
            rest = (rest + new)[end:]
    if rest:
        yield rest


def contexts_of(ids: Iterable[int], length: int) -> Int[Tensor, "context position"]:
    """Cut a text's token ids, a list or a stream, into whole contexts."""
    every = torch.from_numpy(np.fromiter(ids, np.int64))
    return every[: len(every) // length * length].view(-1, length)


def train_(
    network: nn.Module,
    token_ids: Int[Tensor, "context position"],
    *,
    n_steps: int,
    batch_size: int,
    learning_rate: float,
    checkpoint: Path | None = None,
) -> list[float]:
    """Train a causal language model in place with AdamW and cosine decay.

    Batches are drawn from torch's global generator. With a `checkpoint` folder a killed training
    goes on from it, to the same weights.

    Returns
    -------
    list of float
        Training loss, nats a token, a mean over each 25 steps.
    """
    rows = torch.randint(len(token_ids), (n_steps, batch_size))
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    losses: list[float] = []
    recent = torch.zeros((), device=token_ids.device)
    first = 0
    if checkpoint is not None and (checkpoint / "training.json").exists():
        first = _load(checkpoint, network, optimizer, decay, losses)
    bar = tqdm(
        range(first, n_steps), initial=first, total=n_steps, desc="language model", delay=2,
        disable=None,
    )  # fmt: skip
    for step in bar:
        recent += _step(network, token_ids[rows[step]].long(), optimizer)
        decay.step()
        if (step + 1) % LOGGED_EVERY == 0:
            losses.append(float(recent) / LOGGED_EVERY)
            recent.zero_()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
        if checkpoint is not None and (step + 1) % CHECKPOINT_EVERY == 0:
            _save(checkpoint, network, optimizer, decay, losses)
    network.requires_grad_(False).eval()
    return losses


def _step(network: nn.Module, ids: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    logits: Tensor = network(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _save(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    decay: torch.optim.lr_scheduler.LRScheduler,
    losses: list[float],
) -> None:
    moments = {
        f"{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    # The rates are a recursion of floats: one computed afresh from the step would differ in a bit.
    rates = {"rate": optimizer.param_groups[0]["lr"], "decay": decay.state_dict()}
    with atomic_write(folder) as new:
        save_file(dict(network.state_dict()), new / "network.safetensors")
        save_file(moments, new / "optimizer.safetensors")
        (new / "training.json").write_text(json.dumps({"losses": losses, **rates}))


def _load(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    decay: torch.optim.lr_scheduler.LRScheduler,
    losses: list[float],
) -> int:
    """Restore what `_save` wrote; return the number of steps done."""
    network.load_state_dict(load_file(folder / "network.safetensors"))
    state: dict[int, dict[str, Any]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    saved = json.loads((folder / "training.json").read_text())
    decay.load_state_dict(saved["decay"])
    optimizer.param_groups[0]["lr"] = saved["rate"]
    losses.extend(saved["losses"])
    return decay.last_epoch
