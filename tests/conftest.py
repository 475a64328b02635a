"""What holds for all tests.

Hypothesis draws the same examples in every run, so that what fails fails again, and what passes was no luck.
`--hypothesis-profile=search` draws other ones each time, and more of them: every week (.github/workflows),
and by hand, as CONTRIBUTING says. It is no gate: what it finds is seldom the fault of the change at hand.
"""

import gc

from hypothesis import settings

settings.register_profile("same", deadline=None, derandomize=True, database=None, max_examples=100)
settings.register_profile("search", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("same")


def pytest_collection_finish() -> None:
    """Garbage collections need not look through thousands of collected tests, here and in forked children."""
    gc.collect()
    gc.freeze()
