"""A GPU for kernels on the host: CUDA sources compiled for it, threads in a drawn order, detectors of what is wrong.

``build`` compiles sources and the module ``emulator_runtime``, whose functions set the seed and hand out reports.
``cuda_runtime.h`` is what the kernels include; ``scheduler.cpp`` runs their threads, ``memory.cpp`` knows every byte
they share, ``races.cpp`` the order of accesses to it, and the compiler calls ``hooks.cpp`` at every access.
"""
