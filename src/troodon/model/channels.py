"""Weights of a network for images of another number of channels: grey pictures, or more bands than three."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from troodon.config import UsageError, fingerprint
from troodon.model.backbone import Backbone

# Shape suffixes: D channels of a token, C channels of the given network, K of the wanted one, p pixels of a patch.


def with_channels(backbone: Backbone, mean: Sequence[float], std: Sequence[float]) -> Backbone:
    """The backbone for images of `len(mean)` channels, which are normalised by `mean` and `std`.

    Each channel gets the same share of all weights of the patch embedding. So a picture that is the same in all
    channels has the features that it has in the given network: a grey picture those of its RGB repetition. UsageError
    for a network with a convolutional stem.
    """
    if backbone.config.stem != "linear":
        raise UsageError(
            f"{backbone.name}: its convolutional stem is for {backbone.channels} channels, and no other number"
        )
    p = backbone.preprocessing
    state = dict(backbone.vit.state_dict())
    state |= _embedding(state, (p.mean, p.std), (mean, std))
    description = replace(p, mean=tuple(mean), std=tuple(std))
    config = replace(backbone.config, channels=len(mean))
    digest = fingerprint(backbone.fingerprint, list(mean), list(std))
    return Backbone.from_state_dict(state, config, description, name=backbone.name, digest=digest)


def _embedding(state: dict[str, Tensor], given: tuple, wanted: tuple) -> dict[str, Tensor]:
    """The patch embedding. A value v enters the given network as (v - mean_C) / std_C, with the weight of channel C.

    Here v = mean_K + std_K x, where x is the input; so a share 1 / K of each weight / std_C, times std_K, is the new
    weight, and what is constant goes to the bias.
    """
    mean_C, std_C, mean_K, std_K = (torch.tensor(numbers, dtype=torch.float64) for numbers in (*given, *wanted))
    name, bias = "patch_embed.proj.weight", "patch_embed.proj.bias"
    per_value_DCpp = state[name].double() / std_C[:, None, None]
    each_Dpp = per_value_DCpp.sum(1) / len(mean_K)
    weight_DKpp = each_Dpp[:, None] * std_K[:, None, None]
    shift_D = each_Dpp.sum((1, 2)) * mean_K.sum() - (per_value_DCpp.sum((2, 3)) * mean_C).sum(1)
    dtype = state[name].dtype
    return {name: weight_DKpp.to(dtype), bias: (state[bias].double() + shift_D).to(dtype)}
