"""The PyTorch implementation of the benchmark computes the same as the authors' code."""

import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from experiments.benchmarks import torch_feature_scatter as peer  # noqa: E402

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def recorded():
    with np.load(GOLDEN / "wrn_10_1.npz") as arrays:
        return {name: torch.tensor(array).double() for name, array in arrays.items()}


@pytest.fixture
def net(recorded):
    weights = {name.removeprefix("weights/"): a for name, a in recorded.items() if name.startswith("weights/")}
    net = peer.make(10, 1).double()
    net.load_state_dict(weights)
    return net


def test_logits_and_features_equal_the_recorded_ones(net, recorded):
    logits, features = net.eval()(recorded["x_nchw"])
    # float64 in both; only the order of sums can differ.
    torch.testing.assert_close(logits, recorded["eval_logits"], atol=1e-12, rtol=0)
    torch.testing.assert_close(features, recorded["eval_features"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("step", [peer.feature_scatter_step, peer.minimal_step])
def test_two_training_steps_equal_the_recorded_ones(net, recorded, step):
    optimizer = peer.make_optimizer(net)
    for k in (0, 1):
        result = step(net, optimizer, recorded["x_nchw"], recorded["labels"].long(), recorded[f"fs{k}_noise_nchw"])
        # The signs of the gradient are equal, so the images are too. The authors' plan, and so the recorded loss and
        # weights, are in float32.
        torch.testing.assert_close(result.scattered, recorded[f"fs{k}_adv_nchw"], atol=1e-6, rtol=0)
        torch.testing.assert_close(result.loss, recorded[f"fs{k}_loss"], atol=1e-6, rtol=0)
        after = {n.removeprefix(f"fs{k}_after/"): a for n, a in recorded.items() if n.startswith(f"fs{k}_after/")}
        for name, value in net.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(value, after[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("reg", [0.01, 0.05, 0.5])
def test_the_released_sinkhorn_equals_the_recorded_one(reg):
    with np.load(GOLDEN / "ot_n7.npz") as arrays:
        cost = torch.tensor(arrays["cost"])
        plan = peer.released_sinkhorn(cost, reg)
        assert plan.num_iters == arrays[f"sinkhorn_{reg}_iters"]
        np.testing.assert_allclose(plan.plan, arrays[f"sinkhorn_{reg}_plan"], atol=1e-7)  # recorded in float32
