"""The learned maps from one width to another."""

import torch

from trainer.projectors import ConvNorm, EmbeddingProjector, MapProjector


def test_projectors():
    assert MapProjector(3, 5)(torch.randn(2, 3, 4, 6)).shape == (2, 5, 4, 6)
    assert EmbeddingProjector(3, 5)(torch.randn(2, 3)).shape == (2, 5)


def test_conv_norm_of_a_single_value_uses_the_running_statistics():
    layer = ConvNorm(3, 2)
    layer(torch.randn(4, 3, 5, 5))
    mean = layer.norm.running_mean.clone()
    x = torch.randn(1, 3, 1, 1)
    in_training = layer(x)
    assert torch.equal(layer.norm.running_mean, mean)
    torch.testing.assert_close(in_training, layer.eval()(x))
