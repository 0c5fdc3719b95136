"""Hugging Face causal language models: the only module that imports transformers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probsae.activations.resources import check_memory, choose_device

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Bytes of a float32 weight over those of a stored one, where the file does not say: 4-bit GGUF
# blocks take 4.5-5 bits a weight, half precision 16.
_GROWTH = {"gguf": 7.0, "safetensors": 2.0}


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes
    ----------
    name : str
        What it was loaded by; written into stores.
    network : nn.Module
        Maps token ids (sequence, position) to an object with `.logits`; in evaluation mode.
    tokenizer : object
        Hugging Face tokenizer, or any callable that takes a list of texts and
        `add_special_tokens=False` and returns `{"input_ids": [...]}`; may be None where only token
        ids are used.
    bos_token_id : int or None
        Token that begins every context, where the model was trained with one: that its tokenizer
        puts in front of a text by itself. Far from it such models (Gemma, Llama) are lost.
    """

    name: str
    network: nn.Module
    tokenizer: Any = None
    bos_token_id: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return next(self.network.parameters()).device

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens.

        Parameters
        ----------
        texts : sequence of str
            Texts.

        Returns
        -------
        list of lists of int
            One list a text.

        Raises
        ------
        ValueError
            If there is no tokenizer.
        """
        tokenizer = self._tokenizer_that("__call__")
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def _tokenizer_that(self, can: str) -> Any:
        if not hasattr(self.tokenizer, can):
            raise ValueError(f"{self.name} has no tokenizer; pass one to LanguageModel")
        return self.tokenizer

    def contexts(self, token_ids: Sequence[int], length: int) -> Int[Tensor, "context position"]:
        """Cut a text's token ids into whole contexts, each begun by the token that begins texts.

        Parameters
        ----------
        token_ids : sequence of int
            The text, without special tokens; what does not fill a context is left out.
        length : int
            Positions of a context, the first token's included where there is one.

        Returns
        -------
        Tensor of int64, shape (context, length)
            On the CPU.

        Raises
        ------
        ValueError
            If a context of this length has no room for a token of the text.
        """
        first = [] if self.bos_token_id is None else [self.bos_token_id]
        n = length - len(first)
        if n < 1:
            raise ValueError(f"a context must have at least {len(first) + 1} tokens, got {length}")
        rows = torch.tensor(token_ids, dtype=torch.long)[: len(token_ids) // n * n].view(-1, n)
        return torch.cat([torch.tensor([first]).long().expand(len(rows), -1), rows], dim=1)

    def decode(self, token_ids: Sequence[int]) -> list[str]:
        """Text of each token on its own.

        Parameters
        ----------
        token_ids : sequence of int
            Token ids; a tensor of one axis will do.

        Returns
        -------
        list of str
            One a token, with the space in front of a word.

        Raises
        ------
        ValueError
            If there is no tokenizer.
        """
        tokenizer = self._tokenizer_that("decode")
        ids = [int(i) for i in token_ids]
        texts = [tokenizer.decode([i]) for i in ids]
        # A SentencePiece tokenizer leaves out the space in front of a text's first token.
        to_piece = getattr(tokenizer, "convert_ids_to_tokens", None)
        pieces = texts if to_piece is None else [to_piece(i) for i in ids]
        return [
            f" {text}" if str(piece).startswith("\u2581") and not text.startswith(" ") else text
            for text, piece in zip(texts, pieces, strict=True)
        ]

    def check_evaluates(self) -> None:
        """Raise ValueError where the network would drop units at random, as in training."""
        if self.network.training:
            raise ValueError(
                f"the network of {self.name} must be in evaluation mode, or dropout would change "
                "each pass and draw from the caller's generators; call network.eval()"
            )

    def run(self, token_ids: Int[Tensor, "sequence position"]) -> Any:
        """Return what the network makes of token ids, without a cache.

        Parameters
        ----------
        token_ids : Tensor of ints, shape (sequence, position)
            On any device.

        Returns
        -------
        object
            The network's own: logits, or something that has `.logits`.

        Raises
        ------
        ValueError
            If the network is in training mode.
        """
        self.check_evaluates()
        return self.network(input_ids=token_ids.to(self.device), use_cache=False)

    def logits(
        self, token_ids: Int[Tensor, "sequence position"]
    ) -> Float[Tensor, "sequence position vocabulary"]:
        """Next-token logits, float32; sequences are padded on the right, which causality hides.

        Differentiable by what an edit put in at a hook; by the weights only if they ask for it.

        Parameters
        ----------
        token_ids : Tensor of ints, shape (sequence, position)
            On any device.

        Returns
        -------
        Tensor, shape (sequence, position, vocabulary)
            On the network's device.

        Raises
        ------
        ValueError
            If the network is in training mode.
        """
        output = self.run(token_ids)
        return (output if isinstance(output, Tensor) else output.logits).float()


def load_language_model(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """Load a causal language model for inference.

    Parameters
    ----------
    name : str or Path
        A folder with a Hugging Face model, a `.gguf` file (its weights are dequantised), or a
        name on the Hugging Face hub.
    device : str or torch.device, optional
        Where to put it; a GPU where there is one, by default.
    dtype : torch.dtype, default float32
        Of weights and activations.

    Returns
    -------
    LanguageModel
        In evaluation mode, its weights without gradients.

    Raises
    ------
    ModuleNotFoundError
        If transformers is not installed.
    FileNotFoundError
        If `name` is neither a file nor a folder, and the hub does not have it or is out of reach.
    MemoryError
        If the weights do not fit into memory, by an estimate made first.
    ValueError
        If there is no such device.
    """
    device = choose_device(device)
    transformers = _transformers()
    source, options = _location(Path(name))
    _check_weights_fit(Path(name), dtype)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(name)
    with _readable(name):
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, **options
        )
    network.requires_grad_(False)
    begins_texts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return LanguageModel(
        str(name),
        network.to(device).eval(),
        tokenizer,
        bos_token_id=tokenizer.bos_token_id if begins_texts else None,
    )


def load_tokenizer(name: str | Path) -> Any:
    """Load a model's tokenizer alone.

    Parameters
    ----------
    name : str or Path
        As for `load_language_model`.

    Returns
    -------
    object
        Hugging Face tokenizer.

    Raises
    ------
    ModuleNotFoundError
        If transformers is not installed.
    FileNotFoundError
        If `name` is neither a file nor a folder, and the hub does not have it or is out of reach.
    """
    transformers = _transformers()
    source, options = _location(Path(name))
    with _readable(name):
        return transformers.AutoTokenizer.from_pretrained(source, **options)


def check_at_hand(name: str | Path) -> None:
    """Raise FileNotFoundError where loading a model could only end in a vain look at the hub.

    Stores may name their model as they like. What is neither a file or folder here nor in the
    hub's cache is looked for on the hub only as `owner/name`, and only online (HF_HUB_OFFLINE).

    Raises
    ------
    ModuleNotFoundError
        If transformers is not installed.
    """
    _transformers()
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).exists():
        return
    is_hub_like = _HUB_NAME.fullmatch(str(name)) and Path(name).suffix != ".gguf"
    try:
        if isinstance(try_to_load_from_cache(str(name), "config.json"), str):
            return
    except HFValidationError:
        is_hub_like = None
    if not is_hub_like or constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(
            f"{str(name)!r} is no model folder or .gguf file here, "
            + ("and the hub is switched off" if is_hub_like else "and no name of the hub's")
        )


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "language models need transformers: pip install '.[lm]'"
        ) from error
    return transformers


@contextmanager
def _readable(name: str | Path) -> Iterator[None]:
    """Say what to do where transformers can neither read nor fetch a model."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"{str(name)!r} is not a readable model folder or .gguf file here, and could not be "
            f"fetched from the Hugging Face hub ({str(error).splitlines()[0]}); offline, pass a "
            "local folder or file"
        ) from error


def _location(path: Path) -> tuple[str, dict[str, str]]:
    """Return what `from_pretrained` takes for a file, a folder or a hub name."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; pass the path of a .gguf model")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} must hold a Hugging Face model (config.json and weights), or pass the "
            ".gguf file itself"
        )
    return str(path), {}


def _check_weights_fit(path: Path, dtype: torch.dtype) -> None:
    """Refuse a model whose weights would exceed the free memory."""
    growth = dtype.itemsize / 4
    sizes = [
        os.path.getsize(file) * _GROWTH[kind] * growth
        for kind in _GROWTH
        for file in _weight_files(path, kind)
    ]
    check_memory(sum(sizes), f"the weights of {path}")


def _weight_files(path: Path, kind: str) -> Iterator[Path]:
    if path.suffix == f".{kind}":
        yield path
    elif kind == "safetensors" and path.is_dir():
        yield from path.glob("*.safetensors")
