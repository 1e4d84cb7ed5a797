"""Suites: lists of attacks by name."""

from typing import Any

from fs_jax._utils.validation import check_choice
from fs_jax.attacks.autoattack import autoattack_attacks
from fs_jax.attacks.registry import Attack

SUITES = ("paper", "autoattack", "gradient-free", "all")


def suite(
    name: str,
    *,
    epsilon: float = 8 / 255,
    step_size: float | None = None,
    gradient_free_images: int | None = 100,
    num_directions: int = 128,
    num_classes: int = 10,
) -> list[Attack]:
    """The attacks of a suite, in order; the first is the clean images.

    - "paper": FGSM, PGD and CW as the paper reports them. With 20 and 100 steps the last iterate decides, as in the
      paper's code, so that numbers can be compared. With 500 and 1000 steps there are 5 restarts and any iterate
      counts, which is stronger.
    - "autoattack": the standard version. Each attack is run on the images that the earlier ones didn't misclassify; its
      accuracy counts the earlier ones too.
    - "gradient-free": SPSA; local search as published, which has no radius and is excluded from the worst case; and
      local search projected on the ball. (Square is in AutoAttack.) They need so many forward passes that only the
      first images are attacked.
    - "all": all of these.

    Args:
      name: One of `SUITES`.
      epsilon: Radius, in units of [0, 1].
      step_size: Step size of PGD and CW; epsilon / 4 by default, as in the paper.
      gradient_free_images: Number of images that the gradient-free attacks are run on; None for all.
      num_directions: Directions in each step of SPSA.
      num_classes: Number of classes of the network.

    Raises:
      ValueError: for an unknown name, with the nearest known one.

    Example:
      >>> [attack.name for attack in suite("autoattack")]
      ['clean', 'apgd-ce', 'apgd-t', 'fab-t', 'square']
    """
    check_choice("suite", name, SUITES)
    few: dict[str, Any] = {"num_images": gradient_free_images, "after": ("clean",)}
    chosen = [Attack("clean")]
    if name in ("paper", "all"):
        chosen += [
            Attack("fgsm", epsilon),
            *(
                Attack(kind, epsilon, step_size=step_size, num_steps=steps)
                for kind in ("pgd", "cw")
                for steps in (20, 100)
            ),
            *(
                Attack(kind, epsilon, step_size=step_size, num_steps=steps, restarts=5, any_iterate=True)
                for kind in ("pgd", "cw")
                for steps in (500, 1000)
            ),
        ]
    if name in ("autoattack", "all"):
        chosen += autoattack_attacks(epsilon=epsilon, num_classes=num_classes)[1:]
    if name in ("gradient-free", "all"):
        chosen += [
            Attack("spsa", epsilon, num_directions=num_directions, **few),
            Attack("local-search", epsilon, **few),
            Attack("local-search-projected", epsilon, **few),
        ]
    return chosen
