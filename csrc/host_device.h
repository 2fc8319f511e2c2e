// Functions for the host and for the device alike.
#pragma once

#if defined(__CUDACC__)
#define AUGLOCAL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define AUGLOCAL_HOST_DEVICE inline
#endif
