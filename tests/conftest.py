"""Tests run on CPU unless told otherwise; property tests have no deadline, since the first example compiles."""

import os

from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # a CUDA plugin without a driver is no error here
settings.register_profile("jaxkv", deadline=None, print_blob=True, max_examples=50)
settings.load_profile("jaxkv")
