"""Tests run on CPU unless told otherwise; property tests have no deadline, since the first example compiles."""

import gc
import os
import tempfile
from importlib.metadata import version

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # a CUDA plugin without a driver is no error here
if "PYTEST_XDIST_WORKER" not in os.environ:  # what is tested is compiled by this run: once, whoever needs it
    programs = tempfile.TemporaryDirectory(prefix="jaxkv-programs-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
# Most of the tests' time is compiling, much of it making tiny programs fast.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jaxlib").startswith("0.10."):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")  # halves what is left; later versions have no such choice
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])
settings.register_profile("jaxkv", deadline=None, print_blob=True, max_examples=30)
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
