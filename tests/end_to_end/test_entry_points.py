"""The seed's entry points, where they do more than call a command."""

import subprocess
import sys

import pytest

from tests.support.processes import ROOT


@pytest.mark.parametrize(
    ("given", "instances"),
    [
        ("", ["--prefill", "http://127.0.0.1:8100", "--decode", "http://127.0.0.1:8200"]),
        ("--port 9000", ["--prefill", "http://127.0.0.1:8100", "--decode", "http://127.0.0.1:8200"]),
        ("--prefill=http://a:1 --decode=http://b:2", []),
        ("--prefill http://a:1 --decode http://b:2", []),
        ("recipe.toml", []),
    ],
)
def test_proxy_has_its_default_instances_only_where_none_are_named(given: str, instances: list[str]) -> None:
    code = (
        "import sys, runpy, pdbench.__main__ as entry\n"
        "entry.main = lambda arguments: print(*arguments)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(ROOT / "disagg_prefill_proxy_server.py")
    called = subprocess.run(
        [sys.executable, "-c", code, script, *given.split()], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert called.stdout.split() == ["proxy", *given.split(), *instances]
