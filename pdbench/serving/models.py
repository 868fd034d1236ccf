"""Models that need no download: a tiny DeepSeek-V2 for the CPU, and the shapes of trained ones, for real speed on GPUs.

python -m pdbench.serving.models tiny                            prints the tiny model's folder
python -m pdbench.serving.models deepseek-v2-lite FOLDER         writes the shape into FOLDER (MLA, mixture of experts)
python -m pdbench.serving.models llama-3.1-8b FOLDER             the same (grouped heads, dense)
"""

import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdbench.errors import NOT_JSON, UserError

_REVISION = "3"  # changes whenever the tiny model does, so that an older one in the cache is not taken for it
SHAPES = {path.stem: path for path in sorted(Path(__file__).with_name("shapes").glob("*.json"))}
"""Published config.json files without the entries that name remote code; special tokens are the last two of the vocabulary that is written.
From `transformers_version` 5 on, transformers does not take the vocabulary for one of Mistral's with a known fault."""
_WEIGHTS_BYTES = "pdbench_weights_bytes"
"""What dummy weights take (two bytes per parameter), in the config of a model without weights."""
_CHARACTERS = (
    range(0x80, 0x800),
    range(0x2010, 0x2070),
    range(0x3000, 0x3100),
    range(0x4E00, 0xA000),
    range(0xFF00, 0xFFF0),
)
"""Code points: those of two bytes, punctuation, kana, Chinese characters, full-width forms."""
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_model() -> Path:
    """The folder of a random DeepSeek-V2 of 2 M parameters, in XDG_CACHE_HOME/pdbench or ~/.cache/pdbench.

    It is written first if need be (a few seconds, 8 MB). Raises UserError when it cannot be.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pdbench"
    folder = cache / f"tiny-deepseek-v2-{_REVISION}"
    if not (folder / "model.safetensors").exists():
        from safetensors import SafetensorError

        try:
            cache.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(dir=cache, prefix=".tiny-"))
            try:
                _write_tiny(unfinished)
                unfinished.chmod(0o755)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            if not (folder / "model.safetensors").exists():  # else another process was faster
                remedy = "make room, or set XDG_CACHE_HOME to a folder that you may write"
                raise UserError(f"cannot write the built-in model into {cache}: {error}; {remedy}") from None
    return folder


def _write_tiny(folder: Path) -> None:
    """Tokenizer, configuration and seeded float32 weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    here, special = Path(__file__).parent, ["<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, min_frequency=2, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((here / "tiny-corpus.txt").read_text("utf-8").splitlines(), trainer)
    _save_tokenizer(tokenizer, folder, special, 4096, chat_template=_CHAT_TEMPLATE)
    # The head sizes (128, rope 64, kv_lora_rank 512) are DeepSeek-V2's own: vLLM's MLA kernels take no others.
    settings = json.loads((here / "tiny-deepseek-v2.json").read_text())
    config = DeepseekV2Config(vocab_size=tokenizer.get_vocab_size(), **settings)
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                # Spread widely, so that outputs differ from prompt to prompt and a wrong KV cache shows.
                weight.copy_(torch.empty_like(weight).normal_(std=0.08))
            elif "norm" in name:
                weight.fill_(1.0)
    model.save_pretrained(folder)


def weights_mib(model: str, *, halve_float32: bool) -> float | None:
    """What the weights of a folder, or of a hub's model in the cache, take on a GPU; None where they are not here.

    vLLM loads 32-bit weights as 16-bit ones unless a --dtype keeps them (`halve_float32`).
    """
    folder = Path(model)
    if not folder.is_dir():
        snapshots = (hub_cache(model) / "snapshots").glob("*")
        folder = max(snapshots, key=lambda each: each.stat().st_mtime, default=folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
        size = config.get(_WEIGHTS_BYTES)
        if index.exists():
            size = json.loads(index.read_text())["metadata"]["total_size"]
        elif whole.exists():
            size = whole.stat().st_size
        is_float32 = "float32" in (config.get("torch_dtype"), config.get("dtype"))
        return None if size is None else float(size) / 2**20 / (2 if is_float32 and halve_float32 else 1)
    except (OSError, *NOT_JSON, KeyError, TypeError, AttributeError):
        return None


def hub_cache(model: str) -> Path:
    """Where the hub's model is on this host once it was downloaded."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return cache / "hub" / f"models--{model.replace('/', '--')}"


def shape_model(folder: Path, shape: str = "deepseek-v2-lite") -> Path:
    """Write one of SHAPES, a model without its weights, into `folder` (a few MB), for `--load-format dummy`; returns it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(SHAPES[shape], folder / "config.json")
    config = json.loads((folder / "config.json").read_text())
    special = ["<|begin_of_sentence|>", "<|end_of_sentence|>"]
    # As in a trained vocabulary, nearly every token is text: every byte, common characters that are not ASCII, pairs and triples of
    # printable ASCII. A model of random weights repeats a prompt's last token: were that a piece of a character, the answer had no text.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = [byte_level.pre_tokenize_str(chr(code))[0][0] for code in itertools.chain(*_CHARACTERS)]
    pieces = {(each[:end], each[end]): None for each in characters for end in range(1, len(each))}
    printable = ["\u0120", *map(chr, range(0x21, 0x7F))]  # a byte-level vocabulary writes the space as U+0120
    pairs = itertools.product(printable, repeat=2)
    triples = ((first + second, third) for first, second, third in itertools.product(printable, repeat=3))
    count = config["vocab_size"] - len(special) - len(alphabet)
    merges: list[Any] = list(itertools.islice(itertools.chain(pieces, pairs, triples), count))
    entries = alphabet + ["".join(merge) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={entry: index for index, entry in enumerate(entries)}, merges=merges))
    tokenizer.add_special_tokens(special)
    _save_tokenizer(tokenizer, folder, special, config["max_position_embeddings"])
    return folder


def _save_tokenizer(tokenizer: Any, folder: Path, special: Sequence[str], max_length: int, **settings: str) -> None:
    """Save it as a byte-level one, which encodes any text."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[1],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings, indent=1))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tiny"]:
            print(tiny_model())
        case [shape, folder] if shape in SHAPES:
            print(shape_model(Path(folder), shape))
        case _:
            sys.exit(__doc__)
