"""Write the golden files beside this script: tiny VGGs with torchvision's modules, and what torch makes of one image.

Made with torch 2.13.0, torchvision 0.28.0 and safetensors; run it where these are installed: ``python make_golden.py``.
The networks are torchvision's own VGG class and configurations; widths, units and classes are made small, so that the
weights fit into the repository. Weights and BatchNorm statistics are random and far from their
defaults.
For each network: NAME.safetensors (its state dict) and NAME.npy, (2, classes) float32: logits and probabilities.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from image import build_image
from safetensors.torch import save
from torch import nn
from torchvision.models import vgg

FOLDER = Path(__file__).parent
NARROW = {64: 2, 128: 3, 256: 4, 512: 5}
UNITS = 7
CLASSES = 5
NETWORKS = {"vgg11": ("A", False), "vgg11_bn": ("A", True), "vgg16": ("D", False)}
"""torchvision's configuration, and whether a BatchNorm follows each convolution."""


def build_network(configuration: str, has_norms: bool) -> nn.Module:
    widths = [each if each == "M" else NARROW[each] for each in vgg.cfgs[configuration]]
    network = vgg.VGG(vgg.make_layers(widths, batch_norm=has_norms), num_classes=CLASSES, init_weights=False)
    channels = NARROW[512]
    for place, inputs, outputs in ((0, channels * 7 * 7, UNITS), (3, UNITS, UNITS), (6, UNITS, CLASSES)):
        network.classifier[place] = nn.Linear(inputs, outputs)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the first image's statistics count in full
    return network


def randomise(network: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            inputs = module.weight[0].numel()
            module.weight.data.normal_(0, (2 / inputs) ** 0.5, generator=draw)
            module.bias.data.normal_(0, 0.2, generator=draw)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=draw)
            module.bias.data.normal_(0, 0.3, generator=draw)


def set_statistics(network: nn.Module, images: torch.Tensor, seed: int) -> None:
    """Give every BatchNorm the statistics of ``images``, not quite right, as those of other images would be."""
    draw = torch.Generator().manual_seed(seed)
    features = list(network.features)
    for before, norm in pairwise(features):
        if isinstance(norm, nn.BatchNorm2d):
            # Channels with little variance: there the epsilon, which differs between the libraries, counts most.
            scale = torch.empty(norm.num_features).uniform_(-6, 0, generator=draw).exp()
            before.weight.data *= scale[:, None, None, None]
            before.bias.data *= scale
    network.features(images)
    for norm in features:
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean += (
                torch.empty(norm.num_features).normal_(0, 0.2, generator=draw) * norm.running_var.sqrt()
            )
            norm.running_var *= torch.empty(norm.num_features).uniform_(0.7, 1.4, generator=draw)


def main() -> None:
    pixels = torch.from_numpy(build_image()).permute(2, 0, 1)[None] / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (pixels - mean[:, None, None]) / deviation[:, None, None]
    for seed, (name, (configuration, has_norms)) in enumerate(NETWORKS.items()):
        network = build_network(configuration, has_norms)
        randomise(network, seed)
        with torch.no_grad():
            if has_norms:
                set_statistics(network, images, seed)
            network.eval()
            logits = network(images)
        (FOLDER / f"{name}.safetensors").write_bytes(save(network.state_dict()))
        answers = torch.cat([logits, torch.softmax(logits, dim=1)]).numpy()
        np.save(FOLDER / f"{name}.npy", answers)


if __name__ == "__main__":
    main()
