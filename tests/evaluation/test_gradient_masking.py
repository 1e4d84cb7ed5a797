"""The checklist says no if gradients mislead, yes if they don't, and "not tested" for missing attacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fs_jax.evaluation import accuracy, gradient_masking

pytestmark = pytest.mark.usefixtures("small_programs", "one_batch_size")

TOTAL = 40
UNBOUNDED, RADII, STEPS, BLACK_BOX, TRANSFER, SURFACE, GAP = range(7)


def evaluation(**robust):
    """Summary and records of attacks by name, with the number of robust images, which are the first ones."""
    attacks = [
        {
            "name": name, "kind": kind, "epsilon": epsilon, "apart": apart, "after": after,
            "uses_gradients": kind not in ("clean", "square", "transfer"),
            **accuracy(np.arange(TOTAL) < count),
        }
        for name, (count, kind, epsilon, apart, after) in robust.items()
    ]  # fmt: skip
    worst = min(of[0] for of in robust.values() if not of[3])
    records = [
        {
            "robust": i < worst,
            "margin": {name: 1.0 if i < of[0] else -1.0 for name, of in robust.items()},
            "misclassified_at": {name: -1 if i < of[0] else 0 for name, of in robust.items()},
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


RISING = np.tile(np.array([0.0, 1.0, 2.0]), (10, 3, 1))  # along the gradient only


def verdicts(losses=RISING, **changed):
    return [check.verdict for check in gradient_masking.checklist(*honest(**changed), losses)]


def test_a_network_without_gradient_masking_passes_all_checks():
    assert verdicts() == ["yes"] * 7


@pytest.mark.parametrize(
    ("check", "changed", "said"),
    [
        (UNBOUNDED, {gradient_masking.UNBOUNDED: 1}, "1 of 40 images are robust"),
        (RADII, {"pgd-20 at 8/255": 33}, "85.0%, 80.0%, 70.0%, 82.5%"),
        (STEPS, {"pgd-100": 26}, "pgd-100 misses 6 images that pgd-20 finds, and finds 0 others"),
        (BLACK_BOX, {"square": 19}, "3 attacks with gradients; square tried 20 of these and broke 1"),
        (TRANSFER, {"transfer": 19}, "47.5% under adversaries of the other network, 50.0% under PGD-20"),
        (SURFACE, {"losses": RISING[..., ::-1]}, "in 0 of 10 images"),
        (SURFACE, {"losses": np.swapaxes(RISING, 1, 2)}, "in 0 of 10 images"),
        (GAP, {"square": 17}, "all attacks together 42.5%: PGD-20 alone overstates this network by 7.5"),
    ],
)  # fmt: skip
def test_each_check_says_no_for_its_sign_of_masking(check, changed, said):
    losses = changed.get("losses", RISING)
    checks = gradient_masking.checklist(*honest(**{k: v for k, v in changed.items() if k != "losses"}), losses)
    assert checks[check].verdict == "no"
    assert said in checks[check].why


def test_differences_of_a_few_images_are_chance():
    # PGD-100 misses 4 images that PGD-20 finds, and finds no others: by chance, this happens in 1 of 16 cases.
    assert verdicts(**{"pgd-100": 24})[STEPS] == "yes"
    assert verdicts(**{"pgd-100": 25})[STEPS] == "no"


def test_a_larger_radius_may_find_fewer_images_by_chance():
    assert verdicts(**{"pgd-20 at 8/255": 32})[RADII] == "yes"
    assert verdicts(**{"pgd-20 at 8/255": 33})[RADII] == "no"


def test_the_sweep_gives_the_gap_if_pgd_20_was_not_run():
    # The other attacks here have radius 0.1; so does the sweep's at 25.5/255.
    alone = {"pgd-20": None, "fgsm": None, "pgd-100": None, f"{gradient_masking.SWEEP}25.5/255": 26}
    check = gradient_masking.checklist(*honest(**alone))[GAP]
    assert check.verdict == "no"
    assert "PGD-20 65.0%, " in check.why
    assert check.why.endswith("by 15.0 points; 23% of the images that are robust to PGD-20 aren't robust to all")


def test_an_attack_on_few_images_does_not_select_the_images_of_the_gap():
    # SPSA attacks the first 10 images and breaks 5. Whether the other robust images are robust to it is unknown.
    summary, records = honest()
    few = {"name": "spsa", "kind": "spsa", "num_images": 10, "uses_gradients": False, "after": ("clean",)}
    summary["attacks"].append({**summary["attacks"][0], **few, **accuracy(np.arange(10) < 5)})
    for i, record in enumerate(records):
        record["misclassified_at"] |= {"spsa": -1 if i < 5 else 3} if i < 10 else {}
        record["robust"] = None if record["robust"] and i >= 10 else record["robust"] and i < 5
    check = gradient_masking.checklist(summary, records)[GAP]
    assert check.verdict == "yes"
    assert check.why.startswith("PGD-20 50.0%, AutoAttack 50.0%, all attacks together 50.0%")


def test_checks_without_their_attacks_are_not_tested():
    gone = dict.fromkeys(["fgsm", "pgd-100", "square", "transfer", gradient_masking.UNBOUNDED])
    gone |= {f"{gradient_masking.SWEEP}{level}/255": None for level in (1, 2, 4, 8)}
    assert verdicts(losses=None, **gone) == ["not tested"] * 7


def test_the_sweep_has_the_radius_of_the_evaluation_once():
    names = [attack.name for attack in gradient_masking.radius_attacks(10, 8 / 255)]
    assert names == [*(f"pgd-20 at {level}/255" for level in (1, 2, 4, 6, 8, 12, 16)), gradient_masking.UNBOUNDED]
    assert "pgd-20 at 0.03" in [attack.name for attack in gradient_masking.radius_attacks(10, 0.03)]
    assert [attack.name for attack in gradient_masking.radius_attacks(10, 0.0)] == names


def test_the_sweep_starts_with_the_clean_images():
    points = gradient_masking.radius_points(*honest())
    assert [round(255 * point["epsilon"]) for point in points] == [0, 1, 2, 4, 8]
    assert [point["correct"] for point in points] == [36, 34, 32, 28, 20]


def test_loss_surfaces_equal_the_loss_at_their_points():
    weights = jnp.array([[1.0, -2.0], [0.5, 1.0], [-1.5, 0.25]]).T[:, None, None]  # [2, 1, 1, 3]

    def logits_fn(images):
        return jnp.tensordot(images, weights[:, 0, 0], ([3], [1]))[:, 0, 0]

    images, labels = jnp.array([[[[0.5, 0.4, 0.6]]], [[[0.02, 0.5, 0.5]]]]), jnp.array([0, 1])
    losses, margins = gradient_masking.loss_surface(logits_fn, jax.random.key(0), images, labels, epsilon=0.05, size=5)
    # With two classes the loss's gradient has the sign of the wrong class's weights minus the true one's.
    direction = jnp.sign(weights[1] - weights[0])[0] * jnp.array([[1.0], [-1.0]])
    for i in range(2):
        for column, s in enumerate(np.linspace(-1, 1, 5)):
            logits = logits_fn(jnp.clip(images[i] + 0.05 * s * direction[i][None, None], 0, 1)[None])[0]
            own, other = logits[labels[i]], logits[1 - labels[i]]
            np.testing.assert_allclose(margins[i, 2, column], own - other, atol=1e-6)  # float32
            np.testing.assert_allclose(losses[i, 2, column], jnp.log1p(jnp.exp(other - own)), atol=1e-6)
    # The random signs are another direction: the first column differs from the middle one.
    assert not np.allclose(losses[:, 0, 2], losses[:, 2, 2])
    with jax.enable_x64(True):
        again, _ = gradient_masking.loss_surface(logits_fn, jax.random.key(0), images, labels, epsilon=0.05, size=5)
    assert again.dtype == losses.dtype
    np.testing.assert_allclose(again, losses, atol=1e-6)  # float32
