"""The checklist says no where gradients mislead, yes where they don't, and nothing about what wasn't tested."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.evaluation import accuracy, gradient_masking

pytestmark = pytest.mark.usefixtures("small_programs", "one_batch_size")

TOTAL = 40
UNBOUNDED, RADII, STEPS, BLACK_BOX, TRANSFER, SURFACE, GAP = range(7)


def evaluation(**standing):
    """Summary and records of attacks by name, which leave so many images standing, the first ones."""
    attacks = [
        {
            "name": name, "kind": kind, "epsilon": epsilon, "apart": apart, "after": after,
            "uses_gradients": kind not in ("clean", "square", "transfer"),
            **accuracy(np.arange(TOTAL) < count),
        }
        for name, (count, kind, epsilon, apart, after) in standing.items()
    ]  # fmt: skip
    worst = min(of[0] for of in standing.values() if not of[3])
    records = [
        {
            "robust": i < worst,
            "margin": {name: 1.0 if i < of[0] else -1.0 for name, of in standing.items()},
            "misclassified_at": {name: -1 if i < of[0] else 0 for name, of in standing.items()},
        }
        for i in range(TOTAL)
    ]
    return {"attacks": attacks, "worst": accuracy(np.arange(TOTAL) < worst)}, records


def honest(**changed):
    counts = {
        "clean": 36, "fgsm": 24, "pgd-20": 20, "pgd-100": 20, "square": 20, "transfer": 30,
        gradient_masking.UNBOUNDED: 0,
        **{f"{gradient_masking.SWEEP}{level}/255": 36 - 2 * level for level in (1, 2, 4, 8)}, **changed,
    }  # fmt: skip
    return evaluation(
        **{
            name: (
                count,
                name.split("-")[0].split(" ")[0],
                float(name.split()[2][:-4]) / 255 if name.startswith(gradient_masking.SWEEP) else 0.1,
                " " in name or name == "transfer",
                ("clean", "pgd-20") if name == "square" else (),
            )
            for name, count in counts.items()
            if count is not None
        }
    )


RISING = np.tile(np.array([0.0, 1.0, 2.0]), (10, 3, 1))  # along the gradient, and nowhere else


def verdicts(losses=RISING, **changed):
    return [check.verdict for check in gradient_masking.checklist(*honest(**changed), losses)]


def test_a_network_with_honest_gradients_passes_all():
    assert verdicts() == ["yes"] * 7


@pytest.mark.parametrize(
    ("check", "changed", "said"),
    [
        (UNBOUNDED, {gradient_masking.UNBOUNDED: 1}, "1 of 40 images are robust"),
        (RADII, {"pgd-20 at 8/255": 33}, "85.0%, 80.0%, 70.0%, 82.5%"),
        (STEPS, {"pgd-100": 26}, "pgd-100 misses 6 images that pgd-20 finds, and finds 0 others"),
        (BLACK_BOX, {"square": 19}, "3 attacks by gradients; square tried 20 of these and broke 1"),
        (TRANSFER, {"transfer": 19}, "PGD-20 on the other network leaves 47.5%, on this one 50.0%"),
        (SURFACE, {"losses": RISING[..., ::-1]}, "in 0 of 10 images"),
        (SURFACE, {"losses": np.swapaxes(RISING, 1, 2)}, "in 0 of 10 images"),
        (GAP, {"square": 17}, "all attacks together 42.5%: PGD-20 alone overstates this network by 7.5"),
    ],
)  # fmt: skip
def test_each_sign_is_seen(check, changed, said):
    losses = changed.get("losses", RISING)
    checks = gradient_masking.checklist(*honest(**{k: v for k, v in changed.items() if k != "losses"}), losses)
    assert checks[check].verdict == "no"
    assert said in checks[check].why


def test_a_few_images_more_or_less_are_chance():
    # 4 lost and none won: at even odds that happens in 1 of 16 cases.
    assert verdicts(**{"pgd-100": 24})[STEPS] == "yes"
    assert verdicts(**{"pgd-100": 25})[STEPS] == "no"


def test_a_larger_radius_may_find_a_few_images_less_by_chance():
    assert verdicts(**{"pgd-20 at 8/255": 32})[RADII] == "yes"
    assert verdicts(**{"pgd-20 at 8/255": 33})[RADII] == "no"


def test_where_pgd_was_not_run_by_itself_the_sweep_says_the_gap():
    # The other attacks here are at 0.1, the sweep's at 25.5/255 too.
    alone = {"pgd-20": None, "fgsm": None, "pgd-100": None, f"{gradient_masking.SWEEP}25.5/255": 26}
    check = gradient_masking.checklist(*honest(**alone))[GAP]
    assert check.verdict == "no"
    assert "PGD-20 leaves 65.0%, " in check.why
    assert check.why.endswith("by 15.0 points; of the images that it leaves, others break 23%")


def test_what_was_not_run_is_not_judged():
    gone = dict.fromkeys(["fgsm", "pgd-100", "square", "transfer", gradient_masking.UNBOUNDED])
    gone |= {f"{gradient_masking.SWEEP}{level}/255": None for level in (1, 2, 4, 8)}
    assert verdicts(losses=None, **gone) == ["not tested"] * 7


def test_the_sweep_has_the_radius_of_the_evaluation_once():
    names = [attack.name for attack in gradient_masking.radius_attacks(10, 8 / 255)]
    assert names == [*(f"pgd-20 at {level}/255" for level in (1, 2, 4, 6, 8, 12, 16)), gradient_masking.UNBOUNDED]
    assert "pgd-20 at 0.03" in [attack.name for attack in gradient_masking.radius_attacks(10, 0.03)]
    assert [attack.name for attack in gradient_masking.radius_attacks(10, 0.0)] == names


def test_the_sweep_begins_with_the_clean_images():
    points = gradient_masking.radius_points(*honest())
    assert [round(255 * point["epsilon"]) for point in points] == [0, 1, 2, 4, 8]
    assert [point["correct"] for point in points] == [36, 34, 32, 28, 20]


def test_loss_surfaces_are_the_loss_where_they_say():
    weights = jnp.array([[1.0, -2.0], [0.5, 1.0], [-1.5, 0.25]]).T[:, None, None]  # [2, 1, 1, 3]

    def logits_fn(images):
        return jnp.tensordot(images, weights[:, 0, 0], ([3], [1]))[:, 0, 0]

    images, labels = jnp.array([[[[0.5, 0.4, 0.6]]], [[[0.02, 0.5, 0.5]]]]), jnp.array([0, 1])
    losses, margins = gradient_masking.loss_surface(logits_fn, jax.random.key(0), images, labels, epsilon=0.05, size=5)
    # With two classes the loss's gradient has the sign of the wrong class's weights less the true one's.
    direction = jnp.sign(weights[1] - weights[0])[0] * jnp.array([[1.0], [-1.0]])
    for i in range(2):
        for column, s in enumerate(np.linspace(-1, 1, 5)):
            logits = logits_fn(jnp.clip(images[i] + 0.05 * s * direction[i][None, None], 0, 1)[None])[0]
            own, other = logits[labels[i]], logits[1 - labels[i]]
            np.testing.assert_allclose(margins[i, 2, column], own - other, atol=1e-6)  # float32
            np.testing.assert_allclose(losses[i, 2, column], jnp.log1p(jnp.exp(other - own)), atol=1e-6)
    # The random signs are another direction: the first column of points isn't the middle one's.
    assert not np.allclose(losses[:, 0, 2], losses[:, 2, 2])
