"""Four simulated CPU devices for all tests, recorded vectors, and a small network to attack."""

import atexit
import contextlib
import os
import pathlib
import shutil
import sys
import tempfile

# Set before JAX is imported. Processes that tests start inherit these variables too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Users may set these, so our code must not rely on JAX's implicit promotion of ranks and types. Tests of promotion
# itself, and of other libraries that rely on it, use the fixture `standard_promotion`.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
# Most of the tests' time is compilation, and most of that is LLVM's. At a lower optimization level, compilation takes
# half as long (for random numbers, a quarter). XLA's own optimizations are the same.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1"

# Tests, workers and the processes that tests start share a compilation cache, so that each program is compiled once.
# Each test run has a new folder for it: it neither reuses programs of earlier runs nor writes to the user's own cache.
if "fs_jax-tests-" not in os.environ.get("JAX_COMPILATION_CACHE_DIR", ""):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fs_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.config import preset
from fs_jax.models import convert
from tests import disturb

jax.config.update("jax_num_cpu_devices", 4)  # before the first computation
disturb.if_asked()


GOLDEN = pathlib.Path(__file__).parent / "golden"


# On the oldest Python, these tests and the examples in docstrings are marked slow, to save time. Other tests cover the
# same functions there. A new JAX release breaks these tests on newer Pythons first, where they are not marked slow.
NEWEST_ONLY = (
    "test_quickstart_writes_its_table",
    "test_a_resumed_run_equals",
    # programs that take seconds to compile; other tests cover the same functions
    "test_a_batch_can_be_differentiated",
    "test_a_finished_run_is_not_changed",
    "test_a_threshold_that_is_not_met_changes_no_derivative",
    "test_adversaries_of_another_network",
    "test_another_configuration_cannot_resume_a_run",
    "test_clean_weight_is_the_weight",
    "test_converges_to_the_exact_cost",
    "test_decreasing_reg_has_the_same_solution_and_gradient",
    "test_envelope_and_none",
    "test_every_iteration_equals_ott_jaxs",
    "test_every_transport_matches_the_batch",
    "test_first_and_second_derivatives_in_both_modes",
    "test_four_devices_equal_one_with_a_custom_network",
    "test_gradient_free_attacks_work_for_a_network",
    "test_history_is_the_error_of_the_plan",
    "test_images_of_float64_give_the_results",
    "test_no_program_keeps_the_function_alive",
    "test_other_data_cannot_resume_a_run",
    "test_padding_may_be_any_finite_number",
    "test_restarts_and_attacks_give_worst_cases",
    "test_second_derivatives_and_vmap",
    "test_second_derivatives_at_equal_points_are_those_of_the_formula",
    "test_shard_map_with_replicated_weights",
    "test_the_best_checkpoint_is_the_best_monitored_epoch",
    "test_the_same_seed_gives_the_same_result",
    "test_threshold_stops_each_problem_of_a_batch",
    "test_trades_equals_the_published_method",
    "test_unrolled_derivatives",
    "test_warns_if_gradient_free_attacks_find_more",
    "test_zero_weights_exclude_points",
)
NEWEST_ONLY_FILES = (
    # NumPy programs, examples, and functions or properties of solvers and attacks that other tests cover
    "test_testing.py", "test_transport_cases.py", "test_paper.py", "test_paper_page.py", "test_pages.py",
    "test_readme.py", "test_weights.py", "test_unbalanced.py", "test_export.py", "test_sharding.py",
    "test_divergence.py", "test_bounds.py", "test_extension.py", "test_network.py", "test_packing.py",
    "test_autoattack.py", "test_conformance.py", "test_status.py", "test_ot_checks.py", "test_costs.py",
    "test_released_sinkhorn.py", "test_properties.py", "test_losses.py", "test_local_search.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest deselects slow tests
def pytest_collection_modifyitems(items):
    if sys.version_info < (3, 12):
        for item in items:
            newest_only = item.name.startswith(NEWEST_ONLY) or item.path.name in NEWEST_ONLY_FILES
            if isinstance(item, pytest.DoctestItem) or newest_only:
                item.add_marker(pytest.mark.slow)


class Recorded:
    """A network recorded from the released PyTorch code, in our layouts: images NHWC in [0, 1]."""

    def __init__(self, depth, width):
        self.depth, self.width = depth, width
        with np.load(GOLDEN / f"wrn_{depth}_{width}.npz") as arrays:
            self._arrays = dict(arrays)
        self.images = (self.nhwc("x_nchw") + 1) / 2
        self.labels = self._arrays["labels"]

    def __getitem__(self, name):
        return self._arrays[name]

    def nhwc(self, name):
        return self._arrays[name].astype(np.float64).transpose(0, 2, 3, 1)

    def state_dict(self, prefix):
        return {name.removeprefix(prefix): array for name, array in self._arrays.items() if name.startswith(prefix)}

    def variables(self, dtype):
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), convert.from_torch(self.state_dict("weights/")))


@pytest.fixture(scope="session", params=[(10, 1), (16, 2)], ids=["wrn_10_1", "wrn_16_2"])
def recorded(request):
    return Recorded(*request.param)


@pytest.fixture(scope="session")
def recorded_10_1():
    return Recorded(10, 1)


@pytest.fixture(scope="session")
def digits_state():
    """The digits preset, and the state before its first step."""
    from fs_jax.training import create_state  # imported here, since it is slow and most tests don't need it

    config = preset("digits")
    return config, create_state(config, jax.random.key(0))


@pytest.fixture
def small_programs():
    """Compile with few optimizations, for tests whose programs take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def standard_promotion():
    """JAX's default promotion of ranks and types."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def one_batch_size(monkeypatch):
    """Attacks compile their step for one batch size only. (`test_packing` tests that smaller sizes work too.)"""
    from fs_jax.attacks import packing

    monkeypatch.setattr(packing, "_SHRINKS", 0)


@pytest.fixture
def compilations():
    """`with compilations() as compiled`: a list that gets an entry for each program that JAX compiles or loads."""

    @contextlib.contextmanager
    def counted():
        compiled, count = [], [True]

        def listen(event, _, **__):
            if count and event == "/jax/core/compile/backend_compile_duration":
                compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield compiled
        finally:
            count.clear()  # JAX has no function to remove a listener

    return counted


@pytest.fixture(autouse=True)
def same_environment():
    """Check that no test changes JAX's environment variables, which processes of later tests would inherit."""

    def options():
        return {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_", "FS_JAX_"))}

    before = options()
    yield
    assert options() == before


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def classifier():
    """A smooth network of two layers on 4 x 4 images with 5 classes, and 6 images with labels."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(16, 12)).astype(np.float32), rng.normal(size=(12, 5)).astype(np.float32)

    def logits_fn(images):
        weights = first.astype(images.dtype), second.astype(images.dtype)
        return jnp.tanh(images.reshape(len(images), -1) @ weights[0]) @ weights[1]

    images = jnp.asarray(rng.uniform(size=(6, 4, 4, 1)).astype(np.float32))
    return logits_fn, images, jnp.asarray(rng.integers(0, 5, 6))
