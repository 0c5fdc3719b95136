"""Run by another library's Python: what it makes of our folders, and folders of its own.

    .peers/saelens/bin/python tests/interop/run_peer.py saelens FOLDER

FOLDER/ours/NAME is read; its codes and reconstructions of FOLDER/x.safetensors go to
FOLDER/ours/NAME.safetensors. FOLDER/theirs/NAME is written, with the same beside it.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D_SAE, K = 30, 4


def randomize(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


class SAELens:
    """SAELens."""

    def read(self, path, x):
        from sae_lens import SAE

        sae = SAE.load_from_disk(str(path))
        z = sae.encode(x)
        return z, sae.decode(z)

    def write(self, folder, d_in):
        from sae_lens import (
            GatedSAE,
            GatedSAEConfig,
            JumpReLUSAE,
            JumpReLUSAEConfig,
            StandardSAE,
            StandardSAEConfig,
            TopKSAE,
            TopKSAEConfig,
        )

        for is_centred in (True, False):
            common = {"d_in": d_in, "d_sae": D_SAE, "apply_b_dec_to_input": is_centred}
            topk = {"k": K, "rescale_acts_by_decoder_norm": True}
            for name, sae in {
                "standard": StandardSAE(StandardSAEConfig(**common)),
                "gated": GatedSAE(GatedSAEConfig(**common)),
                "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**common)),
                "topk": TopKSAE(TopKSAEConfig(**common, **topk)),
            }.items():
                randomize(sae).save_model(folder / f"{name}-{is_centred}")


class Sparsify:
    """EleutherAI's sparsify."""

    def read(self, path, x):
        from sparsify import SparseCoder

        coder = SparseCoder.load_from_disk(path, device="cpu")
        acts, indices, _ = coder.encode(x)
        z = torch.zeros(len(x), coder.num_latents).scatter(1, indices, acts)
        return z, coder.decode(acts, indices)

    def write(self, folder, d_in):
        from sparsify import SparseCoder, SparseCoderConfig

        coder = randomize(SparseCoder(d_in, SparseCoderConfig(num_latents=D_SAE, k=K)))
        coder.set_decoder_norm_to_unit_norm()
        coder.save_to_disk(folder / "topk")


class DictionaryLearning:
    """dictionary_learning by Marks, Karvonen and Mueller."""

    def read(self, path, x):
        from dictionary_learning.utils import load_dictionary

        dictionary, _ = load_dictionary(str(path), "cpu")
        z = dictionary.encode(x)
        return z, dictionary.decode(z)

    def write(self, folder, d_in):
        from dictionary_learning.dictionary import (
            AutoEncoder,
            AutoEncoderNew,
            GatedAutoEncoder,
            JumpReluAutoEncoder,
        )
        from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
        from dictionary_learning.trainers.top_k import AutoEncoderTopK

        models = [
            cls(d_in, D_SAE)
            for cls in (AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder)
        ]
        models = [randomize(model) for model in models]
        models[0].normalize_decoder()  # as its reader does
        models += [AutoEncoderTopK(d_in, D_SAE, K), BatchTopKSAE(d_in, D_SAE, K)]
        models += [MatryoshkaBatchTopKSAE(d_in, D_SAE, K, [10, 20])]
        for model in models:
            name = type(model).__name__
            if hasattr(model, "k"):
                torch.nn.init.normal_(
                    model.b_enc if hasattr(model, "b_enc") else model.encoder.bias
                )
                torch.nn.init.normal_(model.b_dec)
                model.threshold.fill_(0.8)
            (folder / name).mkdir()
            torch.save(model.state_dict(), folder / name / "ae.pt")
            about = {"trainer": {"dict_class": name, "k": K}, "buffer": {}}
            (folder / name / "config.json").write_text(json.dumps(about))


PEERS = {"saelens": SAELens, "sparsify": Sparsify, "dictionary_learning": DictionaryLearning}


@torch.no_grad()
def main(library: str, folder: Path) -> None:
    peer = PEERS[library]()
    x = load_file(folder / "x.safetensors")["x"]
    (folder / "theirs").mkdir()
    with torch.enable_grad():
        peer.write(folder / "theirs", x.shape[1])
    for path in [*folder.glob("ours/*/"), *folder.glob("theirs/*/")]:
        z, x_hat = peer.read(path, x)
        tensors = {"z": z.detach().contiguous(), "x_hat": x_hat.detach().contiguous()}
        save_file(tensors, path.with_suffix(".safetensors"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
