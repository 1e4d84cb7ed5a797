"""Solvers under test: their signature, their claims, and the built-in ones."""

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from fs_jax.ot import _checks

Solve = Callable[[Any, Any, Any, Any], Mapping[str, Any]]
"""(cost [n, m], a [n], b [m], reg) -> a mapping with `plan` [n, m] and optionally `f` [n], `g` [m], `primal_cost`,
`reg_cost`, `marginal_error` and `converged`, as in `fs_jax.ot.Transport`. A value of None counts as missing."""

Dtype = Literal["float32", "float64"]
Differentiable = Literal["cost", "a", "b"]


@dataclasses.dataclass(frozen=True)
class Claims:
    """What a solver claims to do. Only that is tested.

    Set it as the attribute `claims` of the function.

    Raises:
      ValueError: for an invalid value.

    Example:
      >>> def solve(cost, a, b, reg): ...
      >>> solve.claims = Claims(dtype="float32", gradients=("cost",), batched=True)
    """

    dtype: Dtype = "float64"
    """The dtype of the computation, and of the arguments that it gets."""
    marginal_error: float = 1e-3
    """Largest marginal error of the plan (L1, in units of mass). If it is not reached, the solver must report that, by
    `converged` or by a plan of NaN."""
    largest_ratio: float = float("inf")
    """The largest max |C| / reg of the problems that it solves. (For larger ones, exp(-C / reg) may underflow.)"""
    zeros: bool = True
    """Whether weights may be zero."""
    gradients: tuple[Differentiable, ...] = ()
    """The arguments by which `jax.grad` can differentiate the plan, and the costs if the solver returns them."""
    second_order: bool = False
    """Whether second derivatives with respect to the cost are supported too."""
    batched: bool = False
    """Whether it works under `jax.jit` and `jax.vmap`."""

    def __post_init__(self):
        _checks.choice("claims.dtype", self.dtype, get_args(Dtype))
        for name in ("marginal_error", "largest_ratio"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or isinstance(value, bool) or not value > 0:
                raise ValueError(f"claims.{name}: expected a positive number; got {value!r}")
        names = get_args(Differentiable)
        if not isinstance(self.gradients, tuple) or not all(name in names for name in self.gradients):
            raise ValueError(f"claims.gradients: expected a tuple of some of {names}; got {self.gradients!r}")

    @property
    def jax(self) -> bool:
        """Whether it uses JAX, judging by its claims."""
        return self.batched or bool(self.gradients)


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver under test."""

    name: str
    """`package:function`, or the name of a built-in solver."""
    solve: Solve
    claims: Claims = Claims()
    source: str = ""
    """Python code that defines `solve`, for scripts that run without this package."""


def load(name: str) -> Solver:
    """A solver by name: one of `BUILT_IN`, or `package.module:function`.

    Raises:
      ValueError: for an unknown name, with the nearest one; for a function that can't be imported or called; for
        claims that aren't `Claims`.

    Example:
      >>> load("fs_jax-stabilized-float32").claims.dtype
      'float32'
    """
    if name in BUILT_IN:
        for beginning, module, package in (("ott-", "ott", "ott-jax"), ("pot-", "ot", "POT")):
            if name.startswith(beginning) and importlib.util.find_spec(module) is None:
                raise ValueError(f"solver: {name} needs {package}; it is not installed: pip install {package}")
        return BUILT_IN[name]
    module, _, function = name.partition(":")
    if not (module and function):
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        colon = [":".join(name.rsplit(".", 1))] if "." in name and ":" not in name else []
        raise ValueError(
            f"solver: expected package.module:function, or the name of a built-in solver; got {name!r}"
            + "".join(f"; did you mean {of!r}?" for of in near or colon)
            + f" (Built in: {', '.join(BUILT_IN)})"
        )
    try:
        solve = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        advice = ""
        if isinstance(error, ModuleNotFoundError):
            advice = (
                ". If it is in the current folder, use `python -m pytest`, `pythonpath = .` in pytest's settings, "
                "or PYTHONPATH=."
            )
        raise ValueError(
            f"solver: expected package.module:function that can be imported; got {name!r}: {error}{advice}"
        ) from None
    if not callable(solve):
        raise ValueError(f"solver: expected a function; got {name!r}, a {type(solve).__name__}")
    claims = getattr(solve, "claims", Claims())
    if not isinstance(claims, Claims):
        raise ValueError(
            f"solver: expected {function}.claims to be fs_jax.ot.testing.Claims(...); got a {type(claims).__name__}. "
            "For a dictionary, use Claims(**dictionary)"
        )
    return Solver(name, solve, claims, f"from {module} import {function} as solve")


ITERATIONS = 5000


# The code of each built-in solver, used here and in scripts that run without this package.
_FS_JAX = """\
from fs_jax.ot import sinkhorn
def solve(cost, a, b, reg):
    out = sinkhorn(cost, a, b, reg=reg, num_iters={iterations}, threshold={threshold}, method={method!r}, grad={grad!r})
    return dict(out._asdict(), converged=out.converged)"""
# Under `jax.jit`, as its documentation recommends: otherwise each call compiles its loop again.
_OTT = """\
import jax
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn
@jax.jit
def solve(cost, a, b, reg):
    problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=reg), a, b)
    out = sinkhorn.Sinkhorn(lse_mode={lse_mode}, threshold={threshold}, max_iterations={iterations})(problem)
    costs = dict(primal_cost=out.primal_cost, reg_cost=out.reg_ot_cost)
    return dict(plan=out.matrix, f=out.f, g=out.g, converged=out.converged, **costs)"""
_POT = """\
import ot
def solve(cost, a, b, reg):
    options = dict(method={method!r}, numItermax={iterations}, stopThr={threshold}, log=True, warn=False)
    plan, log = ot.sinkhorn(a, b, cost, float(reg), **options)
    return dict(plan=plan, converged=bool(len(log["err"]) and log["err"][-1] <= {threshold}))"""


@functools.cache
def _defined(source: str) -> Solve:
    """The function that the code defines. It is created, and its library imported, at its first call."""
    names: dict[str, Any] = {}
    exec(source, names)
    return names["solve"]


def _of_source(name: str, claims: Claims, source: str) -> Solver:
    return Solver(name, lambda *arguments: _defined(source)(*arguments), claims, source)


def _built_in() -> dict[str, Solver]:
    found = []
    dtypes: tuple[tuple[Literal["float32", "float64"], float, float], ...] = (
        # exp(-x) is zero in float32 for x above 103, and in float64 above 745: Algorithm 1 as printed fails there.
        ("float32", 1e-3, 80.0),
        ("float64", 1e-6, 700.0),
    )
    for dtype, threshold, in_range in dtypes:
        claims = Claims(dtype, threshold, gradients=("cost", "a", "b"), batched=True)
        kernel = dataclasses.replace(claims, largest_ratio=in_range)
        implicit = dataclasses.replace(claims, second_order=dtype == "float64")
        for method, grad, of in (
            ("stabilized", "unroll", claims), ("stabilized", "implicit", implicit), ("log", "unroll", claims),
            ("kernel", "unroll", claims),  # no largest ratio: it reports when the kernel underflows
        ):  # fmt: skip
            text = _FS_JAX.format(iterations=ITERATIONS, threshold=threshold, method=method, grad=grad)
            name = f"fs_jax-{'implicit' if grad == 'implicit' else method}-{dtype}"
            found.append(_of_source(name, of, text))
        # ott-jax's threshold is the error of one marginal; ours, and that of the claims, is the error of both.
        of_one = {"marginal_error": 2 * threshold}
        for lse_mode, name, of in (
            (True, "log", dataclasses.replace(claims, **of_one)),  # type: ignore[arg-type]
            (False, "kernel", dataclasses.replace(kernel, **of_one)),  # type: ignore[arg-type]
        ):
            text = _OTT.format(iterations=ITERATIONS, threshold=threshold, lse_mode=lse_mode)
            found.append(_of_source(f"ott-{name}-{dtype}", of, text))
    for method, ratio in (("sinkhorn", 700.0), ("sinkhorn_log", float("inf")), ("sinkhorn_stabilized", float("inf"))):
        # POT stops by the L2 error of one marginal, which can be as small as an eighth of the L1 error for 60 points.
        of = Claims(marginal_error=1e-3, largest_ratio=ratio, zeros=method != "sinkhorn_log")
        text = _POT.format(iterations=ITERATIONS, threshold=1e-4, method=method)
        found.append(_of_source(f"pot-{method}", of, text))
    return {solver.name: solver for solver in found}


BUILT_IN = _built_in()
"""Solvers of this project, of ott-jax and of POT, by name."""
