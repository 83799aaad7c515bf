"""The kernels of ARM's NEON, compiled here and run by an emulator: the tests of the kernels with that library.

Needs ``g++-aarch64-linux-gnu`` and ``qemu-user`` (packages of Debian and Ubuntu), else it is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ROOT = Path(__file__).parents[1]
OF_THE_PROCESS = (
    "believes_no_argument or checks_products_with_columns or no_memory_is or scratch_is_counted or flag_of_the"
)
"""Tests of damaged pointers, threads and memory, which do not travel from one process to another, and of this build."""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the kernels are those for ARM."""
    missing = [tool for tool in (COMPILER, EMULATOR, "g++") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}")
    build = tmp_path_factory.mktemp("arm")
    source = ROOT / "src/fips/kernels/csrc"
    common = ["-std=c++17", "-O1", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-DFIPS_HAVE_256"]
    vectors = ["-march=armv8.2-a+dotprod"]
    parts = []
    for name, flags in (
        ("block", []), ("dispatch", []), ("checks", []), ("exact", []), ("portable", []), ("scratch", []),
        *((f"{name}256", vectors) for name in ("vectors", "attention", "norms", "block", "search")),
        ("vectors256_tiles", vectors),
    ):  # fmt: skip
        parts.append(build / f"{name}.o")
        subprocess.run([COMPILER, *common, *flags, "-c", source / f"{name}.cpp", "-o", parts[-1]], check=True)
    parts.append(ROOT / "tests/arm/serve.cpp")
    subprocess.run([COMPILER, *common, *parts, "-o", build / "serve"], check=True)
    bridge = build / "bridge.so"
    here = [ROOT / "tests/arm/bridge.cpp", source / "block.cpp", source / "checks.cpp"]
    options = ["-std=c++17", "-shared", "-fPIC", "-DFIPS_HAVE_256", "-fvisibility=hidden", "-Wl,--no-undefined"]
    subprocess.run(["g++", *options, *here, "-o", bridge], check=True)
    libraries = Path("/usr/aarch64-linux-gnu")
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # it may ask for more output
    return {**own, "FIPS_KERNELS": str(bridge), "FIPS_BRIDGE": f"{EMULATOR} -L {libraries} {build / 'serve'}"}


@pytest.mark.slow
def test_the_kernels_of_arm_pass_the_tests_of_the_kernels(emulated: dict[str, str]) -> None:
    # Other patterns differ in their readers.
    kinds = "full or bitmask or block4 or tc or attention or norms or its_modules_give or half_precision"
    chosen = f"({kinds}) and not ({OF_THE_PROCESS})"
    tests = [f"tests/test_{name}.py" for name in ("kernels", "trellis", "attention", "norms", "blocks")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", chosen, "-n0"],
        cwd=ROOT, env=emulated, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
    assert "portable" not in done.stdout


@pytest.mark.slow
def test_an_emulated_arm_has_both_instruction_sets(emulated: dict[str, str]) -> None:
    code = "from fips.kernels import cpu; print(*cpu.isa_names())"
    done = subprocess.run([sys.executable, "-c", code], env=emulated, check=True, capture_output=True, text=True)
    assert len(done.stdout.split()) == 2
