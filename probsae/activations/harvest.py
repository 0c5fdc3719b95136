"""From a language model and text to activation stores."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from probsae.activations.hooks import HookPoint, by_context, capture, find_hook
from probsae.activations.language_model import LanguageModel, load_language_model
from probsae.activations.resources import check_disk
from probsae.activations.shards import DTYPES, checksum
from probsae.activations.store import ActivationStore
from probsae.activations.store_writer import INDEX, StoreWriter, finished

# Characters of a text file that make a document: some 16 contexts of 128 tokens.
_DOCUMENT_CHARACTERS = 8_192
# Bytes that a store keeps for each token beside its activations: three labels and a norm.
_LABEL_BYTES = 16

# Rows of a dataset that tell it from others.
_N_FIRST_ROWS = 16

# Paths, or a `datasets` dataset.
Text: TypeAlias = Any


def harvest(
    model: str | Path | LanguageModel,
    text: Text,
    hooks: str | Sequence[str],
    out: str | Path,
    *,
    n_tokens: int = 1_000_000,
    context_length: int = 128,
    batch_size: int = 16,
    exclude_first: bool = True,
    dtype: str = "bfloat16",
    shard_tokens: int = 65_536,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> list[ActivationStore]:
    """Run a causal language model over text and store what passes its hooks.

    Parameters
    ----------
    model : str, Path or LanguageModel
        A local folder, a .gguf file, a name on the Hugging Face hub, or a loaded model.
    text : path or paths of text files, or a `datasets` dataset
        Files are read piece by piece, in proportion to their sizes, so that every part of the
        store mixes them; a dataset gives its `text` column, a row a document.
    hooks : str or sequence of str
        Where: `model.layers.7` (residual stream after block 7), `model.layers.7.mlp` (MLP
        output), `model.layers.7.mlp.down_proj:input` (MLP hidden). All are filled by one forward
        pass, which stops at the last of them.
    out : str or Path
        Folder of the store; with several hooks, a folder of stores named after them.
    n_tokens : int
        Tokens to store; fewer where the text ends before.
    context_length, batch_size : int
        Tokens of a context, contexts of a forward pass. A context never crosses documents; it
        begins with the model's `bos_token_id`, where that is not None.
    exclude_first : bool, default True
        Leave out the first position of each context. Many models park massive activations there
        (SmolLM2's residual stream after layer 11: hundreds of times the others'), which would
        dominate every scale and squared error.
    dtype : {"bfloat16", "float32", "float16"}
        Of the activations on disk.
    shard_tokens : int
        Tokens of a shard, the most that a kill can lose.
    device : str or torch.device, optional
        Where to run the model, if it is not loaded yet; a GPU where there is one, by default.
    progress : bool, optional
        Show a bar; by default on terminals.

    Returns
    -------
    list of ActivationStore
        One for each hook. The same call after a kill goes on from the last whole shard and ends
        with the same stores.

    Raises
    ------
    ValueError
        If a hook is unknown (near names are listed) or there is none, or the text has no whole
        context.
    FileNotFoundError
        If a text file or the model is missing.
    FileExistsError
        If `out` holds a finished store, or one begun with other settings.
    OSError, MemoryError
        If disk or memory do not have the room; nothing is written then.
    """
    for name, value in (("n_tokens", n_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2 tokens, got {context_length}")
    hooks = [hooks] if isinstance(hooks, str) else list(hooks)
    if not hooks:
        raise ValueError("hooks must name at least one module, such as 'model.layers.7'")
    folders = _folders(Path(out), hooks)
    # A kill may have come between two stores' last words: then the others go on.
    if all((folder / INDEX).exists() for folder in folders):
        raise finished(folders[0])
    documents = _Documents(text)
    if not isinstance(model, LanguageModel):
        model = load_language_model(model, device=device)
    points = [find_hook(model.network, hook) for hook in hooks]
    contexts = _Contexts(documents, model, context_length, batch_size)
    widths = _widths(model, points, contexts)
    check_disk(
        n_tokens * (sum(widths) * DTYPES[dtype].itemsize + _LABEL_BYTES * len(hooks)),
        Path(out),
        "the store",
    )
    settings = {
        "text": documents.fingerprint,
        "n_tokens": n_tokens,
        "context_length": context_length,
        "exclude_first": exclude_first,
        "bos_token_id": model.bos_token_id,
    }
    writers = [
        StoreWriter(
            folder, width, dtype=dtype, shard_tokens=shard_tokens, model=model.name, hook=hook,
            settings=settings, may_be_finished=True,
        )
        for folder, width, hook in zip(folders, widths, hooks, strict=True)
    ]  # fmt: skip
    is_open = [not writer.is_finished for writer in writers]
    todo = list(itertools.compress(writers, is_open))
    points = list(itertools.compress(points, is_open))
    _fill(todo, model, points, contexts, n_tokens, int(exclude_first), progress)
    for writer in todo:
        writer.finish()
    return [ActivationStore(folder) for folder in folders]


def fingerprint(text: Text) -> str:
    """Return what tells one text from another: a store keeps that of its own among its settings."""
    return _Documents(text).fingerprint


def _fill(
    writers: list[StoreWriter],
    model: LanguageModel,
    points: list[HookPoint],
    contexts: _Contexts,
    n_tokens: int,
    n_skipped: int,
    progress: bool | None,
) -> None:
    """Append to every writer what it does not have yet.

    A context always gives the same number of tokens, so the count on disk says where to go on;
    a kill between two stores leaves one a shard ahead, and it skips what it has.
    """
    n_kept = contexts.length - n_skipped
    on_disk = [writer.n_tokens for writer in writers]
    # Whole batches, so that they are the same as without the kill, and the same to the last bit.
    n_done = min(on_disk) // (n_kept * contexts.batch_size) * n_kept * contexts.batch_size
    bar = tqdm(
        total=n_tokens, initial=n_done, desc="harvest", unit="token", unit_scale=True, delay=2,
        disable=None if progress is None else not progress,
    )  # fmt: skip
    with bar:
        for ids, numbers in contexts.batches(skip=n_done // n_kept):
            if n_done >= n_tokens:
                break
            seen = _activations(model, points, ids)
            labels = {
                "tokens": ids[:, n_skipped:],
                "documents": numbers[:, None].expand(-1, n_kept),
                "positions": torch.arange(n_skipped, contexts.length).expand(len(ids), -1),
            }
            n_new = min(len(ids) * n_kept, n_tokens - n_done)
            for writer, had, x in zip(writers, on_disk, seen, strict=True):
                new = slice(min(max(had - n_done, 0), n_new), n_new)
                if new.start < new.stop:
                    writer.append(
                        x[:, n_skipped:].flatten(0, 1)[new],
                        **{name: value.flatten()[new] for name, value in labels.items()},
                    )
            n_done += n_new
            bar.update(n_new)


@torch.no_grad()
def _activations(
    model: LanguageModel, points: list[HookPoint], ids: Int[Tensor, "context position"]
) -> list[Tensor]:
    """Return what passes each hook, (context, position, width)."""
    seen = capture(points, lambda: model.run(ids))
    return [by_context(x, ids.shape) for x in seen]


def _widths(model: LanguageModel, points: list[HookPoint], contexts: _Contexts) -> list[int]:
    """Width at each hook, from one token."""
    first = next(contexts.batches(), None)
    if first is None:
        raise ValueError(
            f"the text has no whole context of {contexts.length} tokens; is it empty, or "
            "context_length too long?"
        )
    return [x.shape[-1] for x in _activations(model, points, first[0][:1, :1])]


def _folders(out: Path, hooks: list[str]) -> list[Path]:
    if len(hooks) == 1:
        return [out]
    return [out / hook.replace(":", ".") for hook in hooks]


class _Contexts:
    """Whole contexts, each from one document, in batches with their documents' numbers."""

    def __init__(
        self, documents: Iterable[str], model: LanguageModel, length: int, batch_size: int
    ):
        self.documents, self.model = documents, model
        self.length, self.batch_size = length, batch_size

    def batches(self, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids (context, position) and documents (context,), without the first `skip`."""
        rows: list[tuple[int, Tensor]] = []
        for number, document in enumerate(self.documents):
            contexts = self.model.contexts(self.model.tokenize([document])[0], self.length)
            rows.extend((number, row) for row in contexts)
            n_skipped = min(skip, len(rows))
            rows, skip = rows[n_skipped:], skip - n_skipped
            while len(rows) >= self.batch_size:
                yield _stack(rows[: self.batch_size])
                rows = rows[self.batch_size :]
        if rows:
            yield _stack(rows)


def _stack(rows: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([ids for _, ids in rows]), torch.tensor([number for number, _ in rows])


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


class _Documents:
    """Text document by document; no more than a document of each file is in memory."""

    def __init__(self, text: Text):
        self.dataset, self.files = None, []
        if hasattr(text, "column_names"):
            # Streams know neither their columns nor a fingerprint: the first rows speak for them.
            first = list(itertools.islice(text, _N_FIRST_ROWS))
            columns = text.column_names or [name for row in first[:1] for name in row]
            if "text" not in columns:
                raise ValueError(f"a dataset needs a column 'text', got {columns}")
            self.dataset = text
            self.fingerprint = _digest([row["text"] for row in first])
            return
        self.files = [Path(file) for file in ([text] if isinstance(text, str | Path) else text)]
        missing = [str(file) for file in self.files if not file.is_file()]
        if missing or not self.files:
            raise FileNotFoundError(f"there is no text file {', '.join(missing) or 'given'}")
        self.fingerprint = _digest([(file.name, checksum(file)) for file in self.files])

    def __iter__(self) -> Iterator[str]:
        if self.dataset is not None:
            yield from (row["text"] for row in self.dataset)
        else:
            yield from self._pieces()

    def _pieces(self) -> Iterator[str]:
        """Take each piece from the file of which the least has been read, as a share."""
        handles = {file.open(encoding="utf-8", errors="replace"): 0.0 for file in self.files}
        sizes = {
            handle: max(file.stat().st_size, 1)
            for handle, file in zip(handles, self.files, strict=True)
        }
        try:
            while handles:
                handle = min(handles, key=handles.__getitem__)
                piece = handle.read(_DOCUMENT_CHARACTERS)
                if piece:
                    # Bytes, as sizes are: a character of some scripts has two or three.
                    handles[handle] += len(piece.encode()) / sizes[handle]
                    yield piece
                else:
                    handle.close()
                    del handles[handle]
        finally:
            for handle in handles:
                handle.close()
