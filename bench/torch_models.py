"""torch models before and after `cpunorm.torch.accelerate`, side by side.

``python -m bench.torch_models``: an inference and a training step of a residual net (batch norm), a
U-Net (group norm), a ConvNeXt (layer norm over channels) and a transformer (layer norm). Each model
is there as torch has it, accelerated, and with its norms left out, which tells their share. They
are timed in turn, and medians are compared. With ``--modules``: the norms alone, each forward and
with its backward pass.
"""

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator

with warnings.catch_warnings():  # torch's affair
    warnings.simplefilter("ignore")
    import torch
from torch import nn

import cpunorm.torch

from .turns import compared, header, row, seconds

NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


class Residual(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inside(x)


def residual_net() -> nn.Module:
    def block(c: int) -> nn.Module:
        layers = (nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())
        return Residual(nn.Sequential(*layers, *copy.deepcopy(layers)[:2]))

    def stage(c: int, width: int) -> list[nn.Module]:
        down = nn.Conv2d(c, width, 3, stride=2, padding=1, bias=False)
        return [down, nn.BatchNorm2d(width), nn.ReLU(), block(width), nn.ReLU(), block(width)]

    return nn.Sequential(*stage(3, 64), *stage(64, 128), *stage(128, 256))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def level(c: int, width: int) -> nn.Module:
            conv = nn.Conv2d(c, width, 3, padding=1)
            again = nn.Conv2d(width, width, 3, padding=1)
            return nn.Sequential(
                conv, nn.GroupNorm(8, width), nn.SiLU(), again, nn.GroupNorm(8, width), nn.SiLU()
            )

        self.down = nn.ModuleList([level(3, 32), level(32, 64)])
        self.bottom = level(64, 128)
        self.up = nn.ModuleList([level(128 + 64, 64), level(64 + 32, 32)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for level in self.down:
            x = level(x)
            kept.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for level in self.up:
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = level(torch.cat([x, kept.pop()], 1))
        return x


class Permuted(nn.Module):
    """Layer norm over channels as torch's users write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OverChannels(nn.LayerNorm):
    """The same in one pass over x where it lies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cpunorm.torch.layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps, axis=1
        )


def convnext(norm: Callable[[int], nn.Module] = Permuted) -> nn.Module:
    def block(c: int) -> nn.Module:
        mix = nn.Conv2d(c, c, 7, padding=3, groups=c)
        return Residual(
            nn.Sequential(mix, norm(c), nn.Conv2d(c, 4 * c, 1), nn.GELU(), nn.Conv2d(4 * c, c, 1))
        )

    return nn.Sequential(
        nn.Conv2d(3, 64, 4, stride=4), norm(64), block(64), block(64),
        norm(64), nn.Conv2d(64, 128, 2, stride=2), block(128), block(128),
    )  # fmt: skip


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.take, self.give = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.take(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(*split)
        return self.give(found.transpose(1, 2).flatten(2))


def transformer() -> nn.Module:
    def block(c: int) -> list[nn.Module]:
        perceptron = (nn.LayerNorm(c), nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        attend = nn.Sequential(nn.LayerNorm(c), Attention(c, 4))
        return [Residual(attend), Residual(nn.Sequential(*perceptron))]

    return nn.Sequential(*block(256), *block(256), *block(256))


def accelerated(model: nn.Module) -> nn.Module:
    return cpunorm.torch.accelerate(copy.deepcopy(model))


def over_channels(model: nn.Module) -> nn.Module:
    ours = convnext(OverChannels)
    ours.load_state_dict(dict(zip(ours.state_dict(), model.state_dict().values(), strict=True)))
    return ours


def without_norms(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NORMS):
                setattr(parent, name, nn.Identity())
    return model


IMAGES = (16, 3, 96, 96)
CASES = [
    ("residual net, batch norm", residual_net, accelerated, IMAGES, None),
    ("the same, channels_last", residual_net, accelerated, IMAGES, torch.channels_last),
    ("U-Net, group norm", UNet, accelerated, IMAGES, None),
    ("ConvNeXt, permute and layer norm", convnext, accelerated, IMAGES, None),
    ("the same, layer_norm(axis=1)", convnext, over_channels, IMAGES, None),
    ("transformer, layer norm", transformer, accelerated, (16, 128, 256), None),
]


CALLS = 10  # of a module in a block
MODULES = [
    ("instance norm", lambda: nn.InstanceNorm2d(64, affine=True), (4, 64, 48, 48), None),
    ("RMS norm", lambda: nn.RMSNorm(256), (8, 128, 256), None),
    ("group norm", lambda: nn.GroupNorm(8, 32), (4, 32, 96, 96), None),
    ("batch norm", lambda: nn.BatchNorm2d(64), (4, 64, 48, 48), None),
    ("batch norm, channels_last", lambda: nn.BatchNorm2d(64), (4, 64, 48, 48), torch.channels_last),
    ("layer norm", lambda: nn.LayerNorm(256), (8, 128, 256), None),
    ("layer norm", lambda: nn.LayerNorm(768), (16, 128, 768), None),
]


def inference(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    model.eval()

    def step() -> object:
        with torch.no_grad():
            return model(x)

    return step


def forward(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Return a call of the module as it is built, that is, in training."""

    def step() -> object:
        with torch.no_grad():
            return module(x)

    return step


def forward_and_backward(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    x, grad_y = x.clone().requires_grad_(), torch.ones_like(x)
    return lambda: module(x).backward(grad_y)


def training(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def models(blocks: int) -> Iterator[str]:
    """Yield a line for each step of every model."""
    yield header("model", "step", "torch", "accelerated", "ratio", "norms' share before", "after")
    for name, make, faster, shape, memory_format in CASES:
        torch.manual_seed(0)
        model, x = make(), torch.randn(shape)
        variants = [model, faster(model), without_norms(model)]
        if memory_format is not None:
            x = x.to(memory_format=memory_format)
            variants = [v.to(memory_format=memory_format) for v in variants]
        for kind in (inference, training):
            before, after, bare = seconds([kind(v, x) for v in variants], blocks)
            shares = (f"{max(0.0, 1 - bare / with_norms):.0%}" for with_norms in (before, after))
            yield row(name, kind.__name__, *compared(before, after), *shares)


def modules(blocks: int) -> Iterator[str]:
    """Yield a line for every module alone."""
    yield header("module", "forward: torch", "accelerated", "ratio", "and backward", "", "ratio")
    for name, make, shape, memory_format in MODULES:
        torch.manual_seed(0)
        module, x = make(), torch.randn(shape)
        if memory_format is not None:
            x = x.to(memory_format=memory_format)
        both = [module, accelerated(module)]
        cells = [
            cell
            for kind in (forward, forward_and_backward)
            for cell in compared(*seconds([kind(m, x) for m in both], blocks, CALLS))
        ]
        yield row(f"{name} {shape}", *cells)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.torch_models", description=__doc__)
    parser.add_argument("--blocks", type=int, default=9, help="measurements of each")
    parser.add_argument("--modules", action="store_true", help="norms alone")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, milliseconds")
    for line in (modules if options.modules else models)(options.blocks):
        print(line, flush=True)


if __name__ == "__main__":
    main()
