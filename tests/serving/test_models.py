"""Where the built-in model is kept."""

from pathlib import Path

import pytest

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
