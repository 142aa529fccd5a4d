"""From the pixels of an image to a vector for each patch: one linear map, or a convolutional stem."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from troodon.model.config import ViTConfig, stem_widths

# Shape suffixes: B images, C colours, H and W pixels, h and w rows and columns of patches, p pixels of a patch,
#                 D channels of a token.


class PatchEmbed(nn.Module):
    """One linear map of the pixels of each patch."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.patch = config.patch
        self.proj = nn.Conv2d(config.channels, config.dim, config.patch, config.patch)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h * w, D), row by row. A matrix product, as patches do not overlap."""
        if type(self.proj) is not nn.Conv2d:  # an adapter around it
            return self.proj(images_BCHW).flatten(2).transpose(1, 2)
        p = self.patch
        x_BhwCpp = images_BCHW.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(x_BhwCpp.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)

    def initialize(self) -> None:
        self.proj.reset_parameters()


class ConvolutionalStem(nn.Module):
    """3 x 3 convolutions, each of which halves the sides and is followed by ReLU, then a 1 x 1 one
    (https://arxiv.org/abs/2106.14881). Without normalisation, so that images do not depend on one another and nothing
    but weights has to be kept."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        widths = (config.channels, *stem_widths(config))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in zip(widths, widths[1:])
        )
        self.proj = nn.Conv2d(widths[-1], config.dim, 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h * w, D), row by row."""
        x_BDhw = images_BCHW.contiguous(memory_format=torch.channels_last)  # convolutions are fastest in it
        for convolution in self.convolutions:
            x_BDhw = F.relu(convolution(x_BDhw))
        return self.proj(x_BDhw).flatten(2).transpose(1, 2)

    def initialize(self) -> None:
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            nn.init.zeros_(convolution.bias)
        nn.init.trunc_normal_(self.proj.weight, std=self.proj.in_channels**-0.5)
        nn.init.zeros_(self.proj.bias)


STEMS = {"linear": PatchEmbed, "convolutional": ConvolutionalStem}
