"""Checkpoints with Orbax: the latest few, and the best one. Each is written atomically."""

import os
import pathlib
import warnings
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fs_jax._utils.files import local_path, locked
from fs_jax.config import TrainConfig, differences, from_dict, to_dict
from fs_jax.training.configured import make_method, make_optimizer
from fs_jax.training.state import TrainState

MAX_TO_KEEP = 3


class Checkpoints:
    """Saves and restores the checkpoints of a run: the latest few in `workdir/checkpoints`, the best in `workdir/best`.

    Saving is asynchronous: arrays are copied, then written in the background. A checkpoint gets its final name only
    when it is complete. Each checkpoint contains the configuration and the unreplicated state, so any number of
    devices can resume from it.

    This class is for runs that have a `TrainConfig`. For a network of your own, save the state's arrays with Orbax.

    Args:
      workdir: The run's folder.
      config: The run's configuration. A checkpoint with another configuration raises an error.
      read_only: Only read: create no folders, do not remove incomplete checkpoints of a killed process, and do not
        rename damaged ones. Also possible while another process is training in the folder.

    Raises:
      BlockingIOError: if another process is training in the folder, unless `read_only`.

    Example:
      >>> import tempfile
      >>> from fs_jax.config import preset
      >>> from fs_jax.training import create_state
      >>> config, workdir = preset("digits"), tempfile.mkdtemp()
      >>> with Checkpoints(workdir, config) as checkpoints:
      ...     checkpoints.save(create_state(config, jax.random.key(0)))
      >>> with Checkpoints(workdir, config, read_only=True) as checkpoints:
      ...     int(checkpoints.restore_latest().step)
      0
    """

    def __init__(self, workdir: str | os.PathLike, config: TrainConfig, *, read_only: bool = False):
        self._config, self._read_only = config, read_only
        root = local_path("workdir", workdir).absolute()  # Orbax requires an absolute path
        self._lock = None if read_only else _locked(root)
        try:
            self._latest = _manager(root / "checkpoints", MAX_TO_KEEP, read_only)
            self._best = _manager(root / "best", 1, read_only)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def save(self, state: TrainState) -> None:
        """Save `state` under the number of its step, unless that step is already saved.

        Raises:
          ValueError: if the state does not belong to this configuration's optimizer and method, or if a later step is
            already saved.
          FloatingPointError: if a value of the state is not finite; nothing is written.
        """
        state = jax.tree.map(np.asarray, state)
        for name, like in _like(self._config, state.variables).items():
            ours: object = jax.tree.structure(like)
            theirs: object = jax.tree.structure(getattr(state, name))
            if ours != theirs:
                raise ValueError(
                    f"state: expected the {name} of this configuration, {ours}; got {theirs}. Nothing was saved. Pass "
                    "a state made by create_state with the same configuration."
                )
        _check_finite(state)
        step, saved = int(state.step), self.steps()
        if saved and step < saved[-1]:
            raise ValueError(
                f"state: expected a step of at least {saved[-1]}, the latest saved one; got {step}. Nothing was saved. "
                f"Resume from restore_latest(), or choose another workdir than {self._latest.directory.parent}."
            )
        if step not in saved:
            self._latest.save(step, args=self._args(state))

    def save_best(self, state: TrainState, scores: dict[str, float]) -> None:
        """Save `state` as the best one, with its scores, in place of the previous best, unless that has its step."""
        state = jax.tree.map(np.asarray, state)
        _check_finite(state)
        if int(state.step) not in self._best.all_steps():  # force: even if it is an earlier step than the previous best
            self._best.save(int(state.step), args=self._args(state, scores), force=True)

    def best_scores(self) -> dict[str, float]:
        """The scores saved with the best checkpoint; empty if there is no best checkpoint."""
        step = self._best.latest_step()
        if step is None:
            return {}
        try:
            return self._best.restore(step, args=ocp.args.Composite(scores=ocp.args.JsonRestore()))["scores"]
        except Exception as error:  # a damaged file can raise anything
            _skipped(self._best, step, error)
            self._set_aside(self._best, [step])
            return {}

    def restore_latest(self) -> TrainState | None:
        """The newest readable checkpoint, or None if there are no checkpoints.

        A damaged checkpoint is skipped with a warning and renamed, so that its step can be saved again.

        Raises:
          ValueError: if a checkpoint has another configuration (the message names the fields that differ), or if no
            checkpoint is readable. Nothing is changed in either case.
        """
        damaged: list[int] = []
        for step in sorted(self._latest.all_steps(), reverse=True):
            state = self._restore(self._latest, step)
            if state is not None:
                self._set_aside(self._latest, damaged)
                return state
            damaged.append(step)
        if damaged:
            raise ValueError(
                f"workdir: expected a readable checkpoint; got damaged ones at steps {damaged} in "
                f"{self._latest.directory}. Nothing was changed. See the warnings; to start again, choose another "
                "workdir."
            )
        return None

    def restore_best(self) -> TrainState | None:
        """The best checkpoint, or None if there is none or it is damaged."""
        step = self._best.latest_step()
        return None if step is None else self._restore(self._best, step)

    def steps(self) -> list[int]:
        """Steps of the latest checkpoints, in increasing order."""
        return sorted(self._latest.all_steps())

    def close(self) -> None:
        """Wait until all checkpoints are written."""
        try:
            for manager in (self._latest, self._best):
                manager.wait_until_finished()
                manager.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _set_aside(self, manager, steps: list[int]) -> None:
        """Rename damaged checkpoints, so that Orbax ignores them and the user can still inspect them."""
        if self._read_only or not steps:
            return
        for step in steps:
            path, number = manager.directory / str(step), 1
            while (target := path.with_name(f"damaged-{step}" + (f"-{number}" if number > 1 else ""))).exists():
                number += 1
            os.rename(path, target)
        manager.reload()

    def _args(self, state: TrainState, scores: dict[str, float] | None = None):
        return ocp.args.Composite(
            state=ocp.args.StandardSave(_as_dict(state)),
            config=ocp.args.JsonSave(to_dict(self._config)),
            scores=ocp.args.JsonSave(scores or {}),
        )

    def _restore(self, manager, step) -> TrainState | None:
        # The configuration first: restoring the arrays of another network would fail as if the file were damaged.
        try:
            stored = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
        except Exception as error:
            _skipped(manager, step, error)
            return None
        check_same_config(self._config, from_dict(stored), f"checkpoint {manager.directory / str(step)}")
        try:
            saved = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
        except Exception as error:
            _skipped(manager, step, error)
            return None
        variables = {"params": saved["params"], "batch_stats": saved.get("batch_stats") or {}}

        def unflattened(name, like):
            leaves, structure = jax.tree.flatten(like)
            ours, theirs = ([(x.shape, x.dtype) for x in arrays] for arrays in (leaves, saved.get(name, [])))
            if ours != theirs:
                raise ValueError(
                    f"workdir: expected a checkpoint that this version of the code wrote, with {len(ours)} arrays in "
                    f"{name}; got {len(theirs)} arrays, or other shapes, in {manager.directory / str(step)}. Use the "
                    "version that wrote it, or another workdir."
                )
            return jax.tree.unflatten(structure, saved.get(name, []))

        rest = {name: unflattened(name, like) for name, like in _like(self._config, variables).items()}
        return jax.tree.map(np.asarray, TrainState(**variables, step=saved["step"], **rest))


def check_same_config(ours: TrainConfig, theirs: TrainConfig, where: str) -> None:
    """Raise a ValueError that names the fields in which `theirs`, stored at `where`, differs from `ours`."""
    differing = differences(ours, theirs)
    if "data" not in differing and ours.data is not None:
        differing.pop("dataset", None)  # the same data under another path
    if differing:
        listed = "; ".join(f"{name}: {mine!r} here, {other!r} there" for name, (mine, other) in differing.items())
        if "data" in differing:
            listed += " (data: the training images or labels differ, or their augmentation or number of classes)"
        if "parts" in differing:
            listed += " (parts: the number of devices that have a transport problem or BatchNorm of their own)"
        raise ValueError(
            f"workdir: expected a run with this configuration; got another one in {where}: {listed}. "
            "Pass the same options, or another workdir."
        )


def _locked(workdir: pathlib.Path) -> filelock.BaseFileLock:
    """Lock the folder of a run, so that no second process can write checkpoints there at the same time."""
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        return locked(workdir / "run")
    except BlockingIOError:
        raise BlockingIOError(
            f"workdir: expected an unused folder; another process is training in {workdir}. Wait for it, or choose "
            "another folder. (Its checkpoints can be read with read_only=True.)"
        ) from None


def _manager(directory: pathlib.Path, max_to_keep: int, read_only: bool) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else max_to_keep,
        save_interval_steps=0 if read_only else 1,  # without it, Orbax chooses the same values and warns
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,  # incomplete checkpoints of a killed process
        enable_async_checkpointing=not read_only,
    )
    return ocp.CheckpointManager(directory, options=options, item_names=("state", "config", "scores"))


def _as_dict(state: TrainState) -> dict[str, Any]:
    # A flat list instead of the optimizer's nested tuples: the files do not depend on Optax's types.
    flat = {"opt_state": jax.tree.leaves(state.opt_state), "own": jax.tree.leaves(state.own)}
    filled = {name: leaves for name, leaves in flat.items() if leaves}
    return {"params": state.params, "batch_stats": state.batch_stats, **filled, "step": state.step}


def _like(config: TrainConfig, variables: dict[str, Any]) -> dict[str, Any]:
    """Structure and shapes of the optimizer's state and the method's own state."""
    return {
        "opt_state": jax.eval_shape(make_optimizer(config).init, variables["params"]),
        "own": jax.eval_shape(make_method(config).init, variables),
    }


def _check_finite(state: TrainState) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, np.inexact) and not np.isfinite(leaf.astype(np.float64)).all():
            raise FloatingPointError(
                f"state: expected finite arrays; {jax.tree_util.keystr(path)} is not finite. Nothing was saved."
            )


def _skipped(manager, step, error) -> None:
    warnings.warn(
        f"The damaged checkpoint {manager.directory / str(step)} is skipped: {type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else ''}",
        stacklevel=3,
    )
