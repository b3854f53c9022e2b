"""Tests run on CPU unless told otherwise; property tests have no deadline, since the first example compiles."""

import gc
import os

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # a CUDA plugin without a driver is no error here
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is tested is compiled here, and leaves no trace
# Most of the tests' time is compiling, a third of which is spent on making tiny programs fast.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
settings.register_profile("jaxkv", deadline=None, print_blob=True, max_examples=50)
settings.load_profile("jaxkv")


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs(request):
    """Each compiled program maps memory, of which Linux gives a process 65,530 pieces: past that, XLA crashes."""
    yield
    import jax

    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()
    gc.collect()
