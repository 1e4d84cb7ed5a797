"""Results of the paper's experiments, as a worker writes them."""

import json

from experiments.paper import jobs
from experiments.paper.scales import scale_of

ENVIRONMENT = {"device": "cpu", "cpu_count": 2, "jax": "0", "commit": "abc"}


def evaluated(right, chain=("clean", "pgd-20")):
    """An evaluation in which image i is robust to the first right[i] attacks only."""
    attacks = [{"name": name, "after": [], "num_images": None, "seconds": 1.0 / len(chain)} for name in chain]
    records = [{"misclassified_at": {n: -1 if k < count else 0 for k, n in enumerate(chain)}} for count in right]
    return {"attacks": attacks, "records": records, "environment": ENVIRONMENT}


def finish(name, scale, workdir, rows=None, dataset=None):
    """Write results of an experiment's rows, with 15 of 20 images robust to all attacks."""
    experiment, scale = jobs.experiment(name), scale_of(scale, dataset)
    for row in experiment.rows[:rows]:
        for config in jobs.configurations(experiment, scale, row, [0]):
            path = jobs.result_file(jobs.folder_of(workdir, scale, config), scale, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            names = [attack for attack, *_ in experiment.measurement.settings(scale)]
            result = evaluated([len(names)] * 15 + [1] * 5, names)
            path.write_text(json.dumps({"seconds": 1.0, "restored": False, **result}), encoding="utf-8")
            jobs.training_file(path.parent).write_text(json.dumps({"hours": 6 / 3600}), encoding="utf-8")
