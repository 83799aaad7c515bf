r"""Root mean square norms of few tokens by the compiled library.

.. math:: y = w \, x / \sqrt{\mathrm{mean}(x^2) + \epsilon}

over the last dimension, which torch does in eight operations. Three ways are known, which differ in where a type of 16
bits rounds: see ``KINDS``.

Reference: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from fips.kernels import cpu

__all__ = ["KINDS", "MOST", "Norm", "normalise", "suits"]

KINDS = "rounded", "whole", "one more"
"""What is rounded to the type of ``x`` before it is multiplied by the weights, as by Llama; what is not, as by OLMo 2;
and what is not and is multiplied by one more than the weights, as by Gemma."""
MOST = 64
"""Tokens up to which calls count."""


class Norm(NamedTuple):
    """Weights (D), what is added to the mean square, and one of ``KINDS``."""

    weight: Tensor
    eps: float
    kind: str


class _Norm(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p), ("weight", c_void_p), ("y", c_void_p), ("length", c_int64), ("size", c_int64),
        ("weight_length", c_int64), ("eps", c_float), ("kind", c_int32), ("type", c_int32), ("isa", c_int32),
    ]  # fmt: skip


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether ``normalise`` knows such tensors: few tokens of one type of 16 bits in memory, no gradients."""
    size = weight.numel()
    return (
        cpu.reads(x, weight)
        and weight.dim() == 1
        and size % 8 == 0
        and x.shape[-1:] == weight.shape
        and 0 < x.numel() <= MOST * size
        and x.is_contiguous()
        and weight.is_contiguous()
    )


def normalise(x: Tensor, weight: Tensor, eps: float, kind: str) -> Tensor:
    """The norm of x (..., D) with weights (D), in the type of both; no autograd.

    Raises ``BackendError`` for what ``suits`` does not allow.
    """
    y = torch.empty_like(x)
    norm = _Norm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel(), x.shape[-1], weight.numel(), eps, KINDS.index(kind),
        cpu.TYPES[x.dtype], cpu.best_isa(),
    )  # fmt: skip
    cpu.call("fips_normalise", norm, "a norm")
    return y
