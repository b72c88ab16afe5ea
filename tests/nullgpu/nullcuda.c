/* A CUDA runtime without a GPU. When it is preloaded, torch finds one A100 whose kernels do nothing and whose memory is
   the host's. Copies do happen, so tensors that were copied hold what they should; everything computed is garbage.

   It counts how often the host waits for the device, how often it copies, and how many kernels it launches. A real
   device also makes the host wait for copies of memory that is not pinned; torch asks for these with cudaMemcpyAsync
   and cudaStreamSynchronize, so they are counted too. */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <cuda_runtime_api.h>
#undef cudaGetDeviceProperties

long nullcuda_waits, nullcuda_copies, nullcuda_launches;

#define DOES_NOTHING(name, ...) cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
#define WAITS(name, ...) cudaError_t name(__VA_ARGS__) { nullcuda_waits++; return cudaSuccess; }
#define GIVES(name, what, ...) cudaError_t name(__VA_ARGS__) { what; return cudaSuccess; }

/* ---- The device */

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, getenv("NULLCUDA_NAME") ? getenv("NULLCUDA_NAME") : "NVIDIA A100-SXM4-80GB");
  p->major = 8;
  p->totalGlobalMem = 80UL << 30;
  p->multiProcessorCount = 108;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 166912;
  p->sharedMemPerMultiprocessor = 167936;
  p->regsPerBlock = 65536;
  p->l2CacheSize = 40 << 20;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int device) {
  switch (what) {
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrMultiProcessorCount: *value = 108; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 166912; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
GIVES(cudaGetDeviceCount, *n = 1, int *n)
GIVES(cudaGetDevice, *device = 0, int *device)
DOES_NOTHING(cudaSetDevice, int device)
GIVES(cudaDriverGetVersion, *version = 13000, int *version)
GIVES(cudaRuntimeGetVersion, *version = 13000, int *version)
GIVES(cudaDeviceGetStreamPriorityRange, if (least) *least = 0; if (greatest) *greatest = -5, int *least, int *greatest)
GIVES(cudaDeviceCanAccessPeer, *can = 0, int *can, int device, int peer)
DOES_NOTHING(cudaDeviceEnablePeerAccess, int peer, unsigned flags)
GIVES(cudaDeviceGetPCIBusId, strncpy(id, "0000:00:00.0", n), char *id, int n, int device)
GIVES(cudaMemGetInfo, *total = 80UL << 30; *unused = 79UL << 30, size_t *unused, size_t *total)
GIVES(cudaDeviceGetDefaultMemPool, *pool = malloc(8), cudaMemPool_t *pool, int device)
DOES_NOTHING(cudaGetLastError, void)
DOES_NOTHING(cudaPeekAtLastError, void)

/* ---- Memory */

static cudaError_t get(void **p, size_t n) { return posix_memalign(p, 512, n) ? cudaErrorMemoryAllocation : cudaSuccess; }
cudaError_t cudaMalloc(void **p, size_t n) { return get(p, n); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) { return get(p, n); }
GIVES(cudaFree, free(p), void *p)
GIVES(cudaFreeHost, free(p), void *p)
DOES_NOTHING(cudaHostRegister, void *p, size_t n, unsigned flags)
DOES_NOTHING(cudaHostUnregister, void *p)
GIVES(cudaPointerGetAttributes, memset(found, 0, sizeof *found); found->type = cudaMemoryTypeUnregistered,
      struct cudaPointerAttributes *found, const void *p)
GIVES(cudaMemset, memset(p, value, n), void *p, int value, size_t n)
GIVES(cudaMemsetAsync, memset(p, value, n), void *p, int value, size_t n, cudaStream_t stream)
GIVES(cudaMemcpyAsync, nullcuda_copies++; memcpy(to, from, n),
      void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t stream)
GIVES(cudaMemcpy, nullcuda_copies++; nullcuda_waits++; memcpy(to, from, n),
      void *to, const void *from, size_t n, enum cudaMemcpyKind kind)

/* ---- Streams and events */

WAITS(cudaDeviceSynchronize, void)
WAITS(cudaStreamSynchronize, cudaStream_t stream)
WAITS(cudaEventSynchronize, cudaEvent_t event)
GIVES(cudaStreamCreate, *stream = malloc(8), cudaStream_t *stream)
GIVES(cudaStreamCreateWithFlags, *stream = malloc(8), cudaStream_t *stream, unsigned flags)
GIVES(cudaStreamCreateWithPriority, *stream = malloc(8), cudaStream_t *stream, unsigned flags, int priority)
GIVES(cudaStreamGetPriority, *priority = 0, cudaStream_t stream, int *priority)
DOES_NOTHING(cudaStreamDestroy, cudaStream_t stream)
DOES_NOTHING(cudaStreamQuery, cudaStream_t stream)
DOES_NOTHING(cudaStreamWaitEvent, cudaStream_t stream, cudaEvent_t event, unsigned flags)
GIVES(cudaStreamIsCapturing, *status = cudaStreamCaptureStatusNone,
      cudaStream_t stream, enum cudaStreamCaptureStatus *status)
GIVES(cudaStreamGetCaptureInfo, if (status) *status = cudaStreamCaptureStatusNone,
      cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
      const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges, size_t *n)
DOES_NOTHING(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *mode)
GIVES(cudaEventCreate, *event = malloc(8), cudaEvent_t *event)
GIVES(cudaEventCreateWithFlags, *event = malloc(8), cudaEvent_t *event, unsigned flags)
DOES_NOTHING(cudaEventDestroy, cudaEvent_t event)
DOES_NOTHING(cudaEventQuery, cudaEvent_t event)
DOES_NOTHING(cudaEventRecord, cudaEvent_t event, cudaStream_t stream)
DOES_NOTHING(cudaEventRecordWithFlags, cudaEvent_t event, cudaStream_t stream, unsigned flags)
GIVES(cudaEventElapsedTime, *ms = 1, float *ms, cudaEvent_t start, cudaEvent_t end)

/* ---- Kernels */

GIVES(cudaLaunchKernel, nullcuda_launches++,
      const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
GIVES(cudaLaunchKernelExC, nullcuda_launches++, const cudaLaunchConfig_t *config, const void *kernel, void **arguments)
DOES_NOTHING(cudaFuncSetAttribute, const void *kernel, enum cudaFuncAttribute what, int value)
GIVES(cudaFuncGetAttributes,
      memset(found, 0, sizeof *found); found->maxThreadsPerBlock = 1024; found->binaryVersion = found->ptxVersion = 80,
      struct cudaFuncAttributes *found, const void *kernel)
GIVES(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, *n = 2,
      int *n, const void *kernel, int block, size_t shared, unsigned flags)

/* ---- The driver's functions, which nulldriver.c has, or which do nothing either */

static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
  *found = driver ? dlsym(driver, name) : NULL;
  if (!*found) *found = (void *)nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

/* ---- Matrix products: cuBLAS would look for a real GPU. Its own headers are not needed, because these functions get
   their arguments and ignore nearly all. A matrix product counts as a launch. */

#define CUBLAS(name) int name(void) { return 0; }
#define PRODUCT(name) int name(void) { nullcuda_launches++; return 0; }
int cublasCreate_v2(void **handle) { *handle = calloc(1, 64); return 0; }
CUBLAS(cublasDestroy_v2)
CUBLAS(cublasSetStream_v2)
CUBLAS(cublasSetWorkspace_v2)
CUBLAS(cublasSetMathMode)
CUBLAS(cublasGetMathMode)
CUBLAS(cublasSetPointerMode_v2)
CUBLAS(cublasGetPointerMode_v2)
CUBLAS(cublasSetSmCountTarget)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasSdot_v2)

int cublasLtCreate(void **handle) { *handle = calloc(1, 64); return 0; }
int cublasLtMatmulDescCreate(void **made) { *made = calloc(1, 64); return 0; }
int cublasLtMatmulPreferenceCreate(void **made) { *made = calloc(1, 64); return 0; }
int cublasLtMatrixLayoutCreate(void **made) { *made = calloc(1, 64); return 0; }
CUBLAS(cublasLtMatmulDescSetAttribute)
CUBLAS(cublasLtMatmulPreferenceSetAttribute)
CUBLAS(cublasLtMatrixLayoutSetAttribute)
CUBLAS(cublasLtMatmulDescDestroy)
CUBLAS(cublasLtMatmulPreferenceDestroy)
CUBLAS(cublasLtMatrixLayoutDestroy)
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int asked, void *results, int *found) { *found = 1; return 0; }
PRODUCT(cublasLtMatmul)
