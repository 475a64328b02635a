"""All instruction sets give the same bits, and the environment chooses among them or is refused."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cases import (
    DEFAULTS,
    OPTION_TABLE,
    all_isas,
    assert_same_arrays,
    awkward_values,
    each_dtype,
    random_arrays,
    without_conflicts,
)
from fused_adam import _config, _core, show_config

ON_LINUX_X86 = sys.platform == "linux" and platform.machine() == "x86_64"


# Where the tests are run without the sources of the extension, it is not there.
BUILD = Path(__file__).parent.parent / "CMakeLists.txt"


def isas_of_the_build():
    """All instruction sets, of other processors too, and the flags that their kernels are compiled with."""
    if not BUILD.exists():
        return {}
    rows = re.findall(r'^ *add_isa\((\w+) "(.*?)"', BUILD.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: re.findall("(?:^|;)-m([a-z0-9]+)", flags) for name, flags in rows}


ISAS_OF_THE_BUILD = isas_of_the_build()
KNOWN_ISAS = sorted({*ISAS_OF_THE_BUILD, *_core.compiled_isas()})


def random_options(rng):
    not_negative = lambda: float(rng.choice([0.0, 10 ** rng.uniform(-6, 0)]))  # noqa: E731
    kinds = {
        "number": not_negative,
        "number or function": not_negative,
        "betas": lambda: (float(rng.choice([0.0, rng.uniform(), 0.9])), float(1 - 10 ** rng.uniform(-7, 0))),
        "flag": lambda: bool(rng.integers(2)),
        "fraction or None": lambda: rng.choice([None, 0.3, 0.999]),
        "eps mode": lambda: str(rng.choice(["outside", "hat", "root"])),
        "number or None": lambda: rng.choice([None, None, 0.0, 10 ** rng.uniform(-6, 3)]),
        "seed": lambda: int(rng.integers(2**63)),
        "state dtype": lambda: None,  # others: test_stored_moments.py
    }
    return without_conflicts({option.name: kinds[option.kind]() for option in OPTION_TABLE})


@each_dtype
@pytest.mark.parametrize("seed", range(50))
def test_all_isas_agree(seed, dtype):
    rng = np.random.default_rng(seed)
    options = random_options(rng)
    start = random_arrays(1000 + seed, dtype, seed)
    for array in start:  # among ordinary neighbours, some special values
        array[rng.integers(0, array.size, 50)] = rng.choice(awkward_values(dtype), 50)
    first, *others = [start.copy() for _ in all_isas()]
    for step in (1, 2, int(10 ** rng.uniform(1, 6))):
        for isa, arrays in zip(all_isas(), (first, *others), strict=True):
            arrays.step(options, step, isa)
        for isa, arrays in zip(all_isas()[1:], others, strict=True):
            assert_same_arrays(arrays, first, f"{isa}, {options}, step {step}:")


def test_the_table_of_isas():
    compiled = _core.compiled_isas()
    assert len(set(compiled)) == len(compiled) > 1, "every processor that there are tests for has an ISA"
    assert all_isas() == [isa for isa in compiled if isa in all_isas()]  # best first
    assert all_isas()[-1] == compiled[-1], "the last one runs everywhere"
    assert not BUILD.exists() or set(compiled) <= ISAS_OF_THE_BUILD.keys()


@pytest.mark.skipif(not ON_LINUX_X86 or not BUILD.exists(), reason="needs Linux on x86-64, and the sources")
def test_detection_agrees_with_linux():
    """Linux lists a feature when the CPU has it and the system saves its registers."""
    with open("/proc/cpuinfo") as cpuinfo:
        flags = next(line.replace("_", "").split() for line in cpuinfo if line.startswith("flags"))
    assert all_isas() == [isa for isa in _core.compiled_isas() if {*ISAS_OF_THE_BUILD[isa]} <= {*flags}]


# --- the environment -------------------------------------------------------------------------------


def run(code, **variables):
    """The finished process of a Python that runs this code, with no other settings than these."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FUSED_ADAM_")}
    command, environment = [sys.executable, "-c", code], {**environment, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def import_with(**variables):
    """What show_config() says in a new process, or the last line of the error that it ends with."""
    process = run("import json, fused_adam; print(json.dumps(fused_adam.show_config()))", **variables)
    if process.returncode == 0:
        return json.loads(process.stdout)
    return process.stderr.strip().splitlines()[-1]


def test_without_variables_the_best_isa_is_taken():
    config = import_with()
    assert config["isa"] == config["isas_supported"][0] == all_isas()[0]
    assert config["environment"] == {}


@pytest.mark.parametrize("isa", all_isas())
def test_an_isa_is_forced(isa):
    config = import_with(FUSED_ADAM_ISA=isa)
    assert config["isa"] == isa
    assert config["environment"]["FUSED_ADAM_ISA"] == isa


@pytest.mark.parametrize("isa", all_isas())
def test_a_forced_isa_is_the_one_that_runs(isa):
    """What an optimizer says of itself is read from the table whose kernels it calls."""
    code = "import numpy as np, fused_adam; print(fused_adam.Adam(np.ones(3))._core.isa)"
    assert run(code, FUSED_ADAM_ISA=isa).stdout.strip() == isa


def test_an_empty_variable_counts_as_unset():
    config = import_with(FUSED_ADAM_ISA="", FUSED_ADAM_NUM_THREADS="")
    assert config["isa"] == all_isas()[0]
    assert config["num_threads"] >= 1


@pytest.fixture
def refused(monkeypatch):
    """Reads a variable of the environment as an import does, and checks the message."""

    def check(read, variable, text):
        monkeypatch.setenv(variable, text)
        with pytest.raises(ValueError, match=f"^environment variable {variable}") as caught:
            read()
        assert repr(text) in str(caught.value)
        return str(caught.value)

    return check


# Of each name: written otherwise, and with something more or less.
MISNAMED = [
    wrong
    for isa in _core.compiled_isas()
    for wrong in (isa.upper(), isa.title(), isa[:-1], isa + " ", " " + isa)
]


@pytest.mark.parametrize("isa", [*MISNAMED, ",".join(_core.compiled_isas()), "native", " "])
def test_an_unknown_isa_is_refused(isa, refused):
    message = refused(_config._isa, "FUSED_ADAM_ISA", isa)
    for supported in all_isas():
        assert supported in message


@pytest.mark.parametrize("variable", ["FUSED_ADAM_ISA", "FUSED_ADAM_NUM_THREADS"])
def test_the_import_refuses(variable):
    error = import_with(**{variable: "no such thing"})
    assert isinstance(error, str)
    assert error.startswith(f"ValueError: environment variable {variable}")
    assert "'no such thing'" in error


@pytest.mark.parametrize("isa", [isa for isa in KNOWN_ISAS if isa not in all_isas()])
def test_an_unsupported_isa_is_refused(isa):
    error = import_with(FUSED_ADAM_ISA=isa)
    assert isinstance(error, str), f"{isa!r} was taken for {error['isa']}"
    assert error.startswith("ValueError: environment variable FUSED_ADAM_ISA")
    assert isa in error
    with pytest.raises(ValueError, match=isa):
        _core.check_isa(isa)


def test_the_core_refuses_an_unknown_isa():
    arrays = random_arrays(3, np.float32)
    before = arrays.copy()
    with pytest.raises(ValueError, match="no such ISA"):
        arrays.step(DEFAULTS, 1, "no such ISA")
    assert_same_arrays(arrays, before)


@pytest.mark.parametrize("threads", [1, 3, 1000])
def test_the_number_of_threads_is_taken(threads):
    config = import_with(FUSED_ADAM_NUM_THREADS=str(threads))
    assert config["num_threads"] == threads
    assert config["environment"]["FUSED_ADAM_NUM_THREADS"] == str(threads)


@pytest.mark.parametrize(
    "text", ["0", "-1", "two", "1.0", "2 threads", "1e3", "+2", " 2", "0x2", "9" * 20, " ", "4097", "²"]
)
def test_a_bad_number_of_threads_is_refused(text, refused):
    refused(_config._num_threads, "FUSED_ADAM_NUM_THREADS", text)


def test_this_process_uses_what_it_says():
    config = show_config()
    assert config["isa"] == (os.environ.get("FUSED_ADAM_ISA") or all_isas()[0])
    assert config["isas_supported"] == all_isas()
