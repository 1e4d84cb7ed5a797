"""Checkpoints are restored exactly; damaged ones are skipped; another configuration raises an error."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.config import AttackConfig, ModelConfig, preset
from fs_jax.training import Checkpoints, create_state

CONFIG = preset("digits")


@pytest.fixture(scope="module")
def state():
    return create_state(CONFIG, jax.random.key(0))


def at(state, step):
    """A state that differs by step in every floating-point array."""
    moved = jax.tree.map(lambda x: x + step if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    return moved.replace(step=jnp.int32(step))


def equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, theirs)


def test_the_newest_state_is_restored_exactly(state, tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore_latest() is None
        for step in (5, 7):
            checkpoints.save(at(state, step))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        equal(checkpoints.restore_latest(), at(state, 7))


def test_the_latest_checkpoints_and_the_best_one_are_kept(state, tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save_best(at(state, 1), {"monitor_robust": 0.9})
        for step in range(1, 6):
            checkpoints.save(at(state, step))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.steps() == [3, 4, 5]
        assert checkpoints.best_scores() == {"monitor_robust": 0.9}
        equal(checkpoints.restore_best(), at(state, 1))
        checkpoints.save_best(at(state, 4), {"monitor_robust": 0.95})
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        equal(checkpoints.restore_best(), at(state, 4))


def test_a_best_checkpoint_of_an_earlier_step_replaces_the_previous_best(state, tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save_best(at(state, 10), {"monitor_robust": 0.5})
        checkpoints.save_best(at(state, 5), {"monitor_robust": 0.6})
    with Checkpoints(tmp_path, CONFIG, read_only=True) as checkpoints:
        assert checkpoints.best_scores() == {"monitor_robust": 0.6}
        equal(checkpoints.restore_best(), at(state, 5))


def test_a_state_before_the_latest_checkpoint_raises_an_error(state, tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(at(state, 10))
        with pytest.raises(ValueError, match="state: expected a step of at least 10, the latest saved one; got 5"):
            checkpoints.save(at(state, 5))
        assert checkpoints.steps() == [10]


def test_only_one_process_can_write_checkpoints(state, tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(at(state, 2))
        half_written = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
        half_written.mkdir()
        with pytest.raises(BlockingIOError, match=r"another process is training in .*can be read with read_only=True"):
            Checkpoints(tmp_path, CONFIG)
        with Checkpoints(tmp_path, CONFIG, read_only=True) as reader:
            reader.restore_latest()
        assert half_written.is_dir()
    with Checkpoints(tmp_path, CONFIG) as checkpoints:  # now it is left from a killed process
        checkpoints.save(at(state, 6))  # Orbax removes it in the background, and waits for that before it saves
    assert not half_written.exists()


def damaged(path: pathlib.Path, how: str):
    """Cut off or empty the files that hold arrays; those of an OCDBT store are under `d/`."""
    files = [file for file in path.rglob("*") if file.is_file() and file.stat().st_size > 1000]
    assert files
    for file in files:
        if how == "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        else:
            file.unlink()


@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(state, tmp_path, how):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for step in (2, 4):
            checkpoints.save(at(state, step))
    damaged(tmp_path / "checkpoints" / "4", how)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        with pytest.warns(UserWarning, match="The damaged checkpoint .*checkpoints/4 is skipped"):
            restored = checkpoints.restore_latest()
        equal(restored, at(state, 2))
        checkpoints.save(at(state, 4))  # the step can be saved again, and the damaged files are kept
    assert (tmp_path / "checkpoints" / "damaged-4").is_dir()
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        equal(checkpoints.restore_latest(), at(state, 4))


def test_if_all_checkpoints_are_damaged_nothing_is_changed(state, tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for step in (2, 4):
            checkpoints.save(at(state, step))
    for step in (2, 4):
        damaged(tmp_path / "checkpoints" / str(step), "truncated")
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        with (
            pytest.warns(UserWarning, match="is skipped"),
            pytest.raises(ValueError, match=r"damaged ones at steps \[4, 2\].*Nothing was changed"),
        ):
            checkpoints.restore_latest()
        assert checkpoints.steps() == [2, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]


def test_a_damaged_best_checkpoint_is_skipped(state, tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save_best(at(state, 2), {"monitor_robust": 0.5})
    for file in (tmp_path / "best" / "2" / "scores").iterdir():
        file.write_bytes(file.read_bytes()[:3])
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        with pytest.warns(UserWarning, match="best/2 is skipped"):
            assert checkpoints.best_scores() == {}
        checkpoints.save_best(at(state, 2), {"monitor_robust": 0.6})
    with Checkpoints(tmp_path, CONFIG, read_only=True) as checkpoints:
        assert checkpoints.best_scores() == {"monitor_robust": 0.6}


def test_reading_changes_nothing(state, tmp_path):
    with Checkpoints(tmp_path / "empty", CONFIG, read_only=True) as checkpoints:
        assert checkpoints.restore_latest() is checkpoints.restore_best() is None
    assert not (tmp_path / "empty").exists()
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for step in (2, 4):
            checkpoints.save(at(state, step))
    damaged(tmp_path / "checkpoints" / "4", "truncated")
    with Checkpoints(tmp_path, CONFIG, read_only=True) as checkpoints, pytest.warns(UserWarning, match="skipped"):
        equal(checkpoints.restore_latest(), at(state, 2))
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_an_error_names_the_fields_of_another_configuration(state, tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(at(state, 2))
    other = dataclasses.replace(
        CONFIG, learning_rate=0.05, model=ModelConfig(depth=16, width=1), attack=AttackConfig(epsilon=0.3)
    )
    with Checkpoints(tmp_path, other) as checkpoints, pytest.raises(ValueError, match="got another one") as error:
        checkpoints.restore_latest()
    for field in ("learning_rate: 0.05 here, 0.1 there", "model.depth: 16 here, 10 there", "attack.epsilon"):
        assert field in str(error.value)
    assert "momentum" not in str(error.value)
    assert (tmp_path / "checkpoints" / "2").is_dir()  # not renamed as if it were damaged


@pytest.mark.parametrize("part", ["params", "batch_stats"])
def test_a_state_that_is_not_finite_is_not_saved(state, tmp_path, part):
    broken = jax.tree.map(lambda x: x * jnp.nan, getattr(state, part))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(at(state, 2))
        with pytest.raises(
            FloatingPointError, match=f"expected finite arrays; .{part}.* is not finite. Nothing was saved"
        ):
            checkpoints.save(state.replace(**{part: broken}, step=jnp.int32(3)))
        assert checkpoints.steps() == [2]


def test_a_state_of_another_optimizer_is_not_saved(tmp_path):
    import optax

    state = create_state(CONFIG, jax.random.key(0))
    other = state.replace(opt_state=optax.adam(1e-3).init(state.params))
    with Checkpoints(tmp_path, CONFIG) as checkpoints, pytest.raises(ValueError, match="state: expected the opt_state"):
        checkpoints.save(other)
