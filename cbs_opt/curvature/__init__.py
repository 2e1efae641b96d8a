"""The block-diagonal Hessian H: one interface, several forms."""

from cbs_opt.curvature.base import Curvature, Member
from cbs_opt.curvature.gradient_factor import GradientFactor
from cbs_opt.curvature.hessian_blocks import HessianBlocks
from cbs_opt.curvature.inverse_hessian_blocks import InverseHessianBlocks
from cbs_opt.curvature.registry import curvature_kinds, register_curvature
from cbs_opt.curvature.shared_blocks import SharedBlocks

__all__ = [
    "Curvature",
    "GradientFactor",
    "HessianBlocks",
    "InverseHessianBlocks",
    "Member",
    "SharedBlocks",
    "curvature_kinds",
    "register_curvature",
]
