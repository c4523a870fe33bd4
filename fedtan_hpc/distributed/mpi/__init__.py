"""mpi4py as a backend of ``torch.distributed``, for CPU tensors and CUDA-aware MPI.

Only jobs that mpirun starts, or that set ``comm.backend=mpi``, load it.
"""
