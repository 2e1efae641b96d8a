"""The block-diagonal Hessian H, in the three forms in which it comes, behind one interface."""

from cbs_opt.curvature.base import Curvature
from cbs_opt.curvature.gradient_factor import GradientFactor
from cbs_opt.curvature.hessian_blocks import HessianBlocks
from cbs_opt.curvature.inverse_hessian_blocks import InverseHessianBlocks

__all__ = ["Curvature", "GradientFactor", "HessianBlocks", "InverseHessianBlocks"]
