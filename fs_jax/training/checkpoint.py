"""Checkpoints by Orbax: the latest few and, apart from them, the best; whole, or not there at all."""

import os
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fs_jax._utils.files import local_path
from fs_jax.config import TrainConfig, differences, from_dict, to_dict
from fs_jax.training.configured import make_method, make_optimizer
from fs_jax.training.state import TrainState

KEPT = 3


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints` (the latest few) and `workdir/best` (one).

    Saving is asynchronous: arrays are copied, then written in the background, and a checkpoint appears under its name
    only when it is whole. Each holds the unreplicated state, so that any number of devices can go on from it, and the
    configuration. (They are of configured runs; for a network of one's own, save the state's arrays by Orbax itself.)

    Args:
      workdir: The run's folder.
      config: The run's configuration; a checkpoint of another one is refused.
      read_only: Only look: make no folders, and leave damaged checkpoints where they are.

    Example:
      >>> import tempfile
      >>> from fs_jax.config import preset
      >>> from fs_jax.training import create_state
      >>> config, workdir = preset("digits"), tempfile.mkdtemp()
      >>> with Checkpoints(workdir, config) as checkpoints:
      ...     checkpoints.save(create_state(config, jax.random.key(0)))
      >>> with Checkpoints(workdir, config) as checkpoints:
      ...     int(checkpoints.restore_latest().step)
      0
    """

    def __init__(self, workdir: str | os.PathLike, config: TrainConfig, *, read_only: bool = False):
        self._config, self._read_only = config, read_only
        # An absolute path is what Orbax asks for.
        root = local_path("workdir", workdir).absolute()
        self._latest = _manager(root / "checkpoints", KEPT, read_only)
        self._best = _manager(root / "best", 1, read_only)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def save(self, state: TrainState) -> None:
        """Save `state` under its step, unless that is there. The state must be finite.

        Raises:
          ValueError: if it isn't a state of this configuration's optimizer and method.
          FloatingPointError: if a parameter or statistic isn't finite; nothing is written then.
        """
        state = jax.tree.map(np.asarray, state)
        for name, like in _like(self._config, state.variables).items():
            ours: object = jax.tree.structure(like)
            theirs: object = jax.tree.structure(getattr(state, name))
            if ours != theirs:
                raise ValueError(
                    f"state: expected the {name} of the configuration's training, {ours}; got {theirs}. Nothing was "
                    "saved."
                )
        _check_finite(state)
        if int(state.step) not in self._latest.all_steps():
            self._latest.save(int(state.step), args=self._args(state))

    def save_best(self, state: TrainState, scores: dict[str, float]) -> None:
        """Save `state` as the best so far, with the scores that made it so, in place of the one before."""
        state = jax.tree.map(np.asarray, state)
        _check_finite(state)
        if int(state.step) not in self._best.all_steps():
            self._best.save(int(state.step), args=self._args(state, scores))

    def best_scores(self) -> dict[str, float]:
        """The scores that were saved with the best checkpoint; empty where there is none."""
        step = self._best.latest_step()
        if step is None:
            return {}
        try:
            return self._best.restore(step, args=ocp.args.Composite(scores=ocp.args.JsonRestore()))["scores"]
        except Exception as error:  # whatever a damaged file brings about
            _skipped(self._best, step, error)
            self._set_aside(self._best, [step])
            return {}

    def restore_latest(self) -> TrainState | None:
        """The newest checkpoint that can be read; None where there is none.

        A damaged one is passed over with a warning, and set aside so that its step can be saved again.

        Raises:
          ValueError: if a checkpoint is of another configuration, naming the fields that differ; or if there are
            checkpoints and none can be read. Nothing is changed then.
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
                f"workdir: expected a checkpoint that can be read; none of steps {damaged} in {self._latest.directory} "
                "can. Nothing was changed. See the warnings; to start anew, choose another workdir."
            )
        return None

    def restore_best(self) -> TrainState | None:
        """The best checkpoint; None where there is none, or it is damaged."""
        step = self._best.latest_step()
        return None if step is None else self._restore(self._best, step)

    def steps(self) -> list[int]:
        """Steps of the latest checkpoints, oldest first."""
        return sorted(self._latest.all_steps())

    def close(self) -> None:
        """Wait for what is being written."""
        for manager in (self._latest, self._best):
            manager.wait_until_finished()
            manager.close()

    def _set_aside(self, manager, steps: list[int]) -> None:
        """Rename damaged checkpoints, out of Orbax's sight but not out of the user's."""
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
        # The configuration first: arrays of another network don't fit, and that would read like damage.
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
                    f"workdir: expected a checkpoint of this code; {manager.directory / str(step)} has an {name} of "
                    f"{len(theirs)} arrays, where there are {len(ours)} now, or of other shapes. Take the version of "
                    "the code that wrote it, or another workdir."
                )
            return jax.tree.unflatten(structure, saved.get(name, []))

        rest = {name: unflattened(name, like) for name, like in _like(self._config, variables).items()}
        return jax.tree.map(np.asarray, TrainState(**variables, step=saved["step"], **rest))


def check_same_config(ours: TrainConfig, theirs: TrainConfig, where: str) -> None:
    """Raise a ValueError that names each field in which `theirs`, found at `where`, differs from `ours`."""
    differing = differences(ours, theirs)
    if "data" not in differing and ours.data is not None:
        differing.pop("dataset", None)  # a file that was moved
    if differing:
        listed = "; ".join(f"{name}: {mine!r} here, {other!r} there" for name, (mine, other) in differing.items())
        if "data" in differing:
            listed += " (the training images or labels are others)"
        if "parts" in differing:
            listed += " (parts: devices with transport or BatchNorm of their own)"
        raise ValueError(
            f"workdir: expected a run of this configuration; {where} is of another one: {listed}. "
            "Give the same options, or another workdir."
        )


def _manager(directory: pathlib.Path, kept: int, read_only: bool) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else kept,
        save_interval_steps=0 if read_only else 1,  # as Orbax sets them itself, with a warning
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,  # what a killed run left half-written
        enable_async_checkpointing=not read_only,
    )
    return ocp.CheckpointManager(directory, options=options, item_names=("state", "config", "scores"))


def _as_dict(state: TrainState) -> dict[str, Any]:
    # The optimizer's nested tuples become a flat list: what is on disk doesn't depend on Optax's types.
    flat = {"opt_state": jax.tree.leaves(state.opt_state), "own": jax.tree.leaves(state.own)}
    filled = {name: leaves for name, leaves in flat.items() if leaves}
    return {"params": state.params, "batch_stats": state.batch_stats, **filled, "step": state.step}


def _like(config: TrainConfig, variables: dict[str, Any]) -> dict[str, Any]:
    """Structure and shapes of what a configuration's optimizer and method keep."""
    return {
        "opt_state": jax.eval_shape(make_optimizer(config).init, variables["params"]),
        "own": jax.eval_shape(make_method(config).init, variables),
    }


def _check_finite(state: TrainState) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, np.inexact) and not np.isfinite(leaf.astype(np.float64)).all():
            raise FloatingPointError(f"state: expected finite arrays; {jax.tree_util.keystr(path)} isn't. Not saved.")


def _skipped(manager, step, error) -> None:
    warnings.warn(
        f"{manager.directory / str(step)} can't be read and is passed over: {type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else ''}",
        stacklevel=3,
    )
