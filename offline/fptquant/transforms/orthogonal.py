"""Orthogonal matrices: Hadamard starting points and the Cayley map that trains around them."""

from __future__ import annotations

import torch
from torch import Tensor


def cayley(parameter: Tensor) -> Tensor:
    """Orthogonal matrix (I + A)^-1 (I - A) with A = P - P^T the skew part; the identity at P = 0.

    Args:
        parameter: (..., n, n), unconstrained.

    Returns:
        (..., n, n) of the same dtype. I + A is never singular, since a skew matrix has imaginary eigenvalues.
    """
    skew = parameter - parameter.mT
    identity = torch.eye(parameter.shape[-1], dtype=parameter.dtype, device=parameter.device)
    rotation: Tensor = torch.linalg.solve(identity + skew, identity - skew)
    return rotation


def starting_rotation(size: int, generator: torch.Generator) -> Tensor:
    """Orthogonal (size, size) float64 matrix that spreads outliers over all channels.

    A Hadamard matrix with random signs where one is known (powers of two times 12, 20, 28, 36, ...), otherwise a
    random orthogonal matrix.
    """
    # it imports torch's compiler, seconds that whoever only loads or evaluates need not wait
    from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix

    try:
        hadamard: Tensor = random_hadamard_matrix(size, torch.float64, gen=generator)
    except ValueError:
        gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
        q: Tensor
        q, r = torch.linalg.qr(gaussian)
        return (q * torch.sign(torch.diagonal(r))).contiguous()
    return hadamard / float(hadamard[0].norm())
