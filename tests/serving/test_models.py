"""Where the built-in model is kept, and the shapes of trained ones."""

import json
from pathlib import Path

import pytest
import tokenizers

from pdbench.errors import UserError
from pdbench.serving import models


@pytest.mark.parametrize("cannot", ["make the folder", "write the weights"])
def test_cache_that_takes_no_model_is_named_with_the_remedy(
    cannot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors = pytest.importorskip("safetensors")

    def full(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(models, "_write_tiny", full)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none" if cannot == "make the folder" else str(tmp_path))
    with pytest.raises(
        UserError, match=r"cannot write the built-in model into .*/pdbench: .*; make room, or set XDG_CACHE_HOME"
    ):
        models.tiny_model()
    assert not [*tmp_path.rglob("*.json")]


@pytest.mark.parametrize(
    ("shape", "parameters"), [("deepseek-v2-lite", 15_706_484_224), ("llama-3.1-8b", 8_030_261_248)]
)  # as published
def test_shape_has_the_published_sizes_and_a_token_for_every_id(shape: str, parameters: int, tmp_path: Path) -> None:
    folder = models.shape_model(tmp_path / shape, shape)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert models.weights_mib(str(folder), halve_float32=True) == pytest.approx(2 * parameters / 2**20)
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.id_to_token(config["eos_token_id"]) == "<|end_of_sentence|>"
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    assert sum(each.numel() for each in model.parameters()) == parameters
