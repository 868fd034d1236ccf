"""A root script started with a Python that lacks the packages: it goes on in the one that has them, or says what to do."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "compare_performance.py"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python without packages, as a system's is."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder)
    return folder / "bin" / "python"


def start(bare: Path, own: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PDBENCH_PYTHON": str(own)}
    return subprocess.run([bare, SCRIPT, "--help"], env=environment, capture_output=True, text=True, timeout=120)


def test_it_goes_on_in_the_environment_that_has_the_packages(bare):
    found = start(bare, Path(sys.executable))
    assert found.returncode == 0 and "Judge one saved run" in found.stdout, found.stderr


@pytest.mark.parametrize("own", ["none", "bin/python"])
def test_without_one_it_is_one_line_with_the_remedy(bare, own):
    found = start(bare, bare.parents[1] / own)
    assert found.returncode == 1 and "requirements/setup.sh" in found.stderr and found.stderr.count("\n") == 1
