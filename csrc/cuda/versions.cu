// Which CUDA runtime this library brings, and up to which version the installed driver goes (0: no driver).
// Called through ctypes before the first launch, where a driver too old for the library can still be
// explained.
#include <cuda_runtime.h>

extern "C" __attribute__((visibility("default"))) void auglocal_cuda_versions(int* runtime, int* driver) {
  *runtime = 0;
  *driver = 0;
  cudaRuntimeGetVersion(runtime);
  cudaDriverGetVersion(driver);
}
