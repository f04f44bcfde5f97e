"""NVIDIA's processors by CUDA: the driver, the compilers of CUDA C, devices, and runs."""
