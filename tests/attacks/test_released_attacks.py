"""The paper's attacks against recorded results of the released code, from the same starts, for each image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax import attacks
from fs_jax.models import WideResNet
from tests.parameters import mostly_slow

pytestmark = pytest.mark.usefixtures("float64")

ATTACKS = {"fgsm": attacks.fgsm, "pgd20": attacks.pgd, "cw20": attacks.cw}


# The deeper network's logits are compared in tests/models; the attacks' code is the same for both.
@pytest.mark.parametrize(
    "recorded", [(10, 1), pytest.param((16, 2), marks=pytest.mark.slow)], ids=["wrn_10_1", "wrn_16_2"], indirect=True
)
@pytest.mark.parametrize("name", mostly_slow(ATTACKS, "fgsm"))
def test_attacked_images_equal_the_recorded_ones_in_every_pixel(recorded, name):
    model, variables = WideResNet(recorded.depth, recorded.width, dtype=jnp.float64), recorded.variables(jnp.float64)

    def logits_fn(images):
        return model.apply(variables, images)[0]

    # Noise, like images, was recorded for [-1, 1]. The attacks' defaults are the paper's radius and steps.
    start = jnp.asarray(recorded.images + recorded.nhwc("attack_noise_nchw") / 2)

    @jax.jit
    def run(start):
        attacked = ATTACKS[name](logits_fn, jax.random.key(0), recorded.images, recorded.labels, start=start)
        return attacked, logits_fn(attacked)

    attacked, logits = run(start)
    # The recorded images are float32 in [-1, 1], so their rounding error is 3e-8 in [0, 1]; a pixel that moved the
    # other way once would differ by a step of 2/255 = 8e-3.
    np.testing.assert_allclose(attacked, (recorded.nhwc(f"{name}_adv_nchw") + 1) / 2, atol=1e-7, rtol=0)
    np.testing.assert_allclose(logits, recorded[f"{name}_logits"], atol=1e-6, rtol=0)


def test_margin_loss_equals_the_recorded_one():
    from tests.conftest import GOLDEN

    with np.load(GOLDEN / "losses.npz") as losses:
        logits, labels = jnp.asarray(losses["logits"]), jnp.asarray(losses["labels"])
        for margin in (0, 50):
            # Recorded in float32: the rounding error of 50 is 4e-6.
            ours = jnp.mean(attacks.cw_margin(logits, labels, margin))
            np.testing.assert_allclose(ours, losses[f"cw_margin{margin}"], rtol=1e-6)
