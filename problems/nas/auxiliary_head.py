"""The auxiliary head: a second classifier on features of an earlier cell, used only in training."""

from torch import Tensor, nn

from problems.nas.skeleton import StemName


class AuxiliaryHead(nn.Module):
    """A second classifier on the features after two thirds of the cells.

    ReLU, 5x5 average pool, 1x1 convolution to 128 channels, 2x2 convolution to 768 channels, linear layer. As in DARTS,
    the head for ImageNet pools with stride 2 instead of 3 and has no batch norm after the 2x2 convolution.
    """

    def __init__(self, channels: int, classes: int, stem: StemName) -> None:
        super().__init__()
        imagenet = stem == "imagenet"
        self.pool_stride = 2 if imagenet else 3
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=self.pool_stride, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.Identity() if imagenet else nn.BatchNorm2d(768),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, channels, H, W) to class logits, (N, classes). Raises ValueError if H or W is too small."""
        smallest = 5 + self.pool_stride
        if min(features.shape[2:]) < smallest:
            raise ValueError(
                f"the auxiliary head needs feature maps of at least {smallest}x{smallest} (images of "
                f"{4 * smallest}x{4 * smallest} with the CIFAR stem, {32 * smallest}x{32 * smallest} with the ImageNet "
                f"stem) but got {features.shape[2]}x{features.shape[3]}; "
                "use larger images or build the network with auxiliary=False"
            )
        logits: Tensor = self.classifier(self.body(features).mean(dim=(2, 3)))
        return logits
