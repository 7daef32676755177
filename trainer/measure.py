"""How large a network is."""

import torch
from torch import nn

from trainer import compress


def counts(model: nn.Module) -> dict[str, float]:
    """num_weights, num_nonzero and sparsity (share of zeros) over the weights of the layers, biases and norms left out."""
    total = nonzero = 0
    for place in compress.weights(model).values():
        total += place.value.numel()
        nonzero += int(torch.count_nonzero(place.value.detach()))
    return {"num_weights": total, "num_nonzero": nonzero, "sparsity": 1 - nonzero / total if total else 0.0}


def dense_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and statistics, dense, as the network holds them (float32: 4 each)."""
    return sum(tensor.numel() * tensor.element_size() for tensor in compress.dense_state(model).values())
