"""`probsae harvest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


def harvest(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    hook: tuple[str, ...],
    out: Path,
    text: tuple[Path, ...] = (),
    dataset: str | None = None,
    n_tokens: int = 1_000_000,
    context_length: int = 128,
    batch_size: int = 16,
    include_first: bool = False,
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16",
    device: str | None = None,
) -> None:
    """Store a language model's activations on text.

    Args:
        model: A folder, a .gguf file, or a name on the Hugging Face hub.
        hook: Modules, e.g. model.layers.7 or model.layers.7.mlp.down_proj:input.
        out: Folder of the store, or of one store a hook.
        text: Text files.
        dataset: Instead of files, a `datasets` name, `name:split`, or a folder by save_to_disk.
        n_tokens: Tokens to store.
        context_length: Tokens of a context.
        batch_size: Contexts of a forward pass.
        include_first: Keep first positions, where many models park massive activations.
        dtype: Of the activations on disk.
        device: Where to run the model; a GPU where there is one, by default.
    """
    from probsae.activations.harvest import harvest as run_harvest
    from probsae.activations.scaling import Scale, massive_activation_report

    if bool(text) == (dataset is not None):
        raise ValueError("harvest needs either --text or --dataset")
    source = list(text) if text else _dataset(str(dataset))
    stores = run_harvest(
        model,
        source,
        list(hook),
        out,
        n_tokens=n_tokens,
        context_length=context_length,
        batch_size=batch_size,
        exclude_first=not include_first,
        dtype=dtype,
        device=device,
    )
    for store in stores:
        print(store)
        remark = massive_activation_report(Scale(**store.index["scale"]))
        if remark:
            print(f"  {remark}")


def _dataset(name: str) -> object:
    import datasets

    if Path(name).is_dir():
        return datasets.load_from_disk(name)
    path, _, split = name.partition(":")
    return datasets.load_dataset(path, split=split or "train", streaming=True)
