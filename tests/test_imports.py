"""What importing a part of the package imports, seen in fresh processes; and the rules between the parts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("numba", "triton", "matplotlib", "PIL", "scipy")


def modules_after(statement: str) -> set[str]:
    """Names of the top-level modules and of ours that a fresh interpreter holds after a statement."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    names = json.loads(run.stdout)
    return {name.partition(".")[0] for name in names} | {name for name in names if name.startswith("batchnorm")}


def test_importing_the_package_imports_no_torch():
    assert not modules_after("import batchnorm") & {"torch", "numpy", *HEAVY}


@pytest.mark.parametrize("part", ["nn", "functional", "statistics"])
def test_importing_a_part_imports_torch_and_nothing_heavier(part):
    loaded = modules_after(f"import batchnorm.{part}")
    assert "torch" in loaded
    assert not loaded & set(HEAVY)


def test_reference_imports_torch_and_nothing_of_ours():
    loaded = modules_after("import batchnorm.reference")
    assert {name for name in loaded if name.startswith("batchnorm")} == {"batchnorm", "batchnorm.reference"}
    assert not loaded & set(HEAVY)


def test_public_names_are_imported_at_first_use():
    loaded = modules_after("import batchnorm; batchnorm.nn")
    assert "batchnorm.nn" in loaded
    assert "batchnorm.statistics" not in loaded


def test_parts_import_each_other_only_downwards():
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run(
        [sys.executable, "-c", lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
