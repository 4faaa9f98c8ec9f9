"""The suites: every case that is measured."""

from batchnorm.benchmarks.cases import BOTH, EVALUATION, FORWARD, Case

RESNET_BATCH = 24
RESNET_SHAPES = [(64, 112, 112), (256, 56, 56), (128, 28, 28), (1024, 14, 14), (2048, 7, 7)]


def resnet50() -> list[Case]:
    """Activations of ResNet-50 at 224 x 224, after a convolution and at the end of a block, in both layouts."""
    return [
        Case(
            "ResNet-50",
            (RESNET_BATCH, *shape),
            residual=residual,
            memory_format=layout,
            passes=(FORWARD, BOTH) if layout == "contiguous" and not residual else (BOTH,),
            quick=(shape, residual) in [(RESNET_SHAPES[2], False), (RESNET_SHAPES[3], True)],
        )
        for layout in ("contiguous", "channels_last")
        for residual in (False, True)
        for shape in RESNET_SHAPES
    ]


MOBILENET = [
    Case("MobileNetV2", (32, *shape), "relu6", memory_format=layout, quick=shape == (144, 56, 56))
    for layout in ("contiguous", "channels_last")
    for shape in [(32, 112, 112), (144, 56, 56), (576, 14, 14), (1280, 7, 7)]
] + [Case("MobileNetV2", (32, 24, 56, 56), None), Case("MobileNetV2", (32, 24, 56, 56), None, residual=True)]

INCEPTION = [
    Case("Inception", (32, *shape), memory_format=layout)
    for layout in ("contiguous", "channels_last")
    for shape in [(64, 112, 112), (192, 56, 56), (96, 28, 28), (128, 14, 14), (352, 7, 7)]
]

UNET = [
    Case("3-D U-Net", shape, memory_format=layout)
    for layout in ("contiguous", "channels_last_3d")
    for shape in [(2, 32, 64, 64, 64), (2, 64, 32, 32, 32), (2, 256, 8, 8, 8)]
]

MNIST = [
    Case("MNIST network", (60, 100), "sigmoid", passes=(FORWARD, BOTH, EVALUATION), quick=True),
    Case("MNIST network", (60, 300), "sigmoid"),
    Case("MNIST network", (60, 100), "relu"),
    Case("MNIST network", (60, 100), None),
]

VERY_SMALL = [Case("very small", shape, quick=shape == (2, 3)) for shape in [(2, 3), (8, 16), (4, 8, 2, 2), (32, 64)]]

VERY_LARGE = [
    Case("very large", shape) for shape in [(2**18, 64), (8, 64, 256, 256), (2**22, 4), (2**22, 1), (16, 1, 512, 512)]
]

ACTIVATIONS = [
    Case("activations", (32, 144, 56, 56), activation) for activation in (None, "silu", "gelu", "hardswish", "sigmoid")
] + [Case("activations", (32, 144, 56, 56), "silu", residual=True)]

DTYPES = [
    Case("dtypes", shape, dtype=dtype, quick=dtype == "bfloat16" and shape == (24, 1024, 14, 14))
    for dtype in ("bfloat16", "float64")
    for shape in [(24, 256, 56, 56), (24, 1024, 14, 14), (60, 100)]
]

INFERENCE = [
    Case("evaluation", (24, 256, 56, 56), passes=(EVALUATION,)),
    Case("evaluation", (24, 256, 56, 56), residual=True, passes=(EVALUATION,)),
    Case("evaluation", (32, 144, 56, 56), "relu6", passes=(EVALUATION,)),
    Case("evaluation", (32, 576, 14, 14), "relu6", memory_format="channels_last", passes=(EVALUATION,), quick=True),
    Case("evaluation", (1, 256, 56, 56), passes=(EVALUATION,)),
]

FULL = resnet50() + INCEPTION + MOBILENET + UNET + MNIST + VERY_SMALL + VERY_LARGE + ACTIVATIONS + DTYPES + INFERENCE
SUITES = {"quick": [case for case in FULL if case.quick], "full": FULL}

# With threads: tensors worth sharing. With size: one channel count, from what fits a first-level cache upwards.
THREAD_CASES = [Case("threads", (24, 256, 56, 56)), Case("threads", (2**18, 64)), Case("threads", (2, 32, 64, 64, 64))]
SIZE_CASES = [Case("size", (batch, 64, 14, 14)) for batch in (1, 4, 16, 64, 256, 1024)]
