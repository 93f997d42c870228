"""Strict arithmetic and run-time shape checks for every test."""

import gc
import os
from importlib.metadata import version

# The suite is mostly compilation. In one piece instead of up to 32 a network's gradient takes 55 ms for 95.
if "XLA_FLAGS" not in os.environ:
    quick = "--xla_cpu_parallel_codegen_split_count=1 --xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # its older loops compile in half the time; 0.11 has none
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = quick

import hypothesis
import jax
import jaxtyping
import pytest

import tests.typechecker

# Tracing makes millions of objects that stay; looking through them every 700 was a tenth of the time.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)  # virtual ones, for shard_map; what is not sharded uses the first
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if "MUTANT_UNDER_TEST" in os.environ:  # mutmut: a mutant is dead at its first failure, however large
    hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.generate], database=None)
    hypothesis.settings.load_profile("mutants")
else:  # checking the types of every mutant would cost minutes
    jaxtyping.install_import_hook("fnn", f"{tests.typechecker.__name__}.check")


@pytest.fixture
def no_shape_annotations():
    """Leaves bad input to the library's own messages, as a user meets them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def standard_promotion():
    """optax multiplies Python floats by integer arrays (Adam's bias correction), which strict promotion
    refuses; tests that run an optimiser use JAX's default."""
    with jax.numpy_dtype_promotion("standard"):
        yield
