"""What Hypothesis does: the same in every run, so that what fails fails again, and what passes was no luck.

`--hypothesis-profile=search` looks for other examples each time, and for more of them.
"""

from hypothesis import settings

settings.register_profile("same", deadline=None, derandomize=True, database=None, max_examples=100)
settings.register_profile("search", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("same")
