"""Models with drafters for tests of speculative decoding, made so that drafts are good and depend on the drafter's own KV cache.

Target and drafter have one layer with the same weights; the drafter takes a token's embedding and ignores the target's hidden state, which
real ones combine. So it drafts what the target would say had it not seen the first token.
"""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from pdbench.serving.models import tiny_model
from tests.support.kv import tiny_qwen2


def _of_norm_one(embeddings):
    """The drafter's layer has no norm at its input: with rows of root mean square 1 the target's changes nothing."""
    return embeddings / embeddings.pow(2).mean(-1, keepdim=True).sqrt()


def _rewrite(folder, change):
    """Change a model's saved weights by name."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return weights


def eagle(folder):
    """A Qwen2 of one layer, and an EAGLE head for it: (model, head)."""
    model, head = tiny_qwen2(folder / "qwen2", layers=1), folder / "eagle"
    embeddings = "model.embed_tokens.weight"
    weights = _rewrite(model, lambda weights: weights.update({embeddings: _of_norm_one(weights[embeddings])}))
    size = weights[embeddings].shape[1]
    kept = {
        name.removeprefix("model."): weight.clone()
        for name, weight in weights.items()
        if name == embeddings or (".layers.0." in name and "input_layernorm" not in name and "bias" not in name)
    }
    head.mkdir()
    fc = torch.cat([torch.eye(size), torch.zeros(size, size)], dim=1)
    save_file(kept | {"fc.weight": fc}, head / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
    }
    del config["layer_types"]  # the target's; vLLM numbers the head's layer behind them
    (head / "config.json").write_text(json.dumps(config))
    return model, head


def mtp(folder):
    """A DeepSeek-V3 of one dense layer with one MTP module."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = folder / "deepseek-v3"
    shutil.copytree(tiny_model(), model, ignore=shutil.ignore_patterns("model*", "generation*"))
    shape = json.loads((model / "config.json").read_text())
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "kv_lora_rank", "q_lora_rank",
        "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "moe_intermediate_size", "initializer_range",
    )  # fmt: skip
    config = DeepseekV3Config(
        **{name: shape[name] for name in names},
        num_hidden_layers=1,
        first_k_dense_replace=2,  # dense, too, is the module
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        num_nextn_predict_layers=1,
    )
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(config).save_pretrained(model)

    def add_module(weights):
        weights["model.embed_tokens.weight"] = _of_norm_one(weights["model.embed_tokens.weight"])
        size = config.hidden_size
        layer = {
            name.replace(".0.", ".1.", 1): weight.clone() for name, weight in weights.items() if ".layers.0." in name
        }
        module = {
            "enorm.weight": torch.ones(size),
            "hnorm.weight": torch.ones(size),
            "eh_proj.weight": torch.cat([torch.eye(size), torch.zeros(size, size)], dim=1),
            "shared_head.norm.weight": torch.ones(size),
            "shared_head.head.weight": weights["lm_head.weight"].clone(),
            "embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
        }
        weights.update(layer | {f"model.layers.1.{name}": weight for name, weight in module.items()})

    _rewrite(model, add_module)
    return model
