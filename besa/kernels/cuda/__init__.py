"""GPU kernels in CUDA C++, compiled on the user's machine by NVRTC, which comes with torch.

The sources (`*.cu`, `*.cuh`) lie beside this file. No CUDA toolkit is needed, and the wheel holds
no machine code for GPUs: an instance of a kernel takes a fraction of a second to compile, once, and
is kept on disk.

    compiler.py   source to machine code: NVRTC through ctypes
    cache.py      machine code on disk
    libcuda.py    what is used of the CUDA driver's C interface
    driver.py     loads and launches kernels on torch's devices

    records.py    packed weights as the kernels read them, and back; tiles.py, what is in a record
    linear.py     the operator that multiplies by them
    call.py       one product, and what a way to compute it is
    multiply.py, matmul.py, expansion.py   the ways: sparse_linear.cu; matmul.cu; expand.cu, cuBLAS
    candidates.py, tuning.py               which of them is the fastest for a shape

    buckets.py, compensate.py, n_of_m.py   what pruning computes on a GPU

>>> import torch
>>> from besa.kernels.cuda import driver
>>> driver.unavailable(torch.device("cpu"))
'cpu is not an NVIDIA GPU'
"""
