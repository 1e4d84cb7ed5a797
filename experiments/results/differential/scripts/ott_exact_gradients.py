"""ott-jax's gradients with a ridge and other tolerances: what is still found in the problems that have them checked.

The problems are those of `experiments.differential --count 10000 --derivatives-every 100`. Takes ten minutes.
"""

import collections
import types

import jax

from fs_jax.ot.testing import BUILT_IN, Solver, case, findings, has_derivatives_checked

jax.config.update("jax_enable_x64", True)
for name, tolerance in (("ott-log-float64", 1e-14), ("ott-log-float32", 1e-4)):
    built_in = BUILT_IN[name]
    options = f"solver_kwargs=dict(ridge_kernel=1.0, rtol={tolerance}, atol={tolerance})"
    source = "from ott.solvers.linear import implicit_differentiation\n" + built_in.source.replace(
        "Sinkhorn(", f"Sinkhorn(implicit_diff=implicit_differentiation.ImplicitDiff({options}), "
    )
    module = types.ModuleType("ott_exact_gradients")
    exec(source, module.__dict__)
    solver = Solver(name, module.solve, built_in.claims, source)
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for number in filter(lambda number: has_derivatives_checked(number, 100), range(10000)):
        problem = case(number)
        wrong = [of for of in findings(solver, problem, derivatives=True) if of.check.startswith("gradient")]
        if wrong:
            raises = any("Error: " in of.text for of in wrong)
            found[problem.family, "an error" if raises else "a number"] += 1
            print(name, options, number, problem.family, wrong[0].text)
    print(name, options, dict(found), flush=True)
