"""Hashes of the files that a load reads: a file of the same name may hold something else by now."""

import functools
import hashlib
from pathlib import Path

from pdbench.config import LoadConfig


def contents_of(config: LoadConfig) -> dict[str, str]:
    """Hash of the bytes of --trace, --prompt-file and the tokenizer.json of --tokenizer, by option; only of files that are here and can be
    read twice."""
    files = {"trace": config.trace, "prompt_file": config.prompt_file}
    files["tokenizer"] = str(Path(config.tokenizer, "tokenizer.json")) if config.tokenizer else None
    found = {}
    for option, name in files.items():
        try:
            if name and Path(name).is_file():
                state = Path(name).stat()
                found[option] = _hash(str(Path(name).absolute()), state.st_mtime_ns, state.st_size)
        except OSError:  # `plan.check_files` says what cannot be read
            continue
    return found


@functools.lru_cache(maxsize=1024)
def _hash(path: str, *_version: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
