"""Suites: attacks that are run together, in their order."""

from typing import Any

from fs_jax._utils.validation import check_choice
from fs_jax.attacks.autoattack import autoattack_attacks
from fs_jax.attacks.registry import Attack

# The command line has these names once more, in `experiments.evaluate.Arguments`.
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
    """The attacks of a suite, in their order; the first is the clean image.

    - "paper": FGSM, PGD and CW as the paper reports them. With 20 and 100 steps the last iterate decides, as in the
      paper's code, so that numbers can be compared; with 500 and 1000 steps there are 5 starts and any iterate counts,
      which is stronger.
    - "autoattack": the standard version, each attack on the images that those before it didn't break; its accuracy
      is that after it.
    - "gradient-free": SPSA; local search, whose changes no radius bounds, and which is reported apart; and local search
      projected on the ball. (Square is AutoAttack's.) They ask the network so often that only the first images are
      attacked.
    - "all": all these.

    Args:
      name: One of `SUITES`.
      epsilon: Radius, in units of [0, 1].
      step_size: Step of PGD and CW; epsilon / 4 by default, as in the paper.
      gradient_free_images: How many images the gradient-free attacks are run on; None for all.
      num_directions: Of SPSA, in each step.
      num_classes: Classes of the network.

    Raises:
      ValueError: for another name, with the nearest one.

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
