"""From the pixels of an image to a vector for each patch: one linear map, or a convolutional stem."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from troodon import dist
from troodon.model.config import ViTConfig, stem_widths

# Shape suffixes: B images, C colours or channels, H and W pixels, h and w rows and columns of patches,
#                 p pixels of a patch, D channels of a token.

STATISTICS_MOMENTUM = 0.1  # share of a step's statistics in the running ones
EPS = 1e-5


class PatchEmbed(nn.Module):
    """One linear map of the pixels of each patch."""

    position_std = 0.02  # of learned positions at the start

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
    """3 x 3 convolutions that halve the sides, each with batch normalisation and ReLU, then a 1 x 1 one
    (https://arxiv.org/abs/2106.14881)."""

    position_std = 0.2  # its vectors are larger than those of a linear map, beside which 0.02 would not be seen

    def __init__(self, config: ViTConfig):
        super().__init__()
        widths = (config.channels, *stem_widths(config))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(BatchNorm(width) for width in widths[1:])
        self.proj = nn.Conv2d(widths[-1], config.dim, 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h * w, D), row by row."""
        x_BDhw = images_BCHW.contiguous(memory_format=torch.channels_last)  # convolutions are fastest in it
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x_BDhw = F.relu(norm(convolution(x_BDhw)), inplace=True)
        return self.proj(x_BDhw).flatten(2).transpose(1, 2)

    def initialize(self) -> None:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            nn.init.kaiming_normal_(convolution.get_parameter("weight"), mode="fan_out", nonlinearity="relu")
            norm.initialize()
        nn.init.trunc_normal_(self.proj.weight, std=self.proj.in_channels**-0.5)
        nn.init.zeros_(self.proj.bias)  # pyrefly: ignore[bad-argument-type]


class BatchNorm(nn.Module):
    """Batch normalisation (https://arxiv.org/abs/1502.03167), in training over the images of all ranks, so that their
    number changes nothing. torch's own does that on CUDA devices alone.

    A network that is used, and one that does not learn, take the running statistics.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))

    def initialize(self) -> None:
        for tensor, value in ((self.weight, 1), (self.bias, 0), (self.running_mean, 0), (self.running_var, 1)):
            nn.init.constant_(tensor, value)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        learns = self.training and self.weight.requires_grad
        if not learns or dist.world_size() == 1:
            running = (self.running_mean, self.running_var) if learns else self._running(x_BCHW.dtype)
            return F.batch_norm(x_BCHW, *running, self.weight, self.bias, learns, STATISTICS_MOMENTUM, EPS)
        x_BCHW, dtype = x_BCHW.float(), x_BCHW.dtype
        count = x_BCHW.new_full((1,), x_BCHW[:, 0].numel())
        sums = torch.cat([x_BCHW.sum((0, 2, 3)), x_BCHW.square().sum((0, 2, 3)), count])
        sums = _SumOverRanks.apply(sums)
        mean_C, square_C = (sums[:-1] / sums[-1]).chunk(2)
        var_C = (square_C - mean_C.square()).clamp(min=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean_C, STATISTICS_MOMENTUM)
            self.running_var.lerp_(var_C * sums[-1] / (sums[-1] - 1), STATISTICS_MOMENTUM)
        scale_C = self.weight * (var_C + EPS).rsqrt()
        shift_C = self.bias - mean_C * scale_C
        return (x_BCHW * scale_C[:, None, None] + shift_C[:, None, None]).to(dtype)

    def _running(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The running statistics, in half precision where all weights have it, as in an exported graph."""
        half = dtype if self.weight.dtype == dtype else self.running_mean.dtype
        return self.running_mean.to(half), self.running_var.to(half)


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks, each of which needs the gradient by its part from all."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return dist.sum_over_ranks(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        return dist.sum_over_ranks(gradient)


STEMS = {"linear": PatchEmbed, "convolutional": ConvolutionalStem}
