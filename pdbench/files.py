"""Files of a folder of results: written whole or not at all, several swapped in as one, one writer at a time."""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from pdbench.errors import UserError, WriteError

RESULTS, DEVICES = "*_results.json", "*_gpu_data.json"
_NAME = re.compile(r"\w[\w .,=+-]{0,79}", re.ASCII)
_DRAWN = re.compile(r"\w[^/\0]*(\.png|\.html|\.md|\.csv|_llm-d\.json)|(checks|predictions|search)\.json")
"""What is made from runs, and can be made again."""
_PART = ".pdbench-part"
_SWAP = re.compile(r"\.(?P<name>.*)\.(?P<token>[0-9a-f]+-[0-9]+)\.(?P<kind>commit|swap)")
_LOCK = ".lock"
_OTHERS = "ask its owner for permission, or read it as they do"
_held: dict[str, int] = {}


def check_name(name: str, what: str) -> str:
    """`name`, which comes from a file and becomes part of a file's name. Raises UserError for one that could lead elsewhere."""
    if not _NAME.fullmatch(name):
        shown = ascii(name if len(name) <= 40 else f"{name[:40]}...")
        raise UserError(f"{what} is {shown}: write 1 to 80 letters, digits, spaces or . , = + - _ there")
    return name


def check_writable(folder: Path) -> None:
    """Raises UserError when no file can be written into `folder`; one that is missing is not left behind."""
    try:
        with _made(folder), tempfile.TemporaryFile(dir=folder) as file:
            _write(file, bytes(4096))  # a full disk takes empty files
    except OSError as error:
        raise _not_writable(folder, error) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, then move it there, so that no reader sees half a file.

    Raises UserError when the folder cannot be made or written into.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_parts(path.parent)
        file, temporary = _temporary(path)
        with file:
            try:
                _write(file, data)
                temporary.chmod(0o644)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _cannot_write(path, error) from None


def holds(folder: Path, name: str) -> bool:
    """Is this file there, as far as one may look?"""
    with suppress(OSError):
        return (folder / name).is_file()
    return False


def write_all(folder: Path, of: str, files: Mapping[str, bytes]) -> None:
    """Write a command's files, in the place of what its earlier call wrote: a reader would take that for this one's. Raises WriteError."""
    for name, data in files.items():
        write_whole(folder / name, data)
    listing = folder / f".{of}-files"
    with suppress(OSError, UnicodeDecodeError):
        # A folder may be somebody else's: its list names nothing that was measured, and nothing elsewhere.
        for name in filter(_DRAWN.fullmatch, set(listing.read_text().splitlines()) - set(files)):
            (folder / name).unlink(missing_ok=True)
    write_whole(listing, "\n".join(files).encode())


def save_somewhere(save: Callable[[Path], object], path: Path) -> tuple[Path, WriteError | None]:
    """Where `save` could write what cannot be had again: at `path`, or where there is room, with the error that says so.

    Raises WriteError when nothing takes it.
    """
    try:
        save(path)
    except WriteError as error:
        for find in (tempfile.gettempdir, lambda: "/dev/shm"):
            with suppress(OSError):  # of the first, too, where it finds no room
                folder = Path(tempfile.mkdtemp(prefix="pdbench-", dir=find()))
                try:
                    save(folder / path.name)
                except WriteError:
                    shutil.rmtree(folder)
                else:
                    place = folder / path.name
                    return place, WriteError(f"{error}; what was measured is saved in {place}")
        raise
    return path, None


def begin_again(folder: Path, results: Path) -> None:
    """Remove earlier `results` with all that is in them, and make `folder`. Raises WriteError."""
    try:
        if results.exists():
            shutil.rmtree(results)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(Path(error.filename or results), error) from None


def swap_in(folder: Path, token: str, main: tuple[str, bytes], others: Mapping[str, bytes]) -> None:
    """Put the file `main` and `others` (name -> content) into `folder` as one, and remove other device files.

    All are first written beside their places and flushed to disk. Moving `main` is what counts: when this process is killed
    before, the folder is as it was; after it, `swapped_in` finds the others, and the next swap completes this one. Raises
    UserError when the folder cannot be made or written into, which leaves it as it was.
    """
    commit = folder / f".{main[0]}.{token}.commit"
    # The one without a name lists the others: device files beside them are outdated until it is gone.
    parts = {
        folder / f".{name}.{token}.swap": data for name, data in {"": "\n".join(others).encode(), **others}.items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        with ExitStack() as opened:  # open until all are in their places: `tidy` leaves files in use alone
            try:
                for path, data in {commit: main[1], **parts}.items():
                    file = opened.enter_context(path.open("wb"))
                    lock_for_us(file)
                    _write(file, data)
                    os.fsync(file.fileno())
                _flush(folder)
                commit.replace(folder / main[0])
            except BaseException:
                for path in (*parts, commit):  # without the commit file, the others would count
                    path.unlink(missing_ok=True)
                raise
            _flush(folder)
            _complete(folder, token)
    except OSError as error:
        raise _cannot_write(folder / main[0], error) from None


def swapped_in(folder: Path, token: str) -> tuple[dict[str, Path], bool]:
    """Files of the swap `token`, whose main file is in its place, that are not yet in theirs; and may outdated ones be here?"""
    parts = {name: path for path, name, of, kind in _swap_files(folder) if of == token and kind == "swap"}
    unfinished = parts.pop("", None) is not None
    return parts, unfinished


def tidy(folder: Path) -> None:
    """Complete or undo what writers left that were killed; files of writers that live stay."""
    _remove_parts(folder)
    swaps: dict[str, list[tuple[Path, str]]] = {}
    for path, _name, token, kind in _swap_files(folder):
        swaps.setdefault(token, []).append((path, kind))
    for token, files in swaps.items():
        if any(_in_use(path) for path, _ in files):
            continue
        if any(kind == "commit" for _, kind in files):
            for path, _ in sorted(files, key=lambda file: file[1] == "commit"):
                path.unlink(missing_ok=True)
        else:
            _complete(folder, token)


@contextmanager
def hold(folder: Path, file: str = "") -> Iterator[None]:
    """The folder, or one file of it, for this process's measurements while the block runs; a process may hold it several times.

    A folder that is missing is made, and removed at the end when nothing was put into it. Raises UserError while another
    process has it, or when it cannot be written.
    """
    path = folder / (f".{file}.lock" if file else _LOCK)
    key = os.path.realpath(path)
    if key in _held:
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(_made(folder))
            lock = stack.enter_context(_open_lock(path, (folder / file).absolute()))
            for inner in () if file else (folder, folder / "report", *folder.glob("*_results")):
                if inner.is_dir():
                    tidy(inner)
        except OSError as error:
            raise _not_writable(folder, error) from None
        _held[key] = 1
        try:
            yield
        finally:
            del _held[key]
            with suppress(OSError):
                if _is_at(lock, path):
                    path.unlink()  # before it is unlocked: nobody else has it yet


def _open_lock(path: Path, held: Path) -> IO[bytes]:
    while True:
        lock = path.open("ab")
        if not lock_for_us(lock):
            lock.close()
            raise UserError(f"another pdbench measures into {held}: wait for its end, or give another --out")
        if _is_at(lock, path):
            return lock
        lock.close()  # its owner removed it after we had opened it


def lock_for_us(file: IO[bytes]) -> bool:
    """Until `file` is closed or this process ends, in whatever way; False while another has it. True on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder, made when missing; what was made is removed at the end when it is empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            for path in missing:
                path.rmdir()


def _complete(folder: Path, token: str) -> None:
    """Move a swap's files into their places, once its main file is there, and remove other device files."""
    marker = folder / f"..{token}.swap"
    for path, name, of, _kind in _swap_files(folder):
        if of == token and name:
            path.replace(folder / name)
    if marker.exists():
        belonging = marker.read_text().splitlines()
        for path in _listed(folder, DEVICES):
            if path.name not in belonging:
                path.unlink()
        marker.unlink()
    _flush(folder)


def read_whole(path: Path, size: int = -1) -> bytes:
    """All of a file, or its first `size` bytes.

    Raises UserError, for a missing file because of FileNotFoundError, when it cannot be read or is packed.
    """
    try:
        with path.open("rb") as file:
            content = file.read(size)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: `pdbench monitor --out FILE` and `pdbench run` write such files") from error
    except OSError as error:
        remedy = _OTHERS if isinstance(error, PermissionError) else "restore the file, or measure again"
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    if content.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is packed with gzip: unpack it (gunzip) under the same name")
    return content


def new_lines(path: Path, begin: int) -> tuple[bytes, int]:
    """The whole lines of a file that is being written, from the byte `begin` on, and where they end. Raises FileNotFoundError."""
    with path.open("rb") as file:
        file.seek(begin)
        content = file.read()
    lines = content[: content.rfind(b"\n") + 1]  # the last one may be half written
    return lines, begin + len(lines)


def identity(path: Path) -> tuple[int, int] | None:
    """Changes when another file is moved there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def run_ids(folder: Path) -> list[str]:
    """Which run the results files of `folder` hold, by their first lines."""
    found = [re.search(rb'"run_id": ?"([0-9a-f]+)"', read_whole(path, 400)) for path in results_files(folder)]
    return [match[1].decode() if match else "" for match in found]


def results_files(folder: Path) -> list[Path]:
    """Raises UserError for a folder that may not be read, which looks empty."""
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"cannot read {folder}: Permission denied; {_OTHERS}")
    return _listed(folder, RESULTS)


def device_files(folder: Path) -> list[Path]:
    return _listed(folder, DEVICES)


def _listed(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def _swap_files(folder: Path) -> list[tuple[Path, str, str, str]]:
    """(path, name of the file to be, token, kind) of files that wait for their swap."""
    matches = ((path, _SWAP.fullmatch(path.name)) for path in folder.iterdir())
    return [(path, match["name"], match["token"], match["kind"]) for path, match in matches if match]


def _remove_parts(folder: Path) -> None:
    """Remove temporary files whose writer was killed."""
    for path in folder.iterdir():
        if path.name.startswith(".") and path.name.endswith(_PART) and not _in_use(path):
            path.unlink(missing_ok=True)


def _temporary(path: Path) -> tuple[IO[bytes], Path]:
    """A locked new file beside `path`."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
        file, temporary = os.fdopen(handle, "wb"), Path(name)
        lock_for_us(file)
        if _is_at(file, temporary):
            return file, temporary
        file.close()  # another process took it for a dead writer's before it was locked


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()


def _in_use(path: Path) -> bool:
    """Does its writer live? Where the file system has no locks, that cannot be known."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _flush(folder: Path) -> None:
    """The folder's entries to disk."""
    with suppress(OSError):  # some file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write into {folder.absolute()}: {error.strerror}; give --out a folder that you may write")


def _cannot_write(path: Path, error: OSError) -> WriteError:
    return WriteError(f"cannot write {path}: {error.strerror}; make room, or name a folder that you may write")
