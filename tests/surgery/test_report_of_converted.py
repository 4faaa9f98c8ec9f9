"""memory_report sees a converted model as it runs."""

import torch

import batchnorm


def test_report_of_a_converted_block_shows_what_the_fused_layer_keeps():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU())
    example = torch.randn(8, 3, 32, 32)
    before = batchnorm.memory_report(model, example)
    batchnorm.convert(model)
    after = batchnorm.memory_report(model, example)
    output = model(example)
    assert before.kept - after.kept >= output.nbytes - 4096
