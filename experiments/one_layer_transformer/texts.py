"""The texts: files of a kind or several, the end of each held out."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from experiments.language_models import PIECE, pieces
from probsae.models.files import atomic_write


def python_code(out: Path, n_bytes: int) -> Path:
    """Write modules of Python's standard library, in order of name, as one text.

    Raises
    ------
    ValueError
        If the library has fewer bytes.
    """
    if not out.exists():
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = bytearray()
        for module in modules:
            text += b"\n" * bool(text) + module.read_bytes()
            if len(text) >= n_bytes:
                break
        else:
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
        while left > 0 and (piece := text.read(max(1, min(PIECE, left // 4)))):
            left -= len(piece.encode())
            train.write(piece)
        while piece := text.read(PIECE):
            rest.write(piece)


class Text(NamedTuple):
    """A file, and the kind of text that it holds."""

    kind: str
    file: Path


def texts(given: Sequence[str | Path]) -> list[Text]:
    """Read `kind=file`, or a file alone, whose name is its kind; files of a kind side by side.

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    """
    found = []
    for item in map(str, given):
        kind, equals, file = item.partition("=")
        is_named = equals and "/" not in kind
        found.append(Text(kind, Path(file)) if is_named else Text(Path(item).stem, Path(item)))
    missing = [str(text.file) for text in found if not text.file.is_file()]
    if missing or not found:
        raise FileNotFoundError(f"there is no text file {', '.join(missing) or 'given'}")
    kinds = list(dict.fromkeys(text.kind for text in found))
    return sorted(found, key=lambda text: kinds.index(text.kind))


@dataclass(frozen=True)
class Contexts:
    """Whole contexts of tokens, those of a kind of text side by side.

    Attributes
    ----------
    ids : Tensor, shape (context, position)
        Mapped from disk, int32.
    sizes : dict of int
        Contexts of each kind.
    """

    ids: Int[Tensor, "context position"]
    sizes: dict[str, int]

    @property
    def labels(self) -> Int[Tensor, " context"]:
        """The place of each context's kind among the kinds."""
        return torch.arange(len(self.sizes)).repeat_interleave(
            torch.tensor(list(self.sizes.values()))
        )

    def by_kind(self) -> dict[str, Tensor]:
        """Return each kind's contexts."""
        return dict(zip(self.sizes, self.ids.split(list(self.sizes.values())), strict=True))


def contexts(
    parts: Sequence[Text], tokenize: PreTrainedTokenizerFast, length: int, out: Path
) -> Contexts:
    """Tokenise texts in a stream to a folder; a context never crosses files.

    Raises
    ------
    ValueError
        If a kind has no whole context.
    """
    if not out.exists():
        with atomic_write(out) as folder:
            sizes = dict.fromkeys((text.kind for text in parts), 0)
            with (folder / "ids.bin").open("wb") as file:
                for kind, text in parts:
                    for rows in _whole_contexts(text, tokenize, length):
                        rows.tofile(file)
                        sizes[kind] += len(rows)
            if 0 in sizes.values():
                short = ", ".join(kind for kind, size in sizes.items() if size == 0)
                raise ValueError(
                    f"each kind of text must have at least one context of {length} tokens here, "
                    f"got none of {short} ({out.name}); pass longer text, or a shorter "
                    "context_length"
                )
            (folder / "sizes.json").write_text(json.dumps(sizes))
    sizes = json.loads((out / "sizes.json").read_text())
    n = sum(sizes.values()) * length
    ids = torch.from_file(str(out / "ids.bin"), shared=False, size=n, dtype=torch.int32)
    return Contexts(ids.view(-1, length), sizes)


def _whole_contexts(
    file: Path, tokenize: PreTrainedTokenizerFast, length: int
) -> Iterator[np.ndarray]:
    left = np.zeros(0, dtype=np.int32)
    for piece in pieces(file):
        ids = tokenize(piece, add_special_tokens=False, verbose=False)["input_ids"]
        left = np.concatenate([left, np.array(ids, dtype=np.int32)])
        n = len(left) // length * length
        yield left[:n].reshape(-1, length)
        left = left[n:]
