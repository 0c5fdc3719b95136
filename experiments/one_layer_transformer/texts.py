"""The texts: each a kind of its own, its end held out."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from experiments.language_models import contexts_of
from probsae.models.files import atomic_write

# Characters read at once when a text is split.
_PIECE = 1 << 20


def python_code(out: Path, n_bytes: int) -> Path:
    """Write modules of Python's standard library, in order of name, as one text.

    Raises
    ------
    ValueError
        If the library has fewer bytes.
    """
    if not out.exists():
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = "\n".join(module.read_text(encoding="utf-8") for module in modules).encode()
        if len(text) < n_bytes:
            raise ValueError(f"n_code_bytes must be at most {len(text)} here, got {n_bytes}")
        out.write_text(text[:n_bytes].decode(errors="ignore"), encoding="utf-8")
    return out


def split_text(files: Sequence[Path], out: Path, held_out: float) -> tuple[list[Path], list[Path]]:
    """Write the beginning and the end of each text as files of their own: (train, held out).

    Raises
    ------
    ValueError
        If two texts have one name.
    """
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        raise ValueError(f"text files need different names, got {', '.join(sorted(names))}")
    if not out.exists():
        with atomic_write(out) as folder:
            for file in files:
                _split(file, folder, held_out)
    return [out / "train" / name for name in names], [out / "held_out" / name for name in names]


def _split(file: Path, folder: Path, held_out: float) -> None:
    left = round(file.stat().st_size * (1 - held_out))
    for part in ("train", "held_out"):
        (folder / part).mkdir(exist_ok=True)
    with (
        file.open(encoding="utf-8", errors="replace") as text,
        (folder / "train" / file.name).open("w", encoding="utf-8") as train,
        (folder / "held_out" / file.name).open("w", encoding="utf-8") as rest,
    ):
        # A character has four bytes at most: so many never go far beyond the cut.
        while left > 0 and (piece := text.read(max(1, min(_PIECE, left // 4)))):
            left -= len(piece.encode())
            train.write(piece)
        while piece := text.read(_PIECE):
            rest.write(piece)


def contexts_by_kind(
    files: Sequence[Path], tokenize: PreTrainedTokenizerFast, length: int
) -> dict[str, Int[Tensor, "context position"]]:
    """Return each text's token ids by its name; a context never crosses texts.

    Raises
    ------
    ValueError
        If no text has a whole context.
    """
    texts = [file.read_text(encoding="utf-8") for file in files]
    ids = tokenize(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if max(map(len, ids)) < length:
        raise ValueError(
            f"the text must have at least one context of {length} tokens, got at most "
            f"{max(map(len, ids))}; pass longer text, or a shorter context_length"
        )
    return {file.stem: contexts_of(own, length) for file, own in zip(files, ids, strict=True)}


def together(by_kind: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return all contexts, and the place of each one's kind among the kinds."""
    labels = torch.arange(len(by_kind)).repeat_interleave(
        torch.tensor([len(own) for own in by_kind.values()])
    )
    return torch.cat(list(by_kind.values())), labels
