"""A tokenizer that is trained on the spot."""

import pytest
import tokenizers

from pdbench.load import prompts
from pdbench.load.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    """A byte-level BPE tokenizer trained on the built-in texts, with a beginning-of-text token as many models have."""
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE())
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>"], initial_alphabet=alphabet)
    encoder.train_from_iterator(prompts.passages(), trainer)
    encoder.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("tokenizer")
    encoder.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Tokenizer:
    loaded = load_tokenizer(tokenizer_folder)
    assert loaded is not None
    return loaded
