"""Logit effects: against the derivative of real networks, and by hand."""

import pytest
import torch
from torch import nn

from probsae.activations.hooks import edited, find_hook, recorded
from probsae.activations.language_model import LanguageModel
from probsae.lm import final_scale, folded_unembedding, logit_effects, top_tokens
from tests.lm.tiny import VOCABULARY, tiny_gpt2, tiny_language_model, tiny_llama

IDS = torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))

FAMILIES = {
    "llama": (tiny_llama, "model.layers.2", "model.norm", "mlp.down_proj:input"),
    "gpt2": (tiny_gpt2, "transformer.h.2", "transformer.ln_f", "mlp.c_proj:input"),
}
families = pytest.mark.parametrize("family", FAMILIES)


def centred(logits):
    return logits - logits.mean(-1, keepdim=True)


def moved(model, hook, directions, code):
    """Logits with `code` times a direction, one for each token, added at a hook."""
    with edited(find_hook(model.network, hook), lambda x: x + code * directions):
        return centred(model.logits(IDS)).double()


def final_stream(model, norm):
    with recorded([find_hook(model.network, f"{norm}:input")]) as seen:
        model.logits(IDS)
    return seen[f"{norm}:input"]


@families
def test_is_the_derivative_of_the_logits(family):
    """A direction that leaves a token's norm alone moves its logits by effect / scale a unit."""
    make, hook, norm, _ = FAMILIES[family]
    model = make()
    x = final_stream(model, norm)
    if family == "gpt2":
        x = x - x.mean(-1, keepdim=True)
    w = torch.randn_like(x)
    w = w - x * (w * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True)
    if family == "gpt2":
        w = w + 3.0  # which a LayerNorm takes off again
    step = 1e-2  # float32: the error of the difference is some 1e-7 / 1e-2
    derivative = (moved(model, hook, w, step) - moved(model, hook, w, -step)) / (2 * step)
    scale = x.square().mean(-1).sqrt()
    predicted = logit_effects(model, w.flatten(0, 1)).view(*IDS.shape, -1) / scale[..., None]
    torch.testing.assert_close(derivative.float(), predicted, rtol=2e-3, atol=2e-4)
    assert final_scale(model, IDS) == pytest.approx(float(scale.median()), rel=1e-5)


@families
def test_hidden_layer_of_an_mlp_reads_through_its_linear_map(family):
    make, hook, _, mlp = FAMILIES[family]
    model = make()
    point = find_hook(model.network, f"{hook}.{mlp}")
    with recorded([point]) as seen:
        model.logits(IDS)
    hidden = torch.randn(4, seen[point.name].shape[-1])
    zero = torch.zeros_like(hidden)
    by_hand = point.module(hidden) - point.module(zero)
    torch.testing.assert_close(
        logit_effects(model, hidden, hook=point.name), logit_effects(model, by_hand)
    )


@families
def test_folded_unembedding_predicts_as_the_network_does(family):
    """All of it at once: the network's centred logits are the folded map of the last layer."""
    make, _, norm, _ = FAMILIES[family]
    model = make()
    x = final_stream(model, norm)
    bias = 0
    if family == "gpt2":
        bias = centred(model.network.lm_head(model.network.transformer.ln_f.bias))
        x = x - x.mean(-1, keepdim=True)
    logits = x / x.square().mean(-1, keepdim=True).sqrt() @ folded_unembedding(model).T + bias
    torch.testing.assert_close(logits, centred(model.logits(IDS)), rtol=1e-3, atol=1e-3)


def test_gain_stored_as_one_plus_g():
    """Gemma's norm multiplies by 1 + weight: the gain is measured, so it does not matter."""

    class OnePlus(nn.RMSNorm):
        def forward(self, x):
            return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)

    plain, other = tiny_llama(), tiny_llama()
    norm = OnePlus(16, eps=plain.network.config.rms_norm_eps)
    norm.weight = nn.Parameter(plain.network.model.norm.weight - 1, requires_grad=False)
    other.network.model.norm = norm
    torch.testing.assert_close(folded_unembedding(other), folded_unembedding(plain))


def test_model_without_a_norm():
    model = tiny_language_model()
    directions = torch.randn(3, 12)
    effects = logit_effects(model, directions, head="head")
    torch.testing.assert_close(effects, centred(directions @ model.network.head.weight.T))
    assert final_scale(model, IDS) == 1


def test_top_tokens():
    class Letters:
        def decode(self, ids):
            return "abcd"[ids[0]]

    model = tiny_llama()
    object.__setattr__(model, "tokenizer", Letters())
    effects = torch.tensor([[0.0, 3.0, -2.0, 1.0]])
    assert top_tokens(model, effects, 2) == [[("b", 3.0), ("d", 1.0)]]
    assert top_tokens(model, effects, 1, largest=False) == [[("c", -2.0)]]


def test_bad_arguments():
    with pytest.raises(ValueError, match="must lie in the residual stream, 16 wide"):
        logit_effects(tiny_llama(), torch.randn(2, 24))
    with pytest.raises(ValueError, match="pass its name as head="):
        logit_effects(tiny_language_model(), torch.randn(2, 12))


SAME_WIDTH = {
    "model.layers.1": True,
    "model.layers.1:input": True,
    "model.layers.1.mlp": True,
    "model.layers.1.self_attn": True,
    "model.layers.1.mlp.down_proj": True,
    "model.layers.1.self_attn.o_proj": True,
    "model.layers.1.input_layernorm:input": True,
    "model.layers.1.post_attention_layernorm:input": True,
    "model.norm:input": True,
    "model.embed_tokens": True,
    "model.layers.1.self_attn.q_proj": False,
    "model.layers.1.self_attn.q_proj:input": False,
    "model.layers.1.self_attn.v_proj": False,
    "model.layers.1.mlp.act_fn": False,
    "model.layers.1.mlp.gate_proj": False,
    "model.layers.1.mlp.up_proj:input": False,
    "model.layers.1.input_layernorm": False,
    "model.norm": False,
    "model": False,
    "lm_head:input": False,
}


@pytest.mark.parametrize("hook", SAME_WIDTH)
def test_equal_widths_do_not_make_a_residual_stream(hook):
    """In this network the MLP's hidden layer and the heads are as wide as the stream."""
    model, directions = tiny_llama(d_mlp=16), torch.randn(3, 16)
    if SAME_WIDTH[hook]:
        effects = logit_effects(model, directions, hook=hook)
        torch.testing.assert_close(effects, logit_effects(model, directions))
    else:
        with pytest.raises(ValueError, match="must lie on the residual stream"):
            logit_effects(model, directions, hook=hook)


@pytest.mark.parametrize("sub_block", ["self_attn.o_proj", "mlp.down_proj"])
def test_directions_behind_a_map_go_through_it(sub_block):
    model, directions = tiny_llama(d_mlp=16), torch.randn(3, 16)
    module = model.network.get_submodule(f"model.layers.1.{sub_block}")
    effects = logit_effects(model, directions, hook=f"model.layers.1.{sub_block}:input")
    torch.testing.assert_close(effects, logit_effects(model, directions @ module.weight.T))


def test_the_maps_input_is_named_where_an_mlps_inside_was_hooked():
    with pytest.raises(ValueError, match=r"near it: .*model\.layers\.1\.mlp\.down_proj:input"):
        logit_effects(tiny_llama(), torch.randn(3, 24), hook="model.layers.1.mlp.act_fn")
    with pytest.raises(ValueError, match="must have 24 columns, got shape"):
        logit_effects(tiny_llama(), torch.randn(3, 16), hook="model.layers.1.mlp.down_proj:input")


def test_maps_of_other_families():
    """OPT's MLP has no module of its own; Gemma 2 has norms behind its MLP and attention."""
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        OPTConfig,
        OPTForCausalLM,
    )

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    directions = torch.randn(3, 16)

    opt = LanguageModel(
        "opt", OPTForCausalLM(OPTConfig(**sizes, ffn_dim=16, word_embed_proj_dim=16)).eval()
    )
    second = opt.network.model.decoder.layers[1].fc2
    effects = logit_effects(opt, directions, hook="model.decoder.layers.1.fc2:input")
    torch.testing.assert_close(effects, logit_effects(opt, directions @ second.weight.T))
    with pytest.raises(ValueError, match="must lie on the residual stream"):
        logit_effects(opt, directions, hook="model.decoder.layers.1.fc1:input")

    sizes |= {"intermediate_size": 16}
    neox = LanguageModel("neox", GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval())
    for part in ("attention.dense", "mlp.dense_4h_to_h"):
        module = neox.network.get_submodule(f"gpt_neox.layers.1.{part}")
        effects = logit_effects(neox, directions, hook=f"gpt_neox.layers.1.{part}:input")
        torch.testing.assert_close(effects, logit_effects(neox, directions @ module.weight.T))

    sizes |= {"num_key_value_heads": 2}
    gemma = LanguageModel("gemma", Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8)).eval())
    logit_effects(gemma, directions, hook="model.layers.1")
    for part in ("mlp", "mlp.down_proj:input", "post_feedforward_layernorm:input"):
        with pytest.raises(ValueError, match="must lie on the residual stream"):
            logit_effects(gemma, directions, hook=f"model.layers.1.{part}")

    experts = LanguageModel(
        "moe", MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2)).eval()
    )
    names = [name for name, _ in experts.network.named_modules() if "layers.1" in name]
    inside = [name for name in names if "experts" in name]
    assert inside
    for name in inside:
        with pytest.raises(ValueError, match="must lie on the residual stream"):
            logit_effects(experts, directions, hook=name)
    effects = logit_effects(experts, directions, hook="model.layers.1.mlp")  # all experts' sum
    torch.testing.assert_close(effects, logit_effects(experts, directions))


SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def untrained(family: str, dtype: torch.dtype = torch.float32, **options) -> LanguageModel:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **options, "bos_token_id": None, "eos_token_id": None}
    )
    head = "LMHeadModel" if family == "OpenAIGPT" else "ForCausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = getattr(transformers, f"{family}{head}")(config)
    return LanguageModel(family, network.eval().requires_grad_(False).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_on_the_way_to_the_stream_count(dtype):
    """Granite multiplies embeddings by 12 here, and what a part of a block adds by .22."""
    model = untrained(
        "Granite", dtype, intermediate_size=24, num_key_value_heads=2,
        residual_multiplier=0.22, embedding_multiplier=12.0,
    )  # fmt: skip
    directions = torch.randn(3, 16)
    in_stream = logit_effects(model, directions)
    factors = {
        "model.layers.0": 1, "model.layers.0.mlp": 0.22, "model.layers.0.self_attn.o_proj": 0.22,
        "model.layers.0.input_layernorm:input": 1, "model.embed_tokens": 12,
    }  # fmt: skip
    for hook, factor in factors.items():
        effects = logit_effects(model, directions, hook=hook)
        torch.testing.assert_close(effects, factor * in_stream, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "options", "hooks", "fits"),
    [
        (  # norms behind each part and block: the stream itself is divided
            "OpenAIGPT",
            {"n_embd": 16, "n_layer": 2, "n_head": 2},
            ["transformer.h.0", "transformer.h.1:input", "transformer.h.1.mlp"],
            "transformer.h.1",
        ),
        ("Bloom", {}, ["transformer.word_embeddings"], "transformer.h.0"),  # a norm behind them
        (  # a gate of each token's own behind the expert that all share
            "Qwen2Moe",
            {
                "intermediate_size": 24, "num_key_value_heads": 2, "num_experts": 4,
                "moe_intermediate_size": 8, "shared_expert_intermediate_size": 16,
            },
            [f"model.layers.1.mlp.shared_expert.down_proj{side}" for side in ("", ":input")],
            "model.layers.1.mlp",
        ),
    ],
)  # fmt: skip
def test_what_no_direct_path_leads_from_is_refused(family, options, hooks, fits):
    model, directions = untrained(family, **options), torch.randn(3, 16)
    torch.manual_seed(0)
    for parameter in model.network.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))  # gates that differ
    for hook in hooks:
        with pytest.raises(ValueError, match="must reach the end of the residual stream"):
            logit_effects(model, directions, hook=hook)
    effects = logit_effects(model, directions, hook=fits)
    torch.testing.assert_close(effects, logit_effects(model, directions))
