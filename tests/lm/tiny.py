"""A two-layer causal language model with words for tokens, small enough to know by heart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import probsae as ps
from probsae.activations.language_model import LanguageModel

VOCABULARY = 50


class _Block(nn.Module):
    """Adds to each position a function of the mean of all positions up to it."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.n_calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.n_calls += 1
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x + self.mlp(x.cumsum(1) / count), None


class TinyNetwork(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([_Block(width), _Block(width)])
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)


class WordTokenizer:
    """Words are numbers; a token's id is its number."""

    def __call__(self, texts: list[str], add_special_tokens: bool = False) -> dict:
        return {"input_ids": [[int(word) % VOCABULARY for word in text.split()] for text in texts]}


def tiny_language_model() -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TinyNetwork().eval().requires_grad_(False)
    return LanguageModel("tiny", network, WordTokenizer())


def tiny_llama(seed: int = 0, n_vocabulary: int = VOCABULARY, d_mlp: int = 24) -> LanguageModel:
    """A real, untrained Hugging Face Llama: RMSNorm with a gain that is not 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=n_vocabulary, hidden_size=16, intermediate_size=d_mlp, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _untrained(LlamaForCausalLM, config, seed)


def tiny_gpt2(seed: int = 0) -> LanguageModel:
    """A real, untrained GPT-2: LayerNorm with gain and bias."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=3, n_head=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _untrained(GPT2LMHeadModel, config, seed)


def tiny_opt(seed: int = 0) -> LanguageModel:
    """A real, untrained OPT: its MLP is given the tokens of all contexts in one row."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24,
        num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=32,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _untrained(OPTForCausalLM, config, seed)


def tiny_mamba(seed: int = 0) -> LanguageModel:
    """A real, untrained Mamba 2: a recurrent network, whose cache counts no positions."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, state_size=4, num_heads=4,
        head_dim=8, n_groups=1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return _untrained(Mamba2ForCausalLM, config, seed)


def tiny_rwkv(seed: int = 0) -> LanguageModel:
    """A real, untrained RWKV: a recurrent network with a list of states for a cache."""
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, attention_hidden_size=16,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _untrained(RwkvForCausalLM, config, seed)


def _untrained(network_class: type, config: object, seed: int) -> LanguageModel:
    """Weights large enough that attention and norms matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = network_class(config).eval().requires_grad_(False)
        for name, parameter in network.named_parameters():
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.3 + is_gain)
    return LanguageModel("tiny", network, WordTokenizer())


def signed_identity(d_in: int) -> ps.ReLUSAE:
    """An SAE that reconstructs everything: features +e_i and -e_i."""
    model = ps.ReLUSAE(d_in=d_in, d_sae=2 * d_in)
    directions = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    with torch.no_grad():
        model.W_dec.copy_(directions)
        model.W_enc.copy_(directions.T)
    return model.eval()
