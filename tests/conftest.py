"""Tests run on CPU unless told otherwise; property tests have no deadline, since the first example compiles."""

import os

from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
settings.register_profile("jaxkv", deadline=None, print_blob=True, max_examples=50)
settings.load_profile("jaxkv")
