"""A tiny random DeepSeek-V2 (2 M parameters), made on the spot: real vLLM, real MLA, no download.

The weights are random but spread (standard deviation 0.08), so that outputs differ from prompt to prompt and a wrong KV
cache shows. The head sizes (128, rope 64, kv_lora_rank 512) are DeepSeek-V2's own: vLLM's MLA kernels, on CPU and GPU, take no others.
Try: python -m pdbench.serving.tiny_model
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

REVISION = "3"
"""Changes whenever what is made changes, so that an older model in the cache is not taken for it."""

_CORPUS = [
    "The quick brown fox jumps over the lazy dog. Large language models are served in two phases: prefill reads the whole "
    "prompt at once and is bound by compute; decode writes one token after another and is bound by memory bandwidth.",
    "When both phases share one device, a long prompt delays the tokens of everybody else. Splitting them moves the "
    "key-value cache from one device to another, which costs time and energy of its own. Is it worth it?",
    "Energy is power integrated over time. What is the price of a token in joules? How does the clock of a device change "
    "the answer, and what does an idle device cost while it waits for work?",
    "Please explain, summarize, translate and compare: write a short story about a ship in the night, list the steps of "
    "the water cycle, and say why the sky is blue. Then give the reasons in your own words, with one example each.",
    "大语言模型的推理分为两个阶段：预填充阶段一次读入全部提示词，受计算能力限制；解码阶段逐个生成词元，受内存带宽限制。",
    "把两个阶段放到不同的设备上，需要把键值缓存从一个设备传到另一个设备。请用简单的语言解释这个过程，并给出一个例子。",
    "能量是功率对时间的积分。每个词元消耗多少焦耳？时钟频率如何影响答案？请比较两种方法的优点和缺点，并总结结论。",
]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_model(cache: Path | None = None) -> Path:
    """The folder of the tiny model, made first if need be (a few seconds, 8 MB).

    `cache` is by itself XDG_CACHE_HOME/pdbench or ~/.cache/pdbench.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pdbench"
    folder = cache / f"tiny-deepseek-v2-{REVISION}"
    if not (folder / "model.safetensors").exists():
        cache.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=cache, prefix=".tiny-"))
        try:
            _make(making)
            making.chmod(0o755)
            making.rename(folder)
        except OSError:
            if not (folder / "model.safetensors").exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return folder


def _make(folder: Path) -> None:
    """Write tokenizer, configuration and seeded float32 weights into `folder`."""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    vocabulary = _make_tokenizer(folder)
    config = DeepseekV2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        max_position_embeddings=4096,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        architectures=["DeepseekV2ForCausalLM"],
    )
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.empty_like(weight).normal_(std=0.08))
            elif "norm" in name:
                weight.fill_(1.0)
    model.save_pretrained(folder)


def _make_tokenizer(folder: Path) -> int:
    """Train a byte-level BPE on a few sentences (any text can be encoded); returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return int(tokenizer.get_vocab_size())


if __name__ == "__main__":
    print(tiny_model())
