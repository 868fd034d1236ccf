"""DeepSeek-V2-Lite's shape without its weights: for real speed on a host that cannot download it (--load-format dummy).

The configuration is the published one (27 layers, 64 routed experts, kv_lora_rank 512); the tokenizer is made on the spot
with as many entries, since no part of it may be missing. Try: python -m pdbench.serving.shape_model models/deepseek-v2-lite
"""

import itertools
import json
import sys
from pathlib import Path

CONFIG = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 102398,
    "eos_token_id": 102399,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
"""config.json of deepseek-ai/DeepSeek-V2-Lite, without the entries that name remote code; the special tokens are our tokenizer's last two."""


def shape_model(folder: Path) -> Path:
    """Write the model's folder (a few MB, seconds); returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    _make_tokenizer(folder)
    return folder


def _make_tokenizer(folder: Path) -> None:
    """Byte-level BPE of 102400 entries: every byte, every pair of printable ASCII, triples of them. Any text can be written,
    and nearly every token is a piece of text by itself, as in a trained vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|begin_of_sentence|>", "<|end_of_sentence|>"]
    wanted = CONFIG["vocab_size"] - len(special)  # type: ignore[operator]
    entries = list(alphabet)
    merges = []
    space = "\u0120"  # how a byte-level vocabulary writes it
    printable = [space, *map(chr, range(0x21, 0x7F))]
    for pair in itertools.product(printable, printable):
        entries.append("".join(pair))
        merges.append(pair)
    triples = itertools.product(printable, printable, printable)
    for first, second, third in itertools.islice(triples, wanted - len(entries)):
        entries.append(first + second + third)
        merges.append((first + second, third))
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[1],
        "model_max_length": 163840,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    print(shape_model(Path(sys.argv[1])))
