"""The maths of low rank: the best product of two matrices, and the Tucker-2 form of a convolution's weight.

All tensors are float64; names and shapes of layers are the business of `low_rank`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What calibration has not seen must not be free to change: a ridge, as a share of the mean variance.
# Few of a vocabulary's tokens are seen; measured on MiniLM, theirs has to be large.
_RIDGE = 1e-3
_TOKEN_RIDGE = 1.0
_HOOI_PASSES = 2


def root_of(covariance: Tensor) -> Tensor | None:
    """Lower triangular L with L L' = covariance and a little ridge; None where all inputs are zero.

    Args:
        covariance: Second moments, shape `(n, n)`.
    """
    if not covariance.diagonal().sum() > 0:
        return None
    ridge = _RIDGE * covariance.diagonal().mean()
    return torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance)).to(covariance))


def weigh_tokens(weight: Tensor, shares: Tensor) -> Tensor:
    """An embedding whose rows count by the root of how often their tokens occur.

    Args:
        weight: Shape `(tokens, n)`.
        shares: Share of each token, shape `(tokens,)`.
    """
    return weight * (shares + _TOKEN_RIDGE * shares.mean()).sqrt()[:, None]


def split_embedding(weight: Tensor, rank: int, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best product of two matrices, where errors of frequent tokens count for more.

    Args:
        weight: Shape `(tokens, n)`.
        rank: From 1 to the smaller side.
        shares: Share of each token, shape `(tokens,)`; all count alike if absent.

    Returns:
        Matrices of shapes `(tokens, rank)` and `(rank, n)`.
    """
    if shares is None:
        return split_matrix(weight, rank)
    right = _leading(weigh_tokens(weight, shares).T, rank).T
    return _balanced(weight @ right.T, right)


def split_matrix(matrix: Tensor, rank: int, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best product of two matrices, both of like magnitude.

    Args:
        matrix: Shape `(m, n)`.
        rank: From 1 to the smaller side.
        root: The error that is least is that of `matrix @ root`, shape `(n, n)`, lower triangular.

    Returns:
        Matrices of shapes `(m, rank)` and `(rank, n)`.
    """
    target = matrix if root is None else matrix @ root
    # The smaller Gram matrix is enough, and far quicker than the SVD of an embedding.
    if target.shape[0] >= target.shape[1]:
        right = _leading(target.T, rank).T
        left = target @ right.T
    else:
        left = _leading(target, rank)
        right = left.T @ target
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return _balanced(left, right)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    tiny = torch.finfo(torch.float32).tiny
    balance = (right.norm(dim=1).clamp_min(tiny) / left.norm(dim=0).clamp_min(tiny)).sqrt()
    return left * balance, right / balance[:, None]


def tucker(weight: Tensor, rank_in: int, rank_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tucker-2 by truncated HOSVD and two passes of orthogonal iteration (HOOI).

    Args:
        weight: Of a convolution, shape `(out, in, *kernel)`.
        rank_in: From 1 to the input channels; at all of them that side's basis is the identity.
        rank_out: The same for the output channels.

    Returns:
        Basis of the input channels `(in, rank_in)`, core `(rank_out, rank_in, *kernel)`, basis of the
        output channels `(out, rank_out)`; the bases have orthonormal columns.
    """
    ranks = (rank_out, rank_in)
    bases = [_basis(weight, side, ranks[side]) for side in (0, 1)]
    for _ in range(_HOOI_PASSES):
        for side in (0, 1):
            bases[side] = _basis(_project(weight, bases[1 - side], 1 - side), side, ranks[side])
    core = _project(_project(weight, bases[0], 0), bases[1], 1)
    return bases[1], core, bases[0]


def energies(matrix: Tensor) -> Tensor:
    """Squared singular values, descending, as many as the smaller side is long."""
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    return torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp_min(0)


def unfold(weight: Tensor, side: int) -> Tensor:
    """The weight as a matrix with one row a channel of side 0 (output) or 1 (input)."""
    return weight.transpose(0, side).flatten(1)


def _basis(weight: Tensor, side: int, rank: int) -> Tensor:
    if rank == weight.shape[side]:
        return torch.eye(rank).to(weight)
    return _leading(unfold(weight, side), rank)


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of a matrix, shape `(m, rank)`."""
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]


def _project(weight: Tensor, basis: Tensor, side: int) -> Tensor:
    """The weight with one side's channels expressed in a basis of shape `(channels, rank)`."""
    return torch.tensordot(weight, basis, dims=([side], [0])).movedim(-1, side)
