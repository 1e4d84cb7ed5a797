"""Results of the paper's experiments, as a worker writes them."""

import json

from experiments.paper import jobs
from experiments.paper.scales import scale_of

ENVIRONMENT = {"device": "cpu", "cpu_count": 2, "jax": "0", "commit": "abc"}


def evaluated(right, chain=("clean", "pgd-20")):
    """An evaluation in which image i is robust to the first right[i] attacks only."""
    attacks = [{"name": name, "after": [], "num_images": None, "seconds": 1.0 / len(chain)} for name in chain]
    records = [{"misclassified_at": {n: -1 if k < count else 0 for k, n in enumerate(chain)}} for count in right]
    about = {"environment": ENVIRONMENT, "weights": "a fingerprint", "restored": False, "training_hours": 0.25}
    return {"attacks": attacks, "records": records, **about}


def finish(name, scale, workdir, rows=None, dataset=None, robust=15):
    """Write results of an experiment's rows, with some of 20 images robust to all attacks, by default 15."""
    experiment, scale = jobs.experiment(name), scale_of(scale, dataset)
    for row in experiment.rows[:rows]:
        for config in jobs.configurations(experiment, scale, row, [0]):
            path = jobs.result_file(jobs.folder_of(workdir, scale, config), scale, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            names = [attack for attack, *_ in experiment.measurement.settings(scale)]
            result = evaluated([len(names)] * robust + [1] * (20 - robust), names)
            path.write_text(json.dumps({"seconds": 1.0, **result}), encoding="utf-8")
