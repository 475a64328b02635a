"""The demo, run as a user runs it, and the backward pass that it is built on."""

import re
import subprocess
import sys

import numpy as np
import pytest

from fused_adam.demo import network

PACKAGES = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}


def run_python(*args, cwd):
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=120
    )


def run_main(setup, cwd):
    """The demo in a process in which something else was done first."""
    run = "import runpy; runpy.run_module('fused_adam.demo', run_name='__main__', alter_sys=True)"
    return run_python("-c", f"{setup}; {run}", cwd=cwd)


@pytest.fixture
def needs_packages():
    for module in PACKAGES:
        pytest.importorskip(module)


@pytest.mark.slow
@pytest.mark.usefixtures("needs_packages")
def test_demo(tmp_path):
    picture = tmp_path / "x.png"
    done = run_python("-m", "fused_adam.demo", "--output", str(picture), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = {}
    for name in ("SGD", "momentum", "RMSprop", "textbook Adam", "fused Adam"):
        line = re.search(rf"^{name} .*?([\d.]+) % .* ms .* us$", done.stdout, re.MULTILINE)
        assert line, f"no line for {name} in\n{done.stdout}"
        accuracy[name] = float(line[1])
    assert accuracy["fused Adam"] >= 97
    assert accuracy["textbook Adam"] >= 97
    assert "Textbook Adam and fused Adam agree" in done.stdout
    assert str(picture) in done.stdout

    from matplotlib.image import imread

    height, width, _ = imread(picture, format="png").shape
    assert height > 600
    assert width > 800
    assert picture.stat().st_size > 20_000


# One process for all: what takes time is to import the others.
FAILING = """
import sys
from fused_adam.demo import report, training
from fused_adam.demo.__main__ import main
training.EPOCHS = 2
codes = [main()]
report.TOLERANCE = -1
codes.append(main())
sys.argv += ["--output", "no/x.png"]
codes.append(main())
print(codes)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("needs_packages")
def test_demo_says_what_failed(tmp_path):
    done = run_python("-c", FAILING, cwd=tmp_path)
    assert done.stdout.endswith("[1, 1, 1]\n"), done.stderr
    assert re.findall("^(FAILED.*|Cannot.*picture)", done.stderr, re.MULTILINE) == [
        "FAILED: fused Adam must read 97% of the test digits correctly.",
        "FAILED: textbook Adam and fused Adam must agree.",
        "Cannot write the picture",
    ]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("module", "package"), PACKAGES.items())
def test_demo_says_what_is_missing(module, package, tmp_path):
    done = run_main(f"import sys; sys.modules[{module!r}] = None", cwd=tmp_path)
    assert done.returncode == 1
    assert 'the demo needs: pip install "fused-adam[demo]"' in done.stderr
    assert package in done.stderr.partition("missing")[2]
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_gradients_match_finite_differences():
    rng = np.random.default_rng(1)
    params = network.new_params((6, 5, 4, 3), rng, np.float64)
    for param in params.values():
        param += 0.1 * rng.standard_normal(param.shape)  # biases are not zero either
    images, labels = rng.standard_normal((7, 6)), rng.integers(0, 3, 7)

    loss, grads = network.loss_and_grads(params, images, labels)
    assert loss == network.evaluate(params, images, labels)[0]
    assert grads.keys() == params.keys()
    for name, param in params.items():
        assert grads[name].dtype == np.float64
        expected = np.empty_like(param)
        for index, value in np.ndenumerate(param):
            losses = []
            # The error of central differences falls with the square of the distance, that of rounding
            # rises with its inverse: both are near 1e-10 here.
            for shift in (1e-5, -1e-5):
                param[index] = value + shift
                losses.append(network.evaluate(params, images, labels)[0])
            param[index] = value
            expected[index] = (losses[0] - losses[1]) / 2e-5
        np.testing.assert_allclose(grads[name], expected, rtol=1e-7, atol=1e-9, err_msg=name)


def test_network_keeps_float32():
    rng = np.random.default_rng(1)
    params = network.new_params((6, 5, 3), rng)
    _, grads = network.loss_and_grads(params, rng.standard_normal((4, 6), np.float32), np.array([0, 1, 2, 0]))
    assert {grad.dtype for grad in grads.values()} == {np.dtype(np.float32)}
    assert {name: grad.shape for name, grad in grads.items()} == {
        name: param.shape for name, param in params.items()
    }
