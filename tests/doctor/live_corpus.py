"""Live models with faults that are known, and healthy ones: what rules about models are measured on.

``make`` of a case returns a :class:`Live`; its codes are those of the faults that were made, and rules may find more
that is only information.
"""

import copy

import torch
from torch import nn

import batchnorm
import batchnorm.nn as bnn
from doctor.cases import Case, fault, healthy, missed
from doctor.live_cases import (
    Live,
    after_slow_averages,
    alone,
    around,
    average,
    changed,
    compiled,
    dropping,
    exported,
    fine_tuned,
    normalizing_by_a_function,
    on,
    optimized,
    plain,
    prepared,
    residual,
    scaled,
    small_batches,
    volumes,
    with_frozen_parameters,
    with_modes,
    with_momentum,
    with_one_stale_channel,
    with_tiny_variance,
    with_wide_channel,
    without_tracking,
)
from doctor.live_networks import Branching, FunctionalDropout, Siamese, Teacher, TwoDomains, WithHead
from doctor.networks import (
    MOBILENETS,
    MODELS,
    monai_resnet,
    monai_unet,
    transformers_efficientnet,
    transformers_resnet,
)
from doctor.networks import trained as trained_by_steps
from every_layer import KINDS
from examined import batches, network, trained

CONVERTED = (transformers_resnet, monai_resnet, monai_unet)
SOME = (64, 3)
IMAGES = (64, 2, 14, 14)

FAULTS: dict[str, Case] = {
    "a convolution's weight times 3": fault(changed(scaled(3, 3.0)), "BN108", "BN207"),
    "a convolution's weight times 4, our layers": fault(changed(scaled(3, 4.0), bnn), "BN108", "BN207"),
    "means moved by 2 standard deviations": fault(
        changed(lambda model: model[9].running_mean.add_(2 * model[9].running_var.sqrt())), "BN108", "BN207"
    ),
    "variances ten times too large": fault(changed(lambda model: model[1].running_var[2:].mul_(10)), "BN108", "BN207"),
    "other data": fault(changed(lambda model: None, data=lambda: [3 * x + 4 for x in batches()]), "BN108", "BN207"),
    "averages too slow for the training": fault(after_slow_averages, "BN108", "BN207"),
    # a finding needs a tenth of the channels
    "one stale channel of 16": missed(changed(with_one_stale_channel), "BN108", found=("BN207",)),
    "a new model on data": fault(lambda: Live(network().eval(), batches()), "BN101", "BN108", "BN207"),
    "a mean that is not a number": fault(
        changed(lambda model: model[1].running_mean[0].fill_(torch.nan)), "BN102", "BN207"
    ),
    "batches of 4": fault(changed(lambda model: None, data=small_batches), "BN207"),
    "a bias before the layer": fault(alone(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), "BN201"),
    "a bias of a transposed convolution": fault(
        alone(lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Identity(), bnn.BatchNorm2d(4))), "BN201"
    ),
    "a bias of a linear layer": fault(on(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), *SOME), "BN201"),
    # torch.fx cannot follow it
    "a bias behind a branch on the data": missed(alone(Branching), "BN201"),
    "Keras' momentum": fault(with_momentum(0.99), "BN202"),
    "TensorFlow's momentum, our layers": fault(with_momentum(0.9, bnn), "BN202"),
    "momentum 0.5": fault(with_momentum(0.5), "BN202"),
    "momentum None": fault(with_momentum(None), "BN203"),
    "momentum None, compiled": fault(compiled, "BN203"),
    "momentum None in a residual network": fault(
        lambda: Live(trained_by_steps(layer=lambda c: nn.BatchNorm2d(c, momentum=None)).eval()), "BN203"
    ),
    "no running statistics": fault(without_tracking(nn, None), "BN204"),
    "no running statistics, batches of 32": fault(without_tracking(bnn, batches), "BN204"),
    "no running statistics, batches of 1": fault(without_tracking(nn, lambda: batches(3, 1)), "BN204"),
    "a layer for two values, shifted": fault(on(lambda: Siamese(nn, lambda x: x + 5), *SOME), "BN205"),
    "a layer for two values, scaled": fault(on(lambda: Siamese(bnn, lambda x: 4 * x), *SOME), "BN205"),
    "a head for training only": fault(on(WithHead, *SOME), "BN205"),
    "a mean of 3,000 standard deviations": fault(on(lambda: nn.BatchNorm2d(2), *IMAGES, mean=3e3), "BN206"),
    "a mean of 1,000,000 standard deviations": fault(on(lambda: nn.BatchNorm2d(2), *IMAGES, mean=1e6), "BN206"),
    "temperatures in kelvin": fault(on(lambda: nn.BatchNorm2d(2), *IMAGES, mean=300.0, std=0.02), "BN206"),
    "dropout before a layer": fault(alone(lambda: dropping(nn.Dropout(0.5), nn.BatchNorm2d(4))), "BN208"),
    "dropout of channels before a layer": fault(
        alone(lambda: dropping(nn.ReLU(), nn.Dropout2d(0.1), nn.Identity(), bnn.BatchNorm2d(4))), "BN208"
    ),
    "dropout by a function before a layer": fault(alone(lambda: FunctionalDropout(nn)), "BN208"),
    # its page says so: weights in between are not followed
    "dropout before the convolution before a layer": missed(
        alone(lambda: nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))), "BN208"
    ),
    "a layer that trains in evaluation": fault(with_modes(False, [4]), "BN301"),
    "two layers that train in evaluation": fault(with_modes(False, [1, 9]), "BN301"),
    "a layer that evaluates in training": fault(with_modes(True, [1]), "BN301"),
    "a frozen backbone whose statistics move": fault(with_frozen_parameters(5), "BN302"),
    "frozen parameters and moving statistics": fault(with_frozen_parameters(None), "BN302"),
    "a frozen backbone of our layers": fault(with_frozen_parameters(5, bnn), "BN302"),
    "weight decay on everything": fault(
        optimized(lambda model: torch.optim.SGD(model.parameters(), 0.1, weight_decay=5e-4)), "BN303"
    ),
    "AdamW on everything": fault(optimized(lambda model: torch.optim.AdamW(model.parameters())), "BN303"),
    "weight decay on one beta": fault(
        optimized(lambda model: torch.optim.SGD([model[4].bias], 0.1, weight_decay=1.0)), "BN303"
    ),
    "a domain that no data reached": fault(around("domain"), "BN101", "BN205"),
    "a teacher without statistics": fault(alone(lambda: Teacher(nn).eval()), "BN101", "BN304"),
    "a teacher of our layers without statistics": fault(alone(lambda: Teacher(bnn).eval()), "BN101", "BN304"),
    "an average without statistics": fault(alone(lambda: average(reset=True)), "BN101", "BN304"),
    "folding that overflows float16": fault(changed(with_tiny_variance), "BN103", "BN108", "BN207", "BN502"),
    "a channel 30,000 times as wide": fault(changed(with_wide_channel(4, 3e4)), "BN502"),
    "a channel 1,000,000 times as wide, our layers": fault(changed(with_wide_channel(1, 1e6), bnn), "BN502"),
    "a program exported in training mode": fault(alone(lambda: exported(nn.Module.train)), "BN503"),
    "a graph exported in training mode": fault(alone(lambda: exported(nn.Module.train).module()), "BN503"),
    "a layer exported in training mode": fault(alone(lambda: exported(lambda model: model[4].train())), "BN503"),
    "a graph that normalizes by a function": fault(normalizing_by_a_function, "BN503"),
}


HEALTHY: dict[str, Case] = {
    "layers of torch": healthy(plain(nn)),
    "layers of torch, training": healthy(plain(nn, training=True)),
    "our layers": healthy(plain(bnn)),
    "our layers, training": healthy(plain(bnn, training=True)),
    "a residual network": healthy(residual()),
    "a residual network, converted": healthy(residual(prepare=batchnorm.convert)),
    "a residual network of our layers": healthy(residual(bnn.BatchNorm2d)),
    "a residual network of our layers, momentum None": healthy(
        residual(lambda channels: bnn.BatchNorm2d(channels, momentum=None))
    ),
    "a residual network without gamma and beta": healthy(
        residual(lambda channels: nn.BatchNorm2d(channels, affine=False))
    ),
    "a residual network of group normalization": healthy(
        alone(lambda: trained_by_steps(layer=lambda channels: nn.GroupNorm(2, channels)))
    ),
    **{f"a layer of {name}": healthy(around(name)) for name in KINDS if name != "domain"},
    "a layer of two domains": healthy(on(TwoDomains, *SOME)),
    "two values of one distribution": healthy(on(lambda: Siamese(nn), *SOME)),
    "a frozen backbone": healthy(fine_tuned),
    "a moving average": healthy(lambda: Live(average(reset=False), batches())),
    "two independent networks": healthy(alone(lambda: nn.ModuleDict({"one": trained(), "other": trained()}))),
    "two networks that are copies": healthy(
        alone(lambda: nn.ModuleDict({"one": (one := trained()), "other": copy.deepcopy(one)}))
    ),
    "dropout behind the layers": healthy(changed(lambda model: model.append(nn.Dropout(0.5)))),
    "a program exported in evaluation mode": healthy(alone(lambda: exported(nn.Module.eval))),
    "no batch normalization": healthy(
        lambda: Live(nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.LayerNorm(3)), [torch.randn(SOME)])
    ),
    **{make.__name__: healthy(prepared(make)) for make in MODELS},
    **{f"{make.__name__}, converted": healthy(prepared(make, convert=True)) for make in CONVERTED},
    "monai_unet_3d": healthy(volumes),
}

# nobody put these in: the libraries have TensorFlow's momentum
FAULTS |= {make.__name__: fault(prepared(make), "BN202") for make in (*MOBILENETS, transformers_efficientnet)}

# healthy, and yet found: what is meant cannot be seen
FALSE_POSITIVES: dict[str, Case] = {
    "a loader of noise": fault(
        changed(lambda model: None, data=lambda: [torch.randn_like(x) for x in batches()]), "BN108", "BN207"
    ),
    "statistics of one large batch, by momentum 1": fault(with_momentum(1.0), "BN202"),
    "a layer that adapts at test time": fault(with_modes(False, [4]), "BN301"),
    "statistics that adapt to new data": fault(with_frozen_parameters(None), "BN302"),
    "a copy whose weights are loaded later": fault(alone(lambda: Teacher(nn).eval()), "BN101", "BN304"),
    "deployment in float32": fault(changed(with_wide_channel(4, 3e4)), "BN502"),
    "a graph exported for training": fault(alone(lambda: exported(nn.Module.train)), "BN503"),
}
