"""Arrays that are taken, and arrays that are refused, in whatever role. A refused call has done nothing."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from cases import EVERYTHING, STREAMS
from fused_adam import Adam, adam_step
from snapshots import (
    ROLES,
    Scene,
    Snapshot,
    adam_step_arrays,
    adam_step_refused,
    assert_same_bits,
    assert_same_state,
    like,
    random_like,
    refused,
)

try:
    import torch
except ImportError:
    torch = None

SWAPPED = ">" if sys.byteorder == "little" else "<"


# --- Defects of one array: the table, then the calls that must refuse them --------------------------


class Defect(NamedTuple):
    id: str
    make: Callable[[np.ndarray], Any]  # from a correct (3, 4) float32 array in C order
    error: type[Exception]
    message: str  # after the name of the array


class OwnArray(np.ndarray):
    pass


def as_torch(array: np.ndarray) -> Any:
    if torch is None:
        pytest.skip("torch is not installed")
    return torch.from_numpy(like(array))


def with_other_strides(array: np.ndarray) -> np.ndarray:
    rows, columns = array.shape
    return np.ones((columns, rows + 1), array.dtype)[:, :rows].T


def unaligned(array: np.ndarray) -> np.ndarray:
    return np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)


def broadcast(array: np.ndarray) -> np.ndarray:
    # Writeable, unlike the result of np.broadcast_to: the strides have to be what is noticed.
    return np.lib.stride_tricks.as_strided(like(array), strides=(0, array.itemsize))


def read_only(array: np.ndarray) -> np.ndarray:
    array = like(array)
    array.setflags(write=False)
    return array


def matrix(array: np.ndarray) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.ones(array.shape, array.dtype).view(np.matrix)


NOT_AN_ARRAY = "is .*{}, expected .*numpy.ndarray"
NO_FLOAT = "has dtype {}, expected float32, float64, float16 or bfloat16. Convert it once"
SHAPE = r"\(3, 4\)"
STRIDED = r"is a strided view \(shape \(3, 4\), strides \(.*np.ascontiguousarray"
SUBCLASS = "is .*{}, a subclass of ndarray.*np.asarray"

DEFECTS = [
    # As parameters, lists are containers: what is in them is what is wrong.
    Defect("list", lambda a: like(a).tolist(), TypeError, NOT_AN_ARRAY.format("(list|float)")),
    Defect("str", lambda a: "array", TypeError, NOT_AN_ARRAY.format("str")),
    Defect("number", lambda a: 1.0, TypeError, NOT_AN_ARRAY.format("float")),
    Defect("numpy-scalar", lambda a: np.float32(1), TypeError, NOT_AN_ARRAY.format("numpy.float32")),
    Defect("torch", as_torch, TypeError, NOT_AN_ARRAY.format("torch.Tensor") + r".*detach\(\).numpy\(\)"),
    Defect("memoryview", lambda a: memoryview(like(a)), TypeError, NOT_AN_ARRAY.format("memoryview")),
    Defect("int", lambda a: like(a, np.int64), TypeError, NO_FLOAT.format("int64")),
    Defect("bool", lambda a: like(a, np.bool_), TypeError, NO_FLOAT.format("bool")),
    Defect("complex", lambda a: like(a, np.complex64), TypeError, NO_FLOAT.format("complex64")),
    # Also where it is no longer than a double.
    Defect("longdouble", lambda a: like(a, np.longdouble), TypeError, NO_FLOAT.format(r"\w*float\w*")),
    Defect("object", lambda a: like(a, object), TypeError, NO_FLOAT.format("object")),
    Defect("structured", lambda a: like(a).view([("x", "f4")]), TypeError, r"has dtype \[\('x', '.f4'\)\], "),
    Defect("byte-swapped", lambda a: like(a, SWAPPED + "f4"), ValueError, "has byte-swapped .*newbyteorder"),
    Defect("step-2", lambda a: np.ones((6, 4), a.dtype)[::2], ValueError, STRIDED),
    Defect("every-other-column", lambda a: np.ones((3, 8), a.dtype)[:, ::2], ValueError, STRIDED),
    Defect("transposed-slice", with_other_strides, ValueError, STRIDED),
    Defect("broadcast", broadcast, ValueError, STRIDED),
    Defect("backwards", lambda a: like(a)[::-1], ValueError, STRIDED),
    Defect("unaligned", unaligned, ValueError, r"is not aligned.*a\.copy\(\)"),
    Defect(
        "masked", lambda a: np.ma.masked_less(like(a), 0), ValueError, r"is a masked array.*a\.filled\(0\)"
    ),
    Defect("matrix", matrix, TypeError, SUBCLASS.format("numpy.matrix")),
    Defect("own-subclass", lambda a: like(a).view(OwnArray), TypeError, SUBCLASS.format("OwnArray")),
]
# Of arrays that a call writes.
READ_ONLY = Defect("read-only", read_only, ValueError, "is read-only")
NONE = Defect("None", lambda a: None, TypeError, NOT_AN_ARRAY.format("NoneType"))
# Of arrays that have to be like a parameter.
MISMATCHES = [
    Defect("float64", lambda a: like(a, np.float64), TypeError, "has dtype float64, but .* has float32"),
    Defect("fortran", lambda a: like(a, order="F"), ValueError, "is in Fortran order, but .* is in C order"),
    *(
        Defect(
            id,
            lambda a, shape=shape: np.ones(shape, a.dtype),
            ValueError,
            f"has shape {re.escape(str(shape))}, but .* has {SHAPE}",
        )
        for id, shape in {
            "same-size": (2, 6),
            "transposed": (4, 3),
            "flat": (12,),
            "one-more-axis": (1, 3, 4),
            "longer": (3, 5),
            "shorter": (3, 3),
            "empty": (0, 4),
        }.items()
    ),
]


def defects(*tables: Any) -> Any:
    rows = [row for table in tables for row in (table if isinstance(table, list) else [table])]
    return pytest.mark.parametrize("defect", [pytest.param(row, id=row.id) for row in rows])


def at(place: str, defect: Defect) -> str:
    """A regex: the message begins with the place (or a place inside of it) and names the defect."""
    return rf"^{re.escape(place)}(\[\d\])* {defect.message}"


@defects(DEFECTS, NONE, READ_ONLY)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}], ids=["", "amsgrad"])
def test_refuses_param_at_construction(defect: Defect, options: dict[str, Any]) -> None:
    good = np.ones((3, 4), np.float32)
    params = {"good": good, "w": [good.copy(), defect.make(good)]}
    with refused(defect.error, at("params['w'][1]", defect), None, params):
        Adam(params, **options)
    with refused(defect.error, at("param_groups[1]['params']['w'][1]", defect), None, params):
        Adam([{"params": good.copy()}, {"params": params}], **options)


@defects(DEFECTS, NONE, READ_ONLY)
def test_refuses_lone_param(defect: Defect) -> None:
    bad = defect.make(np.ones((3, 4), np.float32))
    with refused(defect.error, at("params", defect), None, [bad]):
        Adam(bad)


@defects(DEFECTS, NONE, READ_ONLY)
@pytest.mark.parametrize("had_groups", [False, True], ids=["from-params", "from-groups"])
def test_refuses_param_of_added_group(defect: Defect, had_groups: bool) -> None:
    scene = Scene(grouped=had_groups)
    index = len(scene.opt.param_groups)
    group = {"params": [np.ones(3), defect.make(scene.params["w"])]}
    message = at(f"param_groups[{index}]['params'][1]", defect)
    with refused(defect.error, message, scene.opt, group):
        scene.opt.add_param_group(group)
    scene.goes_on()


@defects(DEFECTS, MISMATCHES)
@pytest.mark.parametrize("grouped", [False, True], ids=["", "groups"])
def test_refuses_grad(defect: Defect, grouped: bool) -> None:
    scene = Scene(grouped)
    tree = random_like(scene.params, 5)
    tree["w"] = defect.make(tree["w"])
    place = "grad for param_groups[1]['params']" if grouped else "grad for params['w']"
    with refused(defect.error, at(place, defect), scene.opt, tree):
        scene.opt.step(scene.mirror(tree))
    scene.goes_on()


@defects(DEFECTS, MISMATCHES)
def test_refuses_grad_buffer(defect: Defect) -> None:
    scene = Scene()
    buffers = scene.opt.grads
    good, buffers["w"] = buffers["w"], defect.make(buffers["w"])
    buffers["b"][0][...] = 1  # what zero_grad would overwrite before it comes to w
    for call in (scene.opt.step, scene.opt.zero_grad):
        with refused(defect.error, at("grad for params['w']", defect), scene.opt, buffers):
            call()
    buffers["w"] = good
    scene.opt.zero_grad()
    assert not buffers["b"][0].any()
    scene.goes_on()


def test_zero_grad_refuses_read_only_buffer() -> None:
    scene = Scene()
    buffers = scene.opt.grads
    buffers["b"][0][...] = 1
    buffers["w"].setflags(write=False)
    with refused(ValueError, at("grad for params['w']", READ_ONLY), scene.opt, buffers):
        scene.opt.zero_grad()
    scene.opt.step()  # which only reads it


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("one", (), r"grad for params\['one'\] has shape \(\), but params\['one'\] has \(1,\)\."),
        ("scalar", (1,), r"grad for params\['scalar'\] has shape \(1,\), but params\['scalar'\] has \(\)\."),
    ],
)
def test_refuses_0d_for_1d(name: str, shape: tuple[int, ...], message: str) -> None:
    scene = Scene()
    tree = scene.grads()
    tree[name] = np.ones(shape, np.float32)
    with refused(ValueError, message, scene.opt, tree):
        scene.opt.step(tree)
    scene.goes_on()


def test_refuses_c_order_grad_for_fortran_param() -> None:
    scene = Scene()
    tree = scene.grads()
    tree["b"][1] = np.ascontiguousarray(tree["b"][1])
    message = (
        r"grad for params\['b'\]\[1\] is in C order, but params\['b'\]\[1\] is in Fortran order.*asfortran"
    )
    with refused(ValueError, message, scene.opt, tree):
        scene.opt.step(tree)
    scene.goes_on()


@defects(DEFECTS, MISMATCHES)
@pytest.mark.parametrize("role", ROLES)
def test_adam_step_refuses(defect: Defect, role: str) -> None:
    arrays = adam_step_arrays()
    arrays[role] = defect.make(arrays[role])
    if role == "param" and defect in MISMATCHES:  # it is the measure: the next one does not fit
        adam_step_refused(arrays, defect.error, "^grad (has|is in) .*, but param (has|is in) ")
    else:
        adam_step_refused(arrays, defect.error, at(role, defect))


@pytest.mark.parametrize("role", [role for role in ROLES if role != "grad"])
def test_adam_step_refuses_read_only(role: str) -> None:
    arrays = adam_step_arrays()
    arrays[role].setflags(write=False)
    adam_step_refused(arrays, ValueError, at(role, READ_ONLY))


@pytest.mark.parametrize("role", ROLES)
def test_adam_step_refuses_none(role: str) -> None:
    arrays = {**adam_step_arrays(), role: None}
    option = next(stream.option for stream in STREAMS if stream.name == role)
    if STREAMS[list(arrays).index(role)].coded_only:
        adam_step(**arrays, step=3, **EVERYTHING)  # no param of 32 bits needs it
    elif option is not None:
        adam_step_refused(arrays, ValueError, f"^{option} needs {role}")
    else:
        adam_step_refused(arrays, TypeError, at(role, NONE))


# --- Arrays that change between steps ---------------------------------------------------------------


def assign(array: np.ndarray, name: str, value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy would rather see it in no program
        setattr(array, name, value)


def mend(array: np.ndarray, saved: np.ndarray) -> None:
    array.setflags(write=True)
    assign(array, "dtype", saved.dtype)
    array.resize(saved.shape, refcheck=False)
    array[...] = saved


TAMPERING: list[tuple[str, Callable[[np.ndarray], Any], str]] = [
    (
        "grown",
        lambda a: a.resize((3, 5), refcheck=False),
        "has shape (3, 5), but it had (3, 4)",
    ),
    (
        "moved",
        lambda a: a.resize(9999, refcheck=False),
        "has shape (9999,), but it had (3, 4)",
    ),
    (
        "shrunk",
        lambda a: a.resize((2, 4), refcheck=False),
        "has shape (2, 4), but it had (3, 4)",
    ),
    (
        "emptied",
        lambda a: a.resize(0, refcheck=False),
        "has shape (0,), but it had (3, 4)",
    ),
    (
        "reshaped",
        lambda a: assign(a, "shape", (4, 3)),
        "has shape (4, 3), but it had (3, 4)",
    ),
    (
        "flattened",
        lambda a: assign(a, "shape", 12),
        "has shape (12,), but it had (3, 4)",
    ),
    (
        "float64",
        lambda a: assign(a, "dtype", "f8"),
        "has dtype float64, but it had float32",
    ),
    ("int32", lambda a: assign(a, "dtype", "i4"), "has dtype int32, expected"),
    ("swapped", lambda a: assign(a, "dtype", SWAPPED + "f4"), "has byte-swapped elements"),
    ("read-only", lambda a: a.setflags(write=False), "is read-only"),
]


@pytest.mark.parametrize(
    ("tamper", "message"), [pytest.param(tamper, message, id=id) for id, tamper, message in TAMPERING]
)
@pytest.mark.parametrize("grad", ["as-before", "as-now"])
def test_refuses_param_changed_between_steps(
    tamper: Callable[[np.ndarray], Any], message: str, grad: str
) -> None:
    scene = Scene()
    w, saved = scene.params["w"], scene.params["w"].copy()
    grads = scene.grads()
    name = "params['w']"
    error = TypeError if message.startswith("has dtype") else ValueError
    message = "^" + re.escape(f"{name} {message.format(name)}")
    with refused(error, message, scene.opt, grads, undo=lambda: mend(w, saved)):
        tamper(w)
        as_it_is_now = Snapshot(None, scene.params)
        try:
            scene.opt.step(grads if grad == "as-before" else {**grads, "w": like(w)})
        finally:
            as_it_is_now.assert_unchanged()
    scene.goes_on()


@pytest.mark.parametrize("tamper", [pytest.param(tamper, id=id) for id, tamper, _ in TAMPERING])
def test_param_changed_between_steps_may_be_left_out(tamper: Callable[[np.ndarray], Any]) -> None:
    """Nobody writes it: freezing a layer by making its arrays read-only is a thing people do."""
    scene = Scene()
    w, saved = scene.params["w"], scene.params["w"].copy()
    grads = {**scene.grads(), "w": None}
    tamper(w)
    before = Snapshot(None, w)
    scene.opt.step(grads)
    before.assert_unchanged()
    mend(w, saved)
    scene.twin.step(grads)
    scene.goes_on()


def test_refuses_changed_grad_buffer() -> None:
    scene = Scene()
    buffers = scene.opt.grads
    assign(buffers["w"], "shape", (4, 3))
    for call in (scene.opt.step, scene.opt.zero_grad):
        with refused(ValueError, r"^grad for params\['w'\] has shape \(4, 3\), but", scene.opt, buffers):
            call()
    scene.goes_on()


# --- What is taken ----------------------------------------------------------------------------------


def in_c_order(params: list[np.ndarray], grads: list[Any], **options: Any) -> tuple[list[np.ndarray], Adam]:
    """The same training on plain one-dimensional arrays."""
    flat = [np.array(param).ravel() for param in params]
    opt = Adam(flat, **options)
    for _ in range(2):
        opt.step([np.array(grad).ravel() for grad in grads])
    return [a.reshape(param.shape) for a, param in zip(flat, params, strict=True)], opt


def check_taken(params: list[np.ndarray], grads: list[np.ndarray]) -> None:
    expected, plain = in_c_order(params, grads, amsgrad=True, weight_decay=0.1)
    before = Snapshot(None, grads)
    opt = Adam(params, amsgrad=True, weight_decay=0.1)
    for _ in range(2):
        opt.step(grads)
    before.assert_unchanged()
    assert_same_bits(params, expected)
    for index, entry in opt.state.items():
        assert entry["step"] == 2
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert entry[name].shape == params[index].shape
            for order in ("c_contiguous", "f_contiguous"):
                assert getattr(entry[name].flags, order) == getattr(params[index].flags, order)
            assert_same_bits(np.array(entry[name]).ravel(), plain.state[index][name])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (3, 5), (5, 3), (2, 3, 4), (1, 1, 1, 1), (0,), (0, 3), (3, 0, 2)]
)
def test_takes_shape_and_order(dtype: Any, order: str, shape: tuple[int, ...]) -> None:
    empty = np.empty(shape, dtype, order=order)
    check_taken([random_like(empty, 1)], [random_like(empty, 2)])


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4), (4, 1), (1, 4, 1), (0, 3)])
def test_takes_either_order_where_they_are_the_same(shape: tuple[int, ...]) -> None:
    c, f = (random_like(np.empty(shape, order=order), seed) for order, seed in (("C", 1), ("F", 2)))
    check_taken([c.copy(order="C")], [f])
    check_taken([f.copy(order="F")], [c])


def test_takes_mixed_sizes_and_dtypes() -> None:
    empty = [
        np.empty(0, np.float32),
        np.empty(3),
        np.empty((0, 3)),
        np.empty((), np.float32),
        np.empty((2, 2)),
        np.empty(0),
    ]
    check_taken(random_like(empty, 1), random_like(empty, 2))


def test_takes_only_empty_arrays() -> None:
    opt = Adam([np.empty(0), np.empty((2, 0), np.float32)])
    opt.step([np.empty(0), np.empty((2, 0), np.float32)])
    assert [entry["step"] for entry in opt.state.values()] == [1, 1]


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_takes_any_multiple_of_the_element(offset: int, dtype: Any) -> None:
    memory, grads = (random_like(np.empty(40, dtype), seed) for seed in (1, 2))
    inside = np.s_[offset : offset + 30]
    around = np.delete(memory, inside)
    check_taken([memory[inside]], [grads[2 * offset : 2 * offset + 30]])
    assert_same_bits(np.delete(memory, inside), around)


NATIVE = "<" if sys.byteorder == "little" else ">"


@pytest.mark.parametrize("byteorder", ["=", NATIVE])
def test_takes_native_order_by_any_name(byteorder: str) -> None:
    dtype = np.dtype(np.float32).newbyteorder(byteorder)
    assert dtype.isnative
    check_taken([np.ones(5, dtype)], [np.ones(5, dtype)])


def test_takes_memmap(tmp_path: Any) -> None:
    expected = random_like(np.empty((4, 5), np.float32), 1)
    files = []
    for name, mode in (("param", "r+"), ("grad", "r")):
        expected.tofile(tmp_path / name)
        files.append(np.memmap(tmp_path / name, np.float32, mode, shape=(4, 5)))
    param, grad = files
    opt, twin = Adam(param), Adam(expected)
    opt.step(grad)
    twin.step(grad)
    param.flush()
    assert_same_bits(np.fromfile(tmp_path / "param", np.float32), expected.ravel())
    read_only_param = np.memmap(tmp_path / "param", np.float32, "r", shape=(4, 5))
    with refused(ValueError, "^params is read-only", None, [np.asarray(read_only_param)]):
        Adam(read_only_param)


def test_takes_views_of_memmap(tmp_path: Any) -> None:
    """Of a subclass too; and where the base of a view is another view, whose first element is its last."""
    np.ones(12).tofile(tmp_path / "param")
    memory = np.memmap(tmp_path / "param", float, "r+")
    for view in (np.asarray(memory[::-1])[::-1], memory.view(type("Named", (np.memmap,), {}))):
        assert view.flags.c_contiguous and not view.base.flags.owndata
        Adam(view).step(np.ones(12))
    assert np.allclose(memory, 0.998)


def test_takes_one_grad_for_many_params() -> None:
    empty = np.empty((3, 4))
    grad = random_like(empty, 3)
    params = [random_like(empty, seed) for seed in (1, 2)]
    check_taken(params, [grad, grad])
    check_taken([param.copy() for param in params], [grad, grad[...]])


def test_takes_grads_that_overlap_each_other() -> None:
    memory = random_like(np.empty(6), 3)
    check_taken([np.ones(5), np.ones(5)], [memory[:5], memory[1:]])


def test_takes_read_only_grad() -> None:
    check_taken([np.ones((3, 4), np.float32)], [read_only(np.ones((3, 4), np.float32))])
    grad = np.frombuffer(np.arange(1.0, 5.0).tobytes())
    assert not grad.flags.writeable
    check_taken([np.ones(4)], [grad])


def test_takes_grad_in_memory_of_another_optimizer() -> None:
    """What one optimizer writes is no concern of another."""
    a, b = np.ones(3), np.ones(3)
    Adam(b)
    check_taken([a], [b])


@pytest.mark.parametrize(
    "option",
    [
        {"lr": 0},
        {"lr": 1},
        {"lr": np.float32(0.1)},
        {"lr": np.array(0.1)},
        {"betas": [0.9, 0.99]},
        {"betas": (0, 0)},
        {"eps": 0.0},
        {"weight_decay": np.float64(0.1)},
    ],
    ids=repr,
)
def test_takes_number_of_any_kind(option: dict[str, Any]) -> None:
    plain = {
        key: tuple(map(float, value)) if key == "betas" else float(value) for key, value in option.items()
    }
    grads, params, expected = random_like(np.empty(5), 1), np.ones(5), np.ones(5)
    opt, twin = Adam(params, **option), Adam(expected, **plain)
    opt.step(grads)
    twin.step(grads)
    assert_same_bits(params, expected)
    assert_same_state(opt, twin)


# --- Bases that are resized under their views -------------------------------------------------------


def resized(view: np.ndarray, size: int) -> None:
    """Give the base of a view another size; NumPy does not know of the view."""
    assert isinstance(view.base, np.ndarray)
    view.base.resize(size, refcheck=False)


@pytest.mark.parametrize("size", [1_000_000, 5, 19], ids=["grown", "shrunk", "shrunk by one element"])
@pytest.mark.parametrize("what", ["param", "grad"])
def test_refuses_views_whose_base_was_resized(what: str, size: int) -> None:
    """Their memory is gone, or ends too early."""
    w, grads = np.ones(100)[10:20], {"w": np.ones(100)[10:20], "b": np.ones(3)}
    other = np.ones(3)
    opt = Adam({"b": other, "w": w})
    name, view = ("params['w']", w) if what == "param" else ("grad for params['w']", grads["w"])
    resized(view, size)
    message = "^" + re.escape(f"{name} is a view of an array that was resized")
    with pytest.raises(ValueError, match=message):
        opt.step(grads)
    assert other.tolist() == [1, 1, 1]
    assert [entry["step"] for entry in opt.state.values()] == [0, 0]
    grads["w"] = np.ones(10)
    if what == "grad":
        opt.step(grads)


def test_views_of_a_base_that_was_resized_in_other_ways_are_taken() -> None:
    base = np.ones((10, 10))
    view = base[2]
    opt = Adam(view)
    assign(base, "shape", (100,))
    opt.step(np.ones(10))
    assert np.allclose(view, 0.999)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@pytest.mark.parametrize("size", [3, 100_000])
def test_memory_of_the_optimizer_cannot_be_resized(name: str, size: int) -> None:
    opt = Adam(np.ones(size), amsgrad=True)
    for array in (opt.state[0][name], opt.grads):
        while isinstance(array, np.ndarray):
            with pytest.raises(ValueError, match=r"cannot resize this array|cannot reshape|does not own"):
                array.resize(7, refcheck=False)
            array = array.base


@pytest.mark.parametrize("size", [1_000_000, 5], ids=["grown", "shrunk"])
@pytest.mark.parametrize(
    "view",
    [lambda a: np.asarray(np.asmatrix(a)[:, :10]).reshape(10), lambda a: np.frombuffer(memoryview(a))[:10]],
    ids=["through a matrix", "through a memoryview"],
)
def test_refuses_views_of_views_whose_owner_was_resized(view: Callable[..., np.ndarray], size: int) -> None:
    """NumPy shortens a chain of views only as far as their type is the same."""
    owner = np.ones(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # of np.matrix
        param = view(owner)
    opt = Adam(param)
    opt.step(np.ones(10))
    owner.resize(size, refcheck=False)
    with pytest.raises(ValueError, match=r"^params is a view of an array that was resized"):
        opt.step(np.ones(10))
    assert opt.state[0]["step"] == 1
