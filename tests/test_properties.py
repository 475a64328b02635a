"""What holds for all options, values, sizes and step counts. Hypothesis looks for a counterexample."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from cases import (
    DTYPES,
    OPTION_TABLE,
    STREAMS,
    Arrays,
    all_isas,
    assert_same_arrays,
    assert_same_bits,
    awkward_values,
    without_conflicts,
)
from fused_adam import Adam, _core, adam_step

thorough = settings(max_examples=3 * settings.default.max_examples)

dtypes = st.sampled_from(DTYPES)
threads = st.sampled_from([1, 2, 7])
not_negative = st.floats(0, allow_infinity=False) | st.sampled_from([0.0, 1e-8, 1e-3, 0.01, 1.0])
betas = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.999])
kinds = {
    "number": not_negative,
    "number or function": not_negative,
    "betas": st.tuples(betas, betas),
    "flag": st.booleans(),
    "fraction or None": st.none() | betas,
    "number or None": st.none() | not_negative,
    "eps mode": st.sampled_from(["outside", "hat", "root"]),
    "seed": st.integers(0, 2**63 - 1),
    "state dtype": st.none(),  # others: test_stored_moments.py
}
options = st.fixed_dictionaries({option.name: kinds[option.kind] for option in OPTION_TABLE}).map(
    without_conflicts
)
step_numbers = st.integers(1, 100) | st.integers(1, 2**63 - 1)


@st.composite
def matrices(draw, dtype, rows, columns):
    """Ordinary numbers, numbers of any bits, awkward ones, each about a third; and a few that are looked for.

    Drawn by a seed: to draw each of them alone takes most of the time of a test, and minutes where it fails.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    shape = (rows, columns)
    ordinary = rng.uniform(-4, 4, shape).astype(dtype)
    any_bits = rng.integers(0, np.iinfo(bits).max, shape, bits, endpoint=True).view(dtype)
    awkward = rng.choice(awkward_values(dtype), shape)
    matrix = np.choose(rng.integers(0, 3, shape), [ordinary, any_bits, awkward])
    if matrix.size:
        places = st.integers(0, matrix.size - 1)
        looked_for = st.dictionaries(places, st.floats(width=8 * bits.itemsize), max_size=6)
        for place, value in draw(looked_for).items():
            matrix.flat[place] = value
    return matrix


@st.composite
def streams(draw, max_size=40):
    """The arrays of a step."""
    return Arrays(*draw(matrices(draw(dtypes), len(Arrays._fields), draw(st.integers(0, max_size)))))


@thorough
@given(streams(), options, step_numbers)
def test_every_kernel_equals_the_reference(arrays, options, step):
    expected = reference.adam(*arrays, step=step, **options)
    for isa in all_isas():
        result = arrays.copy()
        result.step(options, step, isa)
        assert_same_arrays(result, expected, isa)


@st.composite
def trainings(draw, max_size=40, steps=4):
    """A parameter and its gradient in each step, which may be None."""
    param, *grads = draw(matrices(draw(dtypes), steps + 1, draw(st.integers(0, max_size))))
    missing = draw(st.sets(st.integers(0, steps - 1)))
    return param, [None if i in missing else grad for i, grad in enumerate(grads)]


def train(optimizer, grads):
    for grad in grads:
        optimizer.step([grad])


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for key in actual:
        assert_same_bits(actual[key], expected[key], key)


@thorough
@given(trainings(), options, st.lists(st.integers(0, 40)), threads)
def test_pieces_train_as_the_whole(training, options, cuts, threads):
    param, grads = training
    cuts = sorted(min(cut, param.size) for cut in cuts)
    whole = [param.copy()]
    pieces = np.split(param.copy(), cuts)
    train(Adam(whole, **options, num_threads=1), grads)
    optimizer = Adam(pieces, **options, num_threads=threads)
    for grad in grads:
        optimizer.step([None] * len(pieces) if grad is None else np.split(grad, cuts))
    assert_same_bits(np.concatenate(pieces), whole[0])


@thorough
@given(trainings(), options, st.integers(0, 4), st.integers(0, 4))
def test_save_and_resume_anywhere(training, options, first, second):
    """Two interruptions; each time a new optimizer goes on with what the last one saved."""
    param, grads = training
    first, second = sorted((first, second))
    uninterrupted, resumed = [param.copy()], [param.copy()]
    expected = Adam(uninterrupted, **options)
    train(expected, grads)

    optimizer = Adam(resumed, **options)
    train(optimizer, grads[:first])
    for part in (grads[first:second], grads[second:]):
        saved = optimizer.state_dict()
        resumed = [resumed[0].copy()]
        optimizer = Adam(resumed)
        optimizer.load_state_dict(saved)
        train(optimizer, part)
    assert_same_bits(resumed[0], uninterrupted[0])
    assert_same_state(optimizer.state[0], expected.state[0])


@thorough
@given(trainings(), options)
def test_the_class_is_the_function(training, options):
    """Adam keeps moments and counts; adam_step leaves both to its caller."""
    param, grads = training
    trained, stepped = [param.copy()], param.copy()
    optimizer = Adam(trained, **options)
    train(optimizer, grads)

    state = {stream.name: np.zeros_like(param) for stream in STREAMS if stream.ours}
    for stream in STREAMS:
        if stream.copy_of_param:
            state[stream.name][...] = param
    step = 0
    for grad in grads:
        if grad is not None:
            step += not adam_step(stepped, grad, step=step + 1, **state, **options).skipped
    assert_same_bits(trained[0], stepped)
    wanted = _core.streams_of(options)
    for stream in STREAMS:
        begins = stream.copy_of_param and step == 0
        if stream.ours and (stream.name not in wanted or begins or stream.coded_only):
            del state[stream.name]
    assert_same_state(optimizer.state[0], {"step": step, **state})


@thorough
@given(streams(), options, step_numbers)
def test_elements_do_not_know_each_other(arrays, options, step):
    """In another order they are updated to the same values: all lanes of all vectors are alike. But for the
    norm, whose last bits depend on the order.
    """
    options = {**options, "max_norm": None}
    order = np.random.default_rng(0).permutation(arrays.param.size)
    expected = arrays.copy()
    expected.step(options, step)
    shuffled = arrays.map(lambda array: array[order])
    shuffled.step(options, step)
    assert_same_arrays(shuffled, expected.map(lambda array: array[order]))
