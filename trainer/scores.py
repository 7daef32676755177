"""How much each weight of a layer is worth: pure functions, tensor in, score of the same shape out.

The lowest scores are pruned first. What becomes a mask of them is decided in `compress`.
"""

import torch
from torch import Tensor

from trainer.mistakes import Mistake


def magnitude(weight: Tensor) -> Tensor:
    """The weight's size, |w| (Han et al. 2015, Learning both Weights and Connections)."""
    return weight.detach().abs()


def lamp(weight: Tensor, parts: int = 1) -> Tensor:
    """LAMP (Lee et al. 2021): w^2 over the sum of the squares of the layer's weights as large or larger.

    The scores of different layers can be compared, and each layer's largest weight has the score 1. float64.
    parts: stacked matrices along the first axis (gates; query, key, value) that count as a layer each.
    Weights of one size count as rising in their order, so that scores part them.
    """
    found = []
    for part in weight.detach().chunk(parts):
        square = part.double().reshape(-1) ** 2
        order = torch.argsort(square, stable=True)
        sums = square[order].flip(0).cumsum(0).flip(0)
        score = torch.empty_like(square)
        score[order] = square[order] / sums.clamp_min(torch.finfo(torch.float64).tiny)
        found.append(score.reshape(part.shape))
    return torch.cat(found)


def movement(weight: Tensor, gradient: Tensor) -> Tensor:
    """One step's share of the movement score, -w x gradient (Sanh et al. 2020, Movement Pruning).

    Summed over a training it is high for weights that move away from zero. gradient: of the loss with respect
    to the weight as the network uses it, so that it also reaches pruned positions.
    """
    return -(weight.detach() * gradient.detach())


def rate(score: Tensor, mask: Tensor) -> Tensor:
    """A score divided by the root of the bits that keeping the position costs in a packed file.

    So, of two weights worth the same, the one in an emptier row and column goes first: rate-distortion's
    choice of what lowers the loss most a bit (as Oktay et al. 2020 train for, Scalable Model Compression by
    Entropy Penalized Reparameterization), here with `position_bits` as the rate. mask: the weights that are
    alive now.
    """
    return score / position_bits(mask).to(score.dtype).sqrt()


VALUE_BITS = 4.0  # what a survivor's shared value takes besides its position: sign and rank


def position_bits(mask: Tensor) -> Tensor:
    """Bits that a file spends on keeping each position of a mask rather than pruning it, 1 or more. float64.

    That is its value's bits, and log2((1 - p) / p) for the probability p that the file's model gives to a
    weight there. As in `codec`, the odds start from the density of the layer and are shifted by how many more
    weights the column and the row hold than the density says, the position itself left out. Rows are the
    first axis.
    """
    alive = mask.reshape(len(mask), -1).double()
    rows, columns = alive.shape
    density = (alive.sum() + 1) / (alive.numel() + 2)
    column = torch.log2((alive.sum(0) - alive + 1) / ((rows - 1) * density + 1))
    row = torch.log2((alive.sum(1, keepdim=True) - alive + 1) / ((columns - 1) * density + 1))
    odds = torch.log2(density / (1 - density)) + 0.7 * column + 0.6 * row
    return (VALUE_BITS - odds).clamp_min(1.0).reshape(mask.shape)


def n_m_mask(weight: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """Keeps the n largest of every m weights in a row along an axis.

    2:4 is Mishra et al. 2021 (Accelerating Sparse Deep Neural Networks), any N:M Zhou et al. 2021. axis: that
    of the layer's inputs. Of weights of one size the first stay. Raises Mistake for an axis that does not
    split into groups of m.
    """
    if not 0 < n < m:
        raise ValueError(f"got {n}:{m}; N of every M weights are kept, so N is at least 1 and less than M")
    moved = weight.detach().abs().movedim(axis, -1)
    if moved.shape[-1] % m:
        raise Mistake(f"{moved.shape[-1]} inputs do not split into groups of {m}")
    groups = moved.reshape(-1, m)
    order = torch.argsort(groups, dim=1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True)
    return mask.reshape(moved.shape).movedim(-1, axis)
