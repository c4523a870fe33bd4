"""mpi4py as a backend of ``torch.distributed``, for CPU tensors and CUDA-aware MPI.

Loaded only by jobs that mpirun starts, or that ask for ``comm.backend=mpi``.
"""
