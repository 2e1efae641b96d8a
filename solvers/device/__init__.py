"""The inner loops on a card: torch for products, Triton for searches that keep their state in registers.

The lowest room beside `kernels`: it imports the core and `kernels`, and every solver may import it. Which device
is used is decided in `cbs_opt.device`. Modules named `…_kernels` hold Triton kernels, which run on the CPU too, in
Triton's interpreter; the tests compare them there with `kernels`, the versions in NumPy and numba.
"""
