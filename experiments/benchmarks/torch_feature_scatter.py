"""Feature-scattering training in eager PyTorch, to compare times with.

`feature_scatter_step` makes the same passes as the authors' code, in this order:

1. a copy of the network in inference mode, for the attack;
2. three forward passes of the clean images through the copy; the third gives the logits that the transport starts from;
3. a forward pass of the noisy images, the transport cost between the two sets of logits, and one plain `backward()`:
   besides the gradient of the images, this computes the unused gradients of all weights through both sets of logits;
4. a forward and backward pass of the scattered images in training mode, and a step of SGD;
5. in logged steps, a forward pass of the clean images in training mode, which updates BatchNorm's averages.

The unused passes are kept on purpose. `minimal_step` computes the same without them. Written from the
paper (Zhang & Wang, "Defense against adversarial attacks using feature scattering-based adversarial training", NeurIPS
2019) and checked against recorded outputs of the authors' code: logits, attacked images, loss and weights after each of
two steps agree to 1e-6 in float64.

Needs only torch. Images here are NCHW in [-1, 1], so a radius of 8/255 on [0, 1] is 16/255.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 16 / 255


class BasicBlock(nn.Module):
    """A pre-activation residual block of two 3x3 convolutions, with a 1x1 shortcut if the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, padding=1, bias=False)
        same = in_channels == out_channels and stride == 1
        self.convShortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H / stride, W / stride]."""
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))


class Group(nn.Module):
    """A group of blocks of the same width. The first block may halve the resolution."""

    def __init__(self, num_blocks: int, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        strides = [stride] + [1] * (num_blocks - 1)
        self.layer = nn.Sequential(
            *(BasicBlock(w, out_channels, s) for w, s in zip(widths, strides, strict=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks in order."""
        return self.layer(x)


class WideResNet(nn.Module):
    """Wide-ResNet for 32x32 images (Zagoruyko & Komodakis, 2016), with the parameter names of the authors' code."""

    def __init__(self, depth: int, width: int, classes: int):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth: expected 6n + 4 with n >= 1 (10, 16, 22, 28, ...), got {depth}")
        num_blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, padding=1, bias=False)
        self.block1 = Group(num_blocks, 16, 16 * width, 1)
        self.block2 = Group(num_blocks, 16 * width, 32 * width, 2)
        self.block3 = Group(num_blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al.'s normal initialisation, by fan-out
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [N, 3, H, W] in [-1, 1] to logits [N, classes] and features [N, 64 width]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        features = F.relu(self.bn1(x), inplace=True).mean((2, 3))
        return self.fc(features), features


def make(depth: int, width: int, classes: int = 10) -> WideResNet:
    """A network with random weights, in training mode. `make(28, 10)` is the paper's."""
    return WideResNet(depth, width, classes)


def make_optimizer(
    net: nn.Module, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 2e-4
) -> torch.optim.SGD:
    """SGD with momentum, and weight decay on all parameters, including those of BatchNorm."""
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """Cosine cost max(0, 1 - cos) [n, m] between the rows of x [n, d] and y [m, d]."""
    return (1 - F.normalize(x, dim=1) @ F.normalize(y, dim=1).T).clamp(min=0)


class Plan(NamedTuple):
    """A transport plan [n, m], its potentials [n] and [m], and the number of iterations."""

    plan: Tensor
    u: Tensor
    v: Tensor
    num_iters: int


def released_sinkhorn(cost: Tensor, reg: float = 0.01, max_iters: int = 100, threshold: float = 0.1) -> Plan:
    """Sinkhorn as in the authors' code: rows first, 1e-6 in each logarithm, stops when u changes by < `threshold`.

    It stops after a few iterations, before the plan has the right marginals.
    """
    n, m = cost.shape
    u, v = cost.new_zeros(n), cost.new_zeros(m)

    def log_plan() -> Tensor:
        return (u[:, None] + v[None, :] - cost) / reg

    num_iters, moved = 0, math.inf
    while num_iters < max_iters and moved >= threshold:
        previous = u
        u = u + reg * (-math.log(n) - torch.log(log_plan().exp().sum(1) + 1e-6))
        v = v + reg * (-math.log(m) - torch.log(log_plan().exp().sum(0) + 1e-6))
        moved = (u - previous).abs().sum().item()
        num_iters += 1
    return Plan(log_plan().exp(), u, v, num_iters)


def sinkhorn(cost: Tensor, reg: float = 0.01, num_iters: int = 50) -> Plan:
    """Algorithm 1 in the log domain, with uniform marginals: columns, then rows, for a fixed number of iterations."""
    n, m = cost.shape
    u, v = cost.new_zeros(n), cost.new_zeros(m)
    for _ in range(num_iters):
        v = reg * (-math.log(m) - torch.logsumexp((u[:, None] - cost) / reg, 0))
        u = reg * (-math.log(n) - torch.logsumexp((v[None, :] - cost) / reg, 1))
    return Plan(((u[:, None] + v[None, :] - cost) / reg).exp(), u, v, num_iters)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy with probability 1 - smoothing for the true class and smoothing / (C - 1) for the others."""
    classes = logits.shape[1]
    targets = torch.full_like(logits, smoothing / (classes - 1))
    targets.scatter_(1, labels[:, None], 1 - smoothing)
    return -(targets * F.log_softmax(logits, 1)).sum(1).mean()


def inference_copy(net: nn.Module) -> nn.Module:
    """A copy of the network in inference mode, with its own weight gradients."""
    frozen = copy.deepcopy(net)
    frozen.zero_grad()
    return frozen.eval()


def scatter(
    net: nn.Module,
    images: Tensor,
    noise: Tensor,
    *,
    epsilon: float = EPSILON,
    step_size: float = EPSILON,
    num_steps: int = 1,
    transport: Callable[[Tensor], Plan] = released_sinkhorn,
) -> Tensor:
    """Attack images [N, 3, H, W] to increase the optimal-transport distance between their logits and the clean ones.

    Args:
        net: a network in inference mode, whose weight gradients are overwritten.
        images: clean images in [-1, 1].
        noise: [N, 3, H, W], added at the start, which is not clipped to [-1, 1].
        epsilon: radius of the ball, on [-1, 1] images.
        step_size: length of a step along the sign of the gradient.
        num_steps: number of steps; the paper trains with one.
        transport: function from a cost matrix to a plan. The gradient goes through its iterations and the plan.

    Returns:
        The scattered images, detached.
    """
    for _ in range(2):  # two natural passes whose logits are not used
        net(images)
    natural, _ = net(images)
    x = images + noise
    for step in range(num_steps):
        x.requires_grad_()
        logits, _ = net(x)
        cost = cosine_cost(natural, logits)
        distance = (transport(cost).plan * cost).sum()
        net.zero_grad()
        distance.backward(retain_graph=step < num_steps - 1)
        assert x.grad is not None
        x = moved(x.detach(), x.grad, images, step_size, epsilon)
    return x


def moved(x: Tensor, gradient: Tensor, images: Tensor, step_size: float, epsilon: float) -> Tensor:
    """A step along the sign of the gradient, projected onto the ball around the images and onto [-1, 1]."""
    x = x + step_size * gradient.sign()
    return torch.minimum(torch.maximum(x, images - epsilon), images + epsilon).clamp(-1, 1)


class StepResult(NamedTuple):
    """The mean loss, the logits of the scattered images in training mode [N, C], and the scattered images."""

    loss: Tensor
    logits: Tensor
    scattered: Tensor


def feature_scatter_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    noise: Tensor | None = None,
    *,
    epsilon: float = EPSILON,
    step_size: float = EPSILON,
    num_steps: int = 1,
    smoothing: float = 0.5,
    transport: Callable[[Tensor], Plan] = released_sinkhorn,
    log_pass: bool = False,
) -> StepResult:
    """One training step; `net` and `optimizer` change in place.

    Args:
        net: the network. It is in training mode afterwards.
        optimizer: holds the network's parameters.
        images: [N, 3, H, W] in [-1, 1].
        labels: [N], int64.
        noise: [N, 3, H, W] in [-epsilon, epsilon]; by default drawn uniformly.
        epsilon: the attack's radius on [-1, 1] images.
        step_size: the attack's step size.
        num_steps: the attack's number of steps.
        smoothing: total probability of the wrong classes in the targets.
        transport: `released_sinkhorn`, or `sinkhorn` for Algorithm 1.
        log_pass: also pass the clean images in training mode, as the authors' code does in logged steps.

    Returns:
        Loss, logits and scattered images, before the update of the weights.
    """
    if noise is None:
        noise = torch.empty_like(images).uniform_(-epsilon, epsilon)
    scattered = scatter(
        inference_copy(net),
        images,
        noise,
        epsilon=epsilon,
        step_size=step_size,
        num_steps=num_steps,
        transport=transport,
    )
    result = descend(net, optimizer, scattered, labels, smoothing)
    if log_pass:
        net(images)
    return result


def descend(
    net: nn.Module, optimizer: torch.optim.Optimizer, scattered: Tensor, labels: Tensor, smoothing: float
) -> StepResult:
    """Update the weights on attacked images."""
    net.train()
    optimizer.zero_grad()
    logits, _ = net(scattered)
    loss = smoothed_cross_entropy(logits, labels, smoothing)
    loss.backward()
    optimizer.step()
    return StepResult(loss.detach(), logits.detach(), scattered)


def minimal_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    noise: Tensor | None = None,
    *,
    epsilon: float = EPSILON,
    step_size: float = EPSILON,
    smoothing: float = 0.5,
    transport: Callable[[Tensor], Plan] = released_sinkhorn,
) -> StepResult:
    """`feature_scatter_step` with one attack step, in three forward and two backward passes.

    For channels last, pass a network and images converted by `to(memory_format=torch.channels_last)`.
    """
    if noise is None:
        noise = torch.empty_like(images).uniform_(-epsilon, epsilon)
    net.eval().requires_grad_(False)
    with torch.no_grad():
        natural, _ = net(images)
    x = (images + noise).requires_grad_()
    cost = cosine_cost(natural, net(x)[0])
    (gradient,) = torch.autograd.grad((transport(cost).plan * cost).sum(), x)
    scattered = moved(x.detach(), gradient, images, step_size, epsilon)
    net.requires_grad_(True)
    return descend(net, optimizer, scattered, labels, smoothing)
