"""Which layers are taken for batch normalization, in models of other libraries and in our own."""

import os
import warnings

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.doctor.checkpoint import StoredTensor
from batchnorm.doctor.read.layers import Found, named, recognise

os.environ["HF_HUB_OFFLINE"] = "1"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def stored(state: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), value.numpy)
        for name, value in state.items()
    }


def found(state: dict[str, torch.Tensor], versions: dict[str, int] | None = None) -> Found:
    return recognise(stored(state), versions=versions)


def paths(state: dict[str, torch.Tensor], versions: dict[str, int] | None = None) -> set[str]:
    return {layer.path for layer in found(state, versions).layers}


def without_statistics(state: dict[str, torch.Tensor], lost=lambda path: True) -> dict[str, torch.Tensor]:
    """What named_parameters() gives, or strict=False leaves of some layers."""
    return {k: v for k, v in state.items() if not (k.rpartition(".")[2] in STATISTICS and lost(k.rpartition(".")[0]))}


def versions_of(state) -> dict[str, int]:
    return {path: entry["version"] for path, entry in state._metadata.items() if "version" in entry}


def batch_norms(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}


def from_transformers(name: str, suffix: str, **options) -> nn.Module:
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**options)
        return getattr(transformers, f"{name}{suffix}")(config)


def from_monai(name: str, *arguments, **options) -> nn.Module:
    with warnings.catch_warnings():
        # monai's own imports warn
        warnings.simplefilter("ignore")
        from monai.networks import nets

    with torch.device("meta"):
        return getattr(nets, name)(*arguments, **options)


def efficientnet() -> nn.Module:
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-b0", num_classes=3, width_coefficient=0.1, image_size=32)


def monai_unet(norm) -> nn.Module:
    sizes = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, "channels": (4, 6, 8), "strides": (2, 2)}
    return from_monai("UNet", **sizes, num_res_units=2, norm=norm)


SMALL = {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [2, 1]}
# how many BN layers there are, and in how many of them the names of parameters alone say so
MODELS = {
    "resnet": (lambda: from_transformers("ResNet", "Model", **SMALL), 12, 12),
    "regnet": (lambda: from_transformers("RegNet", "Model", **SMALL, groups_width=4), 12, 12),
    "mobilenet_v2": (lambda: from_transformers("MobileNetV2", "Model", depth_multiplier=0.1, min_depth=4), 52, 52),
    "mobilevit": (lambda: from_transformers("MobileViT", "Model"), 32, 32),
    "levit": (lambda: from_transformers("Levit", "Model"), 62, 62),
    "cvt": (lambda: from_transformers("Cvt", "Model"), 39, 39),
    "segformer": (lambda: from_transformers("Segformer", "ForSemanticSegmentation"), 1, 1),
    "swiftformer": (lambda: from_transformers("SwiftFormer", "Model"), 25, 0),
    "efficientnet": (efficientnet, 49, 49),
    "monai unet": (lambda: monai_unet("batch"), 9, 0),
    "monai resnet": (lambda: from_monai("resnet18", spatial_dims=2, n_input_channels=3, num_classes=2), 20, 17),
    "monai densenet": (lambda: from_monai("DenseNet121", spatial_dims=2, in_channels=3, out_channels=2), 121, 0),
    "bit": (lambda: from_transformers("Bit", "Model"), 0, 0),
    "convnext": (lambda: from_transformers("ConvNext", "Model"), 0, 0),
    "vit": (lambda: from_transformers("ViT", "Model", num_hidden_layers=1), 0, 0),
    "bert": (lambda: from_transformers("Bert", "Model", num_hidden_layers=1), 0, 0),
    "llama": (lambda: from_transformers("Llama", "Model", num_hidden_layers=1), 0, 0),
    "wav2vec2": (lambda: from_transformers("Wav2Vec2", "Model", num_hidden_layers=1), 0, 0),
    "poolformer": (lambda: from_transformers("PoolFormer", "Model"), 0, 0),
    "monai unet group": (lambda: monai_unet(("group", {"num_groups": 2})), 0, 0),
    "monai unet instance": (lambda: monai_unet(("instance", {"affine": True})), 0, 0),
    "monai segresnet": (lambda: from_monai("SegResNet", spatial_dims=2), 0, 0),
    "monai dynunet": (lambda: from_monai("DynUNet", 2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2]), 0, 0),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_layers_of_real_models_are_found_and_nothing_else(name):
    build, count, by_name = MODELS[name]
    model = build()
    state, truth = model.state_dict(), batch_norms(model)
    assert len(truth) == count
    whole = found(state).layers
    assert {layer.path for layer in whole} == truth
    assert all(layer.sure for layer in whole)
    # no statistics at all: never a layer of another kind
    stripped = found(without_statistics(state)).layers
    assert {layer.path for layer in stripped} <= truth
    assert len(stripped) == by_name
    assert not any(layer.sure for layer in stripped)
    assert all({"running_mean", "running_var"} <= layer.expected for layer in stripped)
    assert paths(without_statistics(state), versions_of(state)) == {layer.path for layer in stripped}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name, (_, count, _) in MODELS.items() if count])
def test_a_layer_that_lost_its_statistics_is_found_beside_others(name):
    model = MODELS[name][0]()
    state, truth = model.state_dict(), batch_norms(model)
    # one block of several loses them: the others are in the same places
    lost = {path for path in truth if ".1." in path}
    got = {layer.path: layer for layer in found(without_statistics(state, lost.__contains__)).layers}
    assert set(got) <= truth
    assert set(got) >= truth - lost
    assert all(got[path].sure for path in truth - lost)
    assert not any(got[path].sure for path in lost & got.keys())


def test_group_normalization_behind_a_convolution_with_bias_is_not_taken_for_batch_normalization():
    # as the input projections of Deformable DETR beside its backbone
    model = nn.ModuleDict({"bn1": nn.BatchNorm2d(8), "proj": nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(4, 8))})
    assert paths(model.state_dict()) == {"bn1"}
    assert paths(without_statistics(model.state_dict())) == {"bn1"}


def test_instance_normalization_of_ibn_net_is_not_taken_for_batch_normalization():
    # both have the same version in torch's metadata, and neither name has "norm" in it
    split = nn.ModuleDict({"IN": nn.InstanceNorm2d(4, affine=True), "BN": nn.BatchNorm2d(4)})
    state = nn.ModuleDict({"conv1": nn.Conv2d(3, 8, 3, bias=False), "bn1": split}).state_dict()
    assert paths(state, versions_of(state)) == paths(state) == {"bn1.BN"}
    assert paths(without_statistics(state), versions_of(state)) == {"bn1.BN"}


def test_counter_of_shape_one_is_a_scalar():
    state = {**nn.BatchNorm2d(4).state_dict(), "num_batches_tracked": torch.tensor([7])}
    assert found(state).layers[0].values("num_batches_tracked").shape == ()


def test_batch_normalization_of_a_shortcut_is_found_beside_named_layers():
    block = {"conv1": nn.Conv2d(3, 8, 3, bias=False), "bn1": nn.BatchNorm2d(8)}
    shortcut = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
    model = nn.ModuleDict({**block, "downsample": shortcut})
    assert paths(without_statistics(model.state_dict())) == {"bn1", "downsample.1"}


def test_transformer_layers_in_a_model_with_batch_normalization_are_not_taken_for_it():
    block = nn.ModuleDict({"proj": nn.Linear(8, 8, bias=False), "norm": nn.LayerNorm(8), "norm1": nn.LayerNorm(8)})
    tail = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    model = nn.ModuleDict({"bn": nn.BatchNorm1d(8), "block": block, "tail": tail})
    assert paths(model.state_dict()) == paths(without_statistics(model.state_dict())) == {"bn"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        *(
            (name, "bn")
            for name in [
                "bn",
                "bn1",
                "layer1.0.bn2",
                "_bn0",
                "conv1_bn",
                "bns.3",
                "convbn",
                "BatchNorm2d_0",
                "batch_norm",
            ]
        ),
        *((name, "bn") for name in ["batchnorm1", "enc.norm_bn.0", "BN_1", "mlp.bnorm"]),
        *(
            (name, "other")
            for name in ["ln", "ln_1", "layer_norm", "LayerNorm", "groupnorm2", "gn1", "rms_norm", "instance_norm"]
        ),
        *((name, "") for name in ["", *["norm", "norm1", "features.1", "0", "downsample.1", "adn.N", "lng", "signs"]]),
    ],
)
def test_names_say_which_normalization_it_is(path, expected):
    assert named(path) == expected


def test_our_relatives_are_told_apart():
    model = nn.ModuleDict(
        {
            "plain": batchnorm.nn.BatchNorm2d(4),
            "whitening": batchnorm.nn.Whitening2d(4),
            "renorm": batchnorm.nn.BatchRenorm2d(4),
            "conditional": batchnorm.nn.ConditionalBatchNorm2d(4, 3),
            "domain": batchnorm.nn.DomainBatchNorm2d(4, 2),
        }
    )
    result = found(model.state_dict())
    expected = ["plain", "renorm", "conditional.norm", "domain.domains.0", "domain.domains.1"]
    assert [layer.path for layer in result.layers] == expected
    assert all(layer.sure for layer in result.layers)
    assert result.relatives == {"whitening": "whitening", "renorm": "batch renormalization"}


def test_weight_per_class_is_left_out_of_the_layer():
    state = nn.BatchNorm2d(4).state_dict()
    result = found({**state, "weight": torch.ones(7, 4), "bias": torch.ones(7, 4)})
    assert set(result.layers[0].tensors) == set(STATISTICS)
    assert result.relatives == {"": "conditional"}


def test_normalization_of_observations_is_not_sure():
    # reinforcement learning keeps mean, variance and a count of inputs under the same names
    state = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "count": torch.ones(())}
    assert [layer.sure for layer in found(state).layers] == [False]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bn.running_var": torch.ones(5)}, "shapes (4,), (5,)"),
        ({"bn.running_var": torch.ones(4, 1)}, "shapes (4,), (4, 1)"),
        ({"bn.num_batches_tracked": torch.zeros(3)}, "more than one counter"),
        ({"bn.running_mean": torch.zeros(4, dtype=torch.complex64)}, "type complex64"),
    ],
)
def test_layers_that_contradict_themselves_are_left_out_with_the_reason(change, reason):
    state = nn.ModuleDict({"bn": nn.BatchNorm2d(4)}).state_dict()
    result = found({**state, **change})
    assert result.layers == []
    assert list(result.left_out) == ["bn"]
    assert reason in result.left_out["bn"]


def test_many_large_layers_do_not_fill_the_memory():
    tensors = {}
    for i in range(100):
        for role in ("running_mean", "running_var"):
            tensors[f"{i}.{role}"] = StoredTensor(f"{i}.{role}", (1 << 20,), "float32", lambda: None)
    result = recognise(tensors)
    assert len(result.layers) == 8
    assert set(result.left_out.values()) == {"too many channels"}
