"""Run by a library's own Python: how long its training steps take.

    .peers/saelens/bin/python benchmarks/peer_steps.py saelens x.safetensors

Reads requests, {"architecture": "relu" or "topk", "d_sae": ..., "k": ..., "batch_size": ...,
"n_steps": ...}, one JSON object a line, and answers each with a line: the median seconds of a step
of that library's own trainer on the activations in x.safetensors, from one batch asked for to the
next. What a library does not have is answered with null.
"""

import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
import types

import torch
from safetensors.torch import load_file

N_WARM = 4
L1, RATE = 0.1, 1e-3


def now():
    """Seconds; on one CPU thread those that it ran, for other processes have their turns too."""
    is_alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.thread_time() if is_alone else time.perf_counter()


class Batches:
    """Deals out consecutive batches, without end, and notes when it is asked for one."""

    def __init__(self, x, batch_size):
        self.pieces = itertools.cycle(x.split(batch_size))
        self.times = []

    def __iter__(self):
        return self

    def __next__(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(now())
        return next(self.pieces)

    def median(self):
        """Median seconds between two batches, without the first ones."""
        steps = [b - a for a, b in itertools.pairwise(self.times)]
        return statistics.median(steps[N_WARM:])


def saelens(batches, d_in, device, architecture, d_sae, k, batch_size, n_steps):
    """Its SAETrainer."""
    from sae_lens import (
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    common = {"d_in": d_in, "d_sae": d_sae, "device": device}
    if architecture == "relu":
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=L1, **common))
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=k, **common))
    config = SAETrainerConfig(
        total_training_samples=n_steps * batch_size,
        train_batch_size_samples=batch_size,
        lr=RATE,
        lr_end=RATE,
        device=device,
    )
    SAETrainer(config, sae, batches).fit()


def dictionary_learning(batches, d_in, device, architecture, d_sae, k, batch_size, n_steps):
    """Its trainSAE."""
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    options = {"l1_penalty": L1, "sparsity_warmup_steps": None}
    trainer = {"trainer": StandardTrainer, **options}
    if architecture == "topk":
        trainer = {"trainer": TopKTrainer, "k": k}
    trainer |= {
        "steps": n_steps + 1,
        "activation_dim": d_in,
        "dict_size": d_sae,
        "lr": RATE,
        "warmup_steps": 1,
        "layer": 0,
        "lm_name": "none",
        "device": device,
    }
    trainSAE(batches, [trainer], steps=n_steps, device=device)


def sparsify(batches, d_in, device, architecture, d_sae, k, batch_size, n_steps):
    """What its Trainer does in a step, which only takes a language model's activations itself."""
    from sparsify import SparseCoder, SparseCoderConfig

    if architecture != "topk":
        return None
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device=device)
    optimizer = torch.optim.Adam(coder.parameters(), lr=RATE)
    did_fire = torch.zeros(d_sae, dtype=torch.bool, device=device)
    for x in itertools.islice(batches, n_steps):
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x=x, y=x, dead_mask=None)
        did_fire[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    return True


def overcomplete(batches, d_in, device, architecture, d_sae, k, batch_size, n_steps):
    """Its train_sae, silent; its SAE's default encoder has a batch norm, which ours have not."""
    # The package's own __init__ imports vision models, and they a torchvision that fits torch.
    if "overcomplete" not in sys.modules:
        package = types.ModuleType("overcomplete")
        package.__path__ = importlib.util.find_spec("overcomplete").submodule_search_locations
        sys.modules["overcomplete"] = package
    from overcomplete.sae import SAE, TopKSAE
    from overcomplete.sae.train import train_sae

    def criterion(x, x_hat, pre_codes, codes, dictionary):
        loss = (x - x_hat).square().sum(-1).mean()
        return loss if architecture == "topk" else loss + L1 * codes.abs().sum(-1).mean()

    encoder = Encoder(d_in, d_sae).to(device)
    options = {"encoder_module": encoder, "device": device}
    sae = SAE(d_in, d_sae, **options)
    if architecture == "topk":
        sae = TopKSAE(d_in, d_sae, top_k=k, **options)
    optimizer = torch.optim.Adam(sae.parameters(), lr=RATE)
    data = itertools.islice(batches, n_steps)
    train_sae(sae, data, criterion, optimizer, nb_epochs=1, monitoring=0, device=device)


class Encoder(torch.nn.Module):
    """A linear map and a ReLU, for overcomplete."""

    def __init__(self, d_in, d_sae):
        super().__init__()
        self.linear = torch.nn.Linear(d_in, d_sae)

    def forward(self, x):
        """Return what overcomplete asks of an encoder: codes before and after the ReLU."""
        pre_codes = self.linear(x)
        return pre_codes, torch.relu(pre_codes)


def probsae(batches, d_in, device, architecture, d_sae, k, batch_size, n_steps, compile=True):
    """`fit`, compiled, as it is wherever a fit is long enough."""
    import probsae as ps

    model = ps.ReLUSAE(d_in, d_sae, l1_coefficient=L1)
    if architecture == "topk":
        model = ps.TopKSAE(d_in, d_sae, k=k)
    ps.fit(
        model, batches, n_steps=n_steps, batch_size=batch_size, learning_rate=RATE,
        compile=compile, device=device, progress=False,
    )  # fmt: skip


def probsae_eager(*arguments):
    """Run `fit` without the compiler."""
    probsae(*arguments, compile=False)


def bare(batches, d_in, device, architecture, d_sae, k, batch_size, n_steps):
    """Run the loop one writes by hand; its TopK has no auxiliary loss."""
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, device=device), dim=1)
    W_enc = W_dec.T.contiguous()
    b_enc, b_dec = torch.zeros(d_sae, device=device), torch.zeros(d_in, device=device)
    parameters = [p.requires_grad_() for p in (W_dec, W_enc, b_enc, b_dec)]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    for x in itertools.islice(batches, n_steps):
        z = torch.relu((x - b_dec) @ W_enc + b_enc)
        if architecture == "topk":
            values, places = z.topk(k, dim=-1, sorted=False)
            z = torch.zeros_like(z).scatter(-1, places, values)
        loss = (x - z @ W_dec - b_dec).square().sum(1).mean()
        if architecture == "relu":
            loss = loss + L1 * z.sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        optimizer.step()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))


LIBRARIES = {
    function.__name__: function
    for function in (
        saelens, dictionary_learning, sparsify, overcomplete, probsae, probsae_eager, bare,
    )
}  # fmt: skip


def main(library, path, threads):
    """Answer requests until there are none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is not an answer
    torch.set_num_threads(int(threads))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = load_file(path)["x"].to(device)
    for line in sys.stdin:
        request = json.loads(line)
        batches = Batches(x, request["batch_size"])
        torch.manual_seed(0)
        run = LIBRARIES[library]
        run(batches, x.shape[1], device, *(request[key] for key in REQUEST))
        print(json.dumps(batches.median() if batches.times else None), file=answers, flush=True)


REQUEST = ("architecture", "d_sae", "k", "batch_size", "n_steps")

if __name__ == "__main__":
    main(*sys.argv[1:])
