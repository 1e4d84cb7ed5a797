"""Call the public functions with shapes and types checked at run time. `test_shapes` runs this in a subprocess.

jaxtyping's import hook checks the signatures of all functions of `fs_jax`, including private ones. Other tests do not
use it, because it would raise its own errors for bad input before our checks do.
"""

import functools

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np

checker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # an int is accepted as a float


def main():
    with jaxtyping.install_import_hook("fs_jax", "tests.shapes.checker"):
        import fs_jax.models.convert
        import fs_jax.training.methods
        from fs_jax import attacks, data, evaluation, ot, training
        from fs_jax.attacks import packing
        from fs_jax.config import AttackConfig, ModelConfig, TrainConfig
        from fs_jax.data import augmentation
        from fs_jax.models import WideResNet, as_logits_fn

    packing._SHRINKS = 0  # one size of the batch
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(n, 4)), jnp.float32) for n in (5, 6))
    ot.sqeuclidean_cost(x, y), ot.euclidean_cost(x, y)
    cost = ot.cosine_cost(x, y)

    def trace(function, *arguments):  # checks the signatures without compiling
        jax.jit(function).trace(*arguments)

    for grad in ("unroll", "implicit", "envelope", "none"):
        trace(jax.grad(lambda c, grad=grad: ot.sinkhorn(c, reg=0.5, num_iters=20, grad=grad).primal_cost), cost)
    for method in ("kernel", "log", "stabilized"):
        trace(lambda c, method=method: ot.sinkhorn(c, reg=1, num_iters=20, threshold=1e-3, method=method), cost)
    result = ot.sinkhorn(cost, reg=1.0, num_iters=2)
    ot.sinkhorn(cost, reg=1.0, num_iters=2, init=(result.f, result.g))
    trace(jax.vmap(lambda c: ot.sinkhorn(c, reg=0.5, num_iters=20)), jnp.stack([cost, cost]))
    trace(lambda c: ot.ipot(c, beta=0.5, num_iters=5), cost)
    trace(ot.released_sinkhorn, cost)
    ot.fixed_plan(cost, jnp.ones((5, 6)) / 30)

    images, labels = rng.uniform(size=(4, 8, 8, 1)).astype(np.float32), np.arange(4)
    weights = jnp.asarray(rng.normal(size=(64, 5)), jnp.float32)

    def logits_fn(images):
        return images.reshape(len(images), -1) @ weights

    for name in attacks.REGISTRY:
        attack = attacks.Attack(name, 0.1)
        few = {"num_steps": 2} if "num_steps" in attack.settings else {}
        attack = attacks.Attack(name, 0.1, **few)
        chosen = [attack] if name == "clean" else ["clean", attack]
        evaluation.evaluate(logits_fn, images, labels, chosen, epsilon=0.1, progress=False)
    attacks.autoattack(logits_fn, jax.random.key(0), images, labels, epsilon=0.1, version=["apgd-ce", "pgd-2"])
    attacks.feature_scatter(logits_fn, jax.random.key(0), jnp.asarray(images), epsilon=0.1, step_size=0.1)

    digits = data.load("digits")
    augmentation.augment(jax.random.key(0), jnp.asarray(digits.train_images[:4]), padding=1, flip=True)
    model = WideResNet(10, 1, 10)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    as_logits_fn(model, variables)(jnp.asarray(images))
    model.apply(variables, jnp.asarray(images), train=True, mutable=["batch_stats"])

    batch = {"images": jnp.asarray(images), "labels": jnp.asarray(labels)}
    for method in fs_jax.training.methods.METHODS:
        config = TrainConfig(
            "digits", method=method, batch_size=4, model=ModelConfig(10, 1), attack=AttackConfig(0.1, num_steps=1),
            weight_average=0.9,
        )  # fmt: skip
        state = training.create_state(config, jax.random.key(0))
        trace(functools.partial(training.train_step, config=config), state, batch, jax.random.key(1))
    print("All shapes and types are as their signatures say.")
