"""A matrix with the singular vectors of a given one and singular values near 1, by five Newton-Schulz steps.

Each step takes X to ``a X + b (X X') X + c (X X')^2 X``. ``gram`` does the same on the small square R = X X' and multiplies
with X twice only; it computes in fp16 on a GPU, where ``standard`` computes in bf16; on a CPU both compute in fp32.

Source: Jordan et al., https://kellerjordan.github.io/posts/muon/; https://tridao.me/blog/2026/gram-newton-schulz/
"""

from __future__ import annotations

import math

import torch

METHODS = {"gram": torch.float16, "standard": torch.bfloat16}  # and their types on a GPU

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of X, X^3 and X^5: for a steep start, not for convergence to 1
_STEPS = 5
_RESTART = 2  # the step before which the Gram form computes its matrix anew, before rounding adds up


def orthogonalised(update: torch.Tensor, method: str) -> torch.Tensor:
    """The orthogonalised update, scaled by the root of its aspect ratio; fp32, of the same shape.

    Args:
        update: (rows, columns); three dimensions are a batch of matrices; the four of a convolution are one matrix, with a row
            for each filter.
        method: of ``METHODS``.
    """
    matrix = update.flatten(1) if update.dim() == 4 else update
    tall = matrix.size(-2) > matrix.size(-1)
    wide = matrix.mT if tall else matrix
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = wide.to(METHODS[method] if wide.is_cuda else torch.float32)
    in_gram_form = method == "gram" and wide.size(-2) < wide.size(-1)
    found = (_by_gram(wide) if in_gram_form else _by_steps(wide)).float()
    rows, columns = matrix.shape[-2:]
    return (found.mT if tall else found).reshape(update.shape) * math.sqrt(max(1.0, rows / columns))


def _by_steps(matrix: torch.Tensor) -> torch.Tensor:
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = matrix @ matrix.mT
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    return matrix


def _by_gram(matrix: torch.Tensor) -> torch.Tensor:
    a, b, c = _COEFFICIENTS
    gram, product = matrix @ matrix.mT, None
    for step in range(_STEPS):
        if step == _RESTART and product is not None:
            matrix, product = product @ matrix, None
            gram = matrix @ matrix.mT
        factor = b * gram + c * gram @ gram
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step + 1 not in {_RESTART, _STEPS}:
            gram = factor @ gram @ factor
    return matrix if product is None else product @ matrix
