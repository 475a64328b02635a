"""Training with the libraries that people use with NumPy: with the real ones, where they are installed."""

import doctest
import inspect
import os
import pickle
import runpy
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import numpy as np
import pytest

import fused_adam
from cases import assert_same_bits
from fused_adam import Adam, AdamW, adam_step

EPOCHS = 60


def make_data(dtype=np.float32):
    """Two classes that no line separates: 512 points, in batches of 64."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((512, 4)).astype(dtype)
    return x, (x[:, 0] * x[:, 1] > 0).astype(np.int64)


def make_params(dtype=np.float32, hidden=32, classes=2):
    rng = np.random.default_rng(8)
    return {
        "layers": [
            (rng.standard_normal((4, hidden)).astype(dtype), np.zeros(hidden, dtype)),
            ((rng.standard_normal((hidden, classes)) / 4).astype(dtype), np.zeros(classes, dtype)),
        ]
    }


def batches(x, y, size=64):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in test_torch.py
    yield torch
    torch.set_num_threads(threads)


# --- autograd ---


@pytest.fixture
def autograd_loss():
    pytest.importorskip("autograd")
    import autograd.numpy as anp

    def loss(params, x, y):
        (w1, b1), (w2, b2) = params["layers"]
        logits = anp.dot(anp.tanh(anp.dot(x, w1) + b1), w2) + b2
        shifted = logits - anp.max(logits, axis=1, keepdims=True)
        log_p = shifted - anp.log(anp.sum(anp.exp(shifted), axis=1, keepdims=True))
        return -anp.mean(log_p[np.arange(len(y)), y])

    return loss


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_autograd(autograd_loss, dtype):
    from autograd import grad

    x, y = make_data(dtype)
    params = make_params(dtype)
    opt = Adam(params, lr=0.02)
    gradient = grad(autograd_loss)
    for _ in range(EPOCHS):
        for batch in batches(x, y):
            opt.step(gradient(params, *batch))  # has the structure of params, dtypes too
    assert autograd_loss(params, x, y) < 0.05


def test_autograd_agrees_with_its_own_adam(autograd_loss):
    from autograd import grad
    from autograd.misc.optimizers import adam

    data = batches(*make_data(np.float64))
    params = make_params(np.float64)
    opt = Adam(params, lr=0.02)
    gradient = grad(autograd_loss)
    theirs = adam(
        lambda p, i: gradient(p, *data[i % len(data)]),
        make_params(np.float64),
        num_iters=100,
        step_size=0.02,
    )
    for i in range(100):
        opt.step(gradient(params, *data[i % len(data)]))
    for ours, others in zip(params["layers"], theirs["layers"], strict=True):
        for a, b in zip(ours, others, strict=True):
            # The same formula, in other operations: 100 roundings of numbers around 1, which the gradients
            # pass on. They differ by 1e-15.
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)


# --- MyGrad ---


@pytest.fixture
def mg():
    return pytest.importorskip("mygrad")


def test_mygrad(mg):
    from mygrad.nnet.losses import softmax_crossentropy

    x, y = make_data()
    tensors = [mg.tensor(a) for layer in make_params()["layers"] for a in layer]
    opt = Adam([t.data for t in tensors], lr=0.02)  # the arrays inside the tensors

    def loss(x, y):
        w1, b1, w2, b2 = tensors
        return softmax_crossentropy(mg.tanh(x @ w1 + b1) @ w2 + b2, y)

    for _ in range(EPOCHS):
        for batch in batches(x, y):
            loss(*batch).backward()
            opt.step([t.grad for t in tensors])
    with mg.no_autodiff:
        assert loss(x, y).item() < 0.05
    assert all(t.data is a for t, a in zip(tensors, opt.param_groups[0]["params"], strict=True))


def test_mygrad_locks_arrays_until_backward(mg):
    w = mg.tensor(np.ones(3))
    opt = Adam(w.data)
    loss = (w * w).sum()
    with pytest.raises(ValueError, match="read-only"):
        opt.step(np.ones(3))
    loss.backward()
    opt.step(w.grad)
    assert np.all(w.data < 1)


def test_mygrad_gives_transposed_gradients(mg):
    w = mg.tensor(np.ones((3, 2)))
    opt = Adam(w.data)
    mg.matmul(np.ones((4, 2)), w.T).sum().backward()
    with pytest.raises(ValueError, match="Fortran order"):
        opt.step(w.grad)
    opt.step(np.ascontiguousarray(w.grad))
    assert np.all(w.data < 1)


# --- thinc ---


@pytest.fixture
def thinc():
    pytest.importorskip("thinc")
    import thinc.api

    return thinc.api


def thinc_model(thinc):
    model = thinc.chain(thinc.Relu(nO=32, nI=4), thinc.Softmax(nO=2, nI=32))
    thinc.fix_random_seed(3)
    return model.initialize()


def train_thinc(model, optimizer, epochs):
    x, y = make_data()
    targets = np.eye(2, dtype=np.float32)[y]
    for _ in range(epochs):
        for batch, target in batches(x, targets):
            guess, backprop = model.begin_update(batch)
            backprop((guess - target) / len(batch))
            model.finish_update(optimizer)
            optimizer.step_schedules()
    return np.mean(model.predict(x).argmax(axis=1) == y)


def thinc_params(model):
    return [node.get_param(name) for node in model.walk() for name in node.param_names]


def test_examples_of_the_thinc_module(thinc):
    from fused_adam import thinc as module

    assert doctest.testmod(module).failed == 0


def test_thinc(thinc):
    from fused_adam.thinc import Adam as ThincAdam

    model = thinc_model(thinc)
    before = thinc_params(model)
    optimizer = ThincAdam(0.02)
    assert train_thinc(model, optimizer, EPOCHS) >= 0.97
    assert all(a is b for a, b in zip(thinc_params(model), before, strict=True))
    assert set(optimizer.nr_update.values()) == {EPOCHS * 8}
    for node in model.walk():
        for name in node.param_names:
            assert not node.get_grad(name).any()

    x, y = make_data()
    with model.use_params(optimizer.averages):
        assert np.mean(model.predict(x).argmax(axis=1) == y) >= 0.95


@pytest.mark.parametrize("options", [{}, {"grad_clip": 0.05}, {"L2": 0.01, "L2_is_weight_decay": False}])
def test_thinc_agrees_with_its_own_adam(thinc, options):
    from fused_adam.thinc import Adam as ThincAdam

    if "L2" in options:
        options = {**options, "grad_clip": 0.0}  # thinc adds the decay before clipping, here it is after
    models = thinc_model(thinc), thinc_model(thinc)
    optimizers = [each(0.02, eps=1e-3, **options) for each in (ThincAdam, thinc.Adam)]
    for model, optimizer in zip(models, optimizers, strict=True):
        train_thinc(model, optimizer, 4)
    for ours, theirs in zip(*map(thinc_params, models), strict=True):
        # The same formula, in other operations: 32 roundings of float32 numbers around 1, which the
        # gradients pass on. They differ by 3e-6; with eps in the other place, by 0.3.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    averages = (optimizer.averages.values() for optimizer in optimizers)
    for ours, theirs in zip(*averages, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_thinc_has_the_names_and_defaults_of_thinc(thinc):
    from fused_adam.thinc import Adam as ThincAdam

    ours, theirs = (inspect.signature(item).parameters for item in (ThincAdam, thinc.Adam))
    assert {k: p.default for k, p in ours.items()} == {k: p.default for k, p in theirs.items()}


def test_thinc_agrees_bit_for_bit_with_adam(thinc):
    from fused_adam.thinc import Adam as ThincAdam

    models = thinc_model(thinc), thinc_model(thinc)
    ours = ThincAdam(0.02, L2=0.1, grad_clip=0.0, use_averages=False)
    params = thinc_params(models[1])
    opt = AdamW(params, lr=0.02, weight_decay=0.1, eps_mode="hat")

    def step(model):
        pairs = ((node, name) for node in model.walk() for name in node.param_names)
        grads = [node.get_grad(name) for node, name in pairs]
        opt.step(grads)
        for g in grads:
            g.fill(0)

    x, y = make_data()
    for batch, labels in batches(x, y):
        for model in models:
            guess, backprop = model.begin_update(batch)
            backprop(guess - np.eye(2, dtype=np.float32)[labels])
        models[0].finish_update(ours)
        step(models[1])
    for a, b in zip(thinc_params(models[0]), params, strict=True):
        assert_same_bits(a, b)
    assert ours.averages is None


@pytest.mark.parametrize("kind", ["list", "generator", "schedule"])
def test_thinc_schedules_and_lr_scale(thinc, kind):
    from fused_adam.thinc import Adam as ThincAdam

    rates = {
        "list": [0.5, 0.25],
        "generator": (rate for rate in (0.5, 0.25)),
        "schedule": thinc.Schedule("halved", lambda schedule, step, **_: 0.5 ** (step + 1)),
    }
    optimizer = ThincAdam(rates[kind], beta1=0.5, beta2=0.5, eps=0.0, grad_clip=0.0)
    w = np.zeros(1, np.float32)

    def step(**options):
        before = w[0]
        optimizer((1, "w"), w, np.ones(1, np.float32), **options)
        return before - w[0]  # for a gradient that is always 1, this is learn_rate * lr_scale

    assert step() == 0.5
    assert step() == 0.5
    optimizer.step_schedules()
    assert step() == 0.25
    assert step(lr_scale=0.5) == 0.125


def test_thinc_config_and_pickle(thinc):
    from fused_adam.thinc import Adam as ThincAdam

    config = thinc.Config().from_str(
        """
        [optimizer]
        @optimizers = "fused_adam.Adam.v1"
        beta1 = 0.8
        use_averages = false

        [optimizer.learn_rate]
        @schedules = "warmup_linear.v1"
        initial_rate = 0.02
        warmup_steps = 4
        total_steps = 1000
        """
    )
    optimizer = thinc.registry.resolve(config)["optimizer"]
    assert type(optimizer) is ThincAdam
    assert isinstance(optimizer, thinc.Optimizer)  # spaCy's config asks for that

    model = thinc_model(thinc)
    train_thinc(model, optimizer, 2)
    copied_model, copied = pickle.loads(pickle.dumps((model, optimizer)))
    train_thinc(model, optimizer, 2)
    train_thinc(copied_model, copied, 2)
    for a, b in zip(thinc_params(model), thinc_params(copied_model), strict=True):
        assert_same_bits(a, b)


def test_thinc_refuses_without_counting(thinc):
    from fused_adam.thinc import Adam as ThincAdam

    optimizer = ThincAdam(0.1)
    w = np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match="grad"):
        optimizer((1, "W"), w, np.ones((2, 4), np.float32).T)
    assert optimizer.nr_update[1, "W"] == 0
    assert np.all(w == 1)
    empty = np.zeros((0, 2), np.float32)
    assert optimizer((2, "W"), empty, empty) == (empty, empty)


def test_thinc_with_read_only_gradients_and_fortran_order(thinc):
    from fused_adam.thinc import Adam as ThincAdam

    optimizer = ThincAdam(0.1, grad_clip=0.0)
    w, grad = np.ones((2, 3), "f", order="F"), np.ones((2, 3), "f", order="F")
    grad.setflags(write=False)
    with pytest.raises(ValueError, match="gradient is read-only"):
        optimizer((1, "W"), w, grad)
    assert (w == 1).all() and not optimizer.nr_update
    optimizer((1, "W"), w, grad.copy(order="F"))
    assert np.allclose(w, 0.9) and optimizer.nr_update[(1, "W")] == 1  # 0.1 is not a float


@pytest.mark.slow
def test_thinc_with_a_torch_layer(thinc, torch):
    from fused_adam.thinc import Adam as ThincAdam

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thinc's shim calls what newer versions of torch deprecate
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        model = thinc.chain(thinc.PyTorchWrapper(layer), thinc.softmax_activation()).initialize()
        assert train_thinc(model, ThincAdam(0.02), EPOCHS) >= 0.97


# --- scikit-learn ---


@pytest.fixture
def mlp_classifier():
    return pytest.importorskip("sklearn.neural_network").MLPClassifier


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sklearn(mlp_classifier, dtype):
    x, y = make_data(dtype)
    clf = mlp_classifier((32,), random_state=0, batch_size=64)
    clf.partial_fit(x, y, classes=[0, 1])  # makes the arrays, with an epoch of its own Adam
    opt = Adam(clf.coefs_ + clf.intercepts_, lr=0.02)
    clf._optimizer.update_params = lambda params, grads: opt.step(grads)
    for _ in range(EPOCHS):
        clf.partial_fit(x, y)
    assert clf.score(x, y) >= 0.97
    assert clf.coefs_[0].dtype == dtype
    assert opt.state[0]["step"] == EPOCHS * 8

    del clf._optimizer  # a lambda does not pickle
    assert pickle.loads(pickle.dumps(clf)).score(x, y) == clf.score(x, y)


def test_sklearn_agrees_with_its_own_adam(mlp_classifier):
    x, y = make_data(np.float64)
    theirs, ours = (mlp_classifier((32,), random_state=0, batch_size=64, epsilon=1e-3) for _ in range(2))
    theirs.partial_fit(x, y, classes=[0, 1])
    ours.partial_fit(x, y, classes=[0, 1])

    # Its state, taken over after the first epoch.
    own = ours._optimizer
    opt = Adam(ours.coefs_ + ours.intercepts_, lr=own.learning_rate_init, eps=1e-3, eps_mode="hat")
    checkpoint = opt.state_dict()
    for i, (m, v) in enumerate(zip(own.ms, own.vs, strict=True)):
        checkpoint["state"][i] = {"step": own.t, "exp_avg": m, "exp_avg_sq": v}
    opt.load_state_dict(checkpoint)

    own.update_params = lambda params, grads: opt.step(grads)
    for _ in range(10):
        theirs.partial_fit(x, y)
        ours.partial_fit(x, y)
    assert opt.state[0]["step"] == theirs._optimizer.t == 88
    for a, b in zip(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True):
        # The same formula, in other operations: 80 roundings of numbers around 1, which the gradients pass
        # on. They differ by 1e-15; with eps in the other place, by 0.03.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)


# --- PyTorch ---


def torch_model(torch):
    torch.manual_seed(0)
    # Every array has a multiple of 16 elements, see test_torch.py.
    return torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))


def train_torch(torch, model, step, epochs):
    x, y = map(torch.from_numpy, make_data())
    for _ in range(epochs):
        for batch, labels in batches(x, y):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), labels).backward()
            step()
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def numpy_views(model):
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def stepper(opt, model):
    return lambda: opt.step({name: p.grad.numpy() for name, p in model.named_parameters()})


def test_torch_module(torch):
    model = torch_model(torch)
    opt = Adam(numpy_views(model), lr=0.02)
    assert train_torch(torch, model, stepper(opt, model), EPOCHS) >= 0.97


@pytest.mark.slow
def test_torch_module_has_the_bits_of_torch(torch):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the promise is for AVX2 and AVX512, see test_torch.py")
    ours, theirs = torch_model(torch), torch_model(torch)
    opt = AdamW(numpy_views(ours), lr=0.02)
    torch_opt = torch.optim.AdamW(theirs.parameters(), lr=0.02, fused=True)
    train_torch(torch, ours, stepper(opt, ours), 5)
    train_torch(torch, theirs, torch_opt.step, 5)

    # And on, from PyTorch's checkpoint, the module's too: its load_state_dict copies into the same memory.
    continued = torch_model(torch)
    opt2 = AdamW(numpy_views(continued))
    continued.load_state_dict(theirs.state_dict())
    opt2.load_state_dict(torch_opt.state_dict())
    train_torch(torch, continued, stepper(opt2, continued), 5)
    train_torch(torch, ours, stepper(opt, ours), 5)
    train_torch(torch, theirs, torch_opt.step, 5)
    for name, expected in numpy_views(theirs).items():
        assert_same_bits(numpy_views(ours)[name], expected)
        assert_same_bits(numpy_views(continued)[name], expected)


# --- memory-mapped files ---


def linear_problem():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((256, 8)).astype(np.float32)
    return x, x @ np.arange(8, dtype=np.float32) + 1


def linear_grads(params):
    x, y = linear_problem()
    error = (x @ params["w"] + params["b"] - y) / len(y)
    return {"w": x.T @ error, "b": np.asarray(error.sum())}


SHAPES = {"w": (8,), "b": ()}


def open_maps(folder, names, mode):
    return {
        name: np.memmap(folder / f"{name}.bin", np.float32, mode, shape=SHAPES[name[0]]) for name in names
    }


def test_parameters_on_disk(tmp_path):
    params = open_maps(tmp_path, SHAPES, "w+")
    opt = Adam(params, lr=0.1)
    for _ in range(500):
        opt.step(linear_grads(params))
    for param in params.values():
        param.flush()
    assert type(opt.param_groups[0]["params"][0]) is np.memmap
    assert opt.state["w"]["step"] == 500

    stored = open_maps(tmp_path, SHAPES, "r")
    np.testing.assert_allclose(stored["w"], np.arange(8), atol=0.01)
    with pytest.raises(ValueError, match="read-only"):
        Adam(stored)

    in_memory = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    opt = Adam(in_memory, lr=0.1)
    for _ in range(500):
        opt.step(linear_grads(in_memory))
    for name, param in in_memory.items():
        assert_same_bits(np.asarray(stored[name]), param)


def test_moments_on_disk(tmp_path):
    names = [*SHAPES, *(f"{name}_{kind}" for name in SHAPES for kind in ("exp_avg", "exp_avg_sq"))]

    def train(mode, steps):
        arrays = open_maps(tmp_path, names, mode)
        for step in steps:
            for name, grad in linear_grads(arrays).items():
                moments = arrays[f"{name}_exp_avg"], arrays[f"{name}_exp_avg_sq"]
                adam_step(arrays[name], grad, *moments, step=step, lr=0.1)
        for array in arrays.values():
            array.flush()

    train("w+", range(1, 101))
    train("r+", range(101, 201))  # nothing but the files and the count is left of the first half

    params = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    opt = Adam(params, lr=0.1)
    for _ in range(200):
        opt.step(linear_grads(params))
    stored = open_maps(tmp_path, names, "r")
    for name, param in params.items():
        assert_same_bits(np.asarray(stored[name]), param)
        assert_same_bits(np.asarray(stored[f"{name}_exp_avg"]), opt.state[name]["exp_avg"])
        assert_same_bits(np.asarray(stored[f"{name}_exp_avg_sq"]), opt.state[name]["exp_avg_sq"])


# --- type checkers ---


@pytest.mark.slow
def test_mypy_accepts_a_typed_example(tmp_path):
    pytest.importorskip("mypy")
    example = Path(__file__).with_name("typed_example.py")
    package = Path(fused_adam.__file__).parent
    environment = dict(os.environ)
    if str(package.parent) not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        environment["MYPYPATH"] = str(package.parent)  # mypy looks by itself in those only
    settings = [
        "--strict",
        "--config-file=",
        f"--cache-dir={tmp_path}",
        "--follow-imports=silent",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *settings, str(example)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_typed_example_runs(tmp_path):
    example = runpy.run_path(str(Path(__file__).with_name("typed_example.py")))
    example["main"](tmp_path)
