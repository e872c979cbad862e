// A GPU in name only, for PyTorch's CUDA build on a machine without one: preloaded, it takes the place of NVIDIA's
// driver, of the runtime's calls into it, and of cuBLAS. Memory is the host's, so copies are real; a kernel, product or
// graph that is launched does nothing; a capture refuses what a real one refuses of synchronising calls and copies.
#define _GNU_SOURCE
#include <driver_types.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// What was called, read by every_option.py.
enum { LAUNCHES, TRITON_LAUNCHES, GRAPH_LAUNCHES, READS, WAITS, OUTSIDE_CAPTURE, NUM_COUNTS };
long long counts[NUM_COUNTS];
#define COUNT(what) __atomic_add_fetch(&counts[what], 1, __ATOMIC_RELAXED)

typedef void *Stream;
static Stream capturing;
static int is_capturing;
static int refused(const char *call) {
  fprintf(stderr, "%s while a stream is captured\n", call);
  return cudaErrorStreamCaptureUnsupported;
}

// --- memory ---

enum { PAGEABLE, DEVICE, PINNED };
typedef struct {
  char *start;
  size_t size;
  int kind;
} Range;
static Range ranges[1 << 16];
static int num_ranges;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int find(const char *pointer) {  // locked
  for (int i = 0; i < num_ranges; i++)
    if (ranges[i].start && pointer >= ranges[i].start && pointer < ranges[i].start + ranges[i].size) return i;
  return -1;
}
static int kind_of(const void *pointer) {
  pthread_mutex_lock(&lock);
  int i = find(pointer), kind = i < 0 ? PAGEABLE : ranges[i].kind;
  pthread_mutex_unlock(&lock);
  return kind;
}
static void add(void *start, size_t size, int kind) {
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < num_ranges && ranges[i].start) i++;
  if (i == sizeof ranges / sizeof *ranges) abort();
  num_ranges += i == num_ranges;
  ranges[i] = (Range){start, size, kind};
  pthread_mutex_unlock(&lock);
}
static size_t drop(void *start) {
  pthread_mutex_lock(&lock);
  int i = find(start);
  size_t size = i < 0 ? 0 : ranges[i].size;
  if (i >= 0) ranges[i].start = NULL;
  pthread_mutex_unlock(&lock);
  return size;
}
static int allocate(void **pointer, size_t size, int kind) {
  size = (size + 4096) & ~4095UL;
  *pointer = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*pointer == MAP_FAILED) return cudaErrorMemoryAllocation;
  add(*pointer, size, kind);
  return 0;
}
static int release(void *pointer) {
  size_t size = drop(pointer);
  if (size) munmap(pointer, size);
  return 0;
}
static int copy(void *to, const void *from, size_t size, const char *call) {
  if (kind_of(from) == DEVICE && kind_of(to) != DEVICE) COUNT(READS);
  if (is_capturing && (kind_of(from) == PAGEABLE || kind_of(to) == PAGEABLE)) return refused(call);
  memmove(to, from, size);
  return 0;
}

int cudaMalloc(void **p, size_t size) { return allocate(p, size, DEVICE); }
int cudaMallocAsync(void **p, size_t size, Stream s) { return allocate(p, size, DEVICE); }
int cudaHostAlloc(void **p, size_t size, unsigned flags) { return allocate(p, size, PINNED); }
int cudaHostRegister(void *p, size_t size, unsigned flags) { return add(p, size, PINNED), 0; }
int cudaHostUnregister(void *p) { return drop(p), 0; }
int cudaFree(void *p) { return release(p); }
int cudaFreeAsync(void *p, Stream s) { return release(p); }
int cudaFreeHost(void *p) { return release(p); }
int cudaMemset(void *p, int value, size_t size) { return memset(p, value, size), 0; }
int cudaMemsetAsync(void *p, int value, size_t size, Stream s) { return memset(p, value, size), 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  return is_capturing ? refused("cudaMemcpy") : copy(to, from, size, "cudaMemcpy");
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, Stream s) {
  return copy(to, from, size, "cudaMemcpyAsync of pageable memory");
}
int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height) {
  for (size_t i = 0; i < height; i++) memmove((char *)to + i * to_pitch, (char *)from + i * from_pitch, width);
  return 0;
}
int cudaMemGetInfo(size_t *free, size_t *total) { return *total = 150754820096UL, *free = 140000000000UL, 0; }
int cudaGetSymbolAddress(void **p, const void *symbol) {
  static char anything[1 << 16];
  return *p = anything, 0;
}
int cudaPointerGetAttributes(struct cudaPointerAttributes *found, void *p) {
  static const int types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeDevice, cudaMemoryTypeHost};
  int kind = kind_of(p);
  memset(found, 0, sizeof *found);
  found->type = types[kind];
  found->device = kind == PAGEABLE ? -2 : 0;
  if (kind != PAGEABLE) found->devicePointer = p;
  if (kind == PINNED) found->hostPointer = p;
  return 0;
}
int cuPointerGetAttribute(void **found, int attribute, void *p) {
  if (kind_of(p) == PAGEABLE) return 1;
  if (attribute == 3) *found = p;  // CU_POINTER_ATTRIBUTE_DEVICE_POINTER
  return 0;
}

// --- the device: an H200 ---

static int attribute(int number) {
  static const int values[][2] = {
      {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}, {8, 49152}, {10, 32},
      {12, 65536}, {13, 1980000}, {16, 132}, {36, 2619000}, {37, 6144}, {38, 62914560}, {39, 2048}, {75, 9}, {76, 0},
      {81, 233472}, {82, 65536}, {95, 1}, {97, 232448}, {106, 32}, {111, 1024}, {115, 1},
  };
  for (size_t i = 0; i < sizeof values / sizeof *values; i++)
    if (values[i][0] == number) return values[i][1];
  return 0;
}
int cudaGetDeviceCount(int *n) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  *n = !visible || (*visible && *visible != '-');
  return *n ? 0 : cudaErrorNoDevice;
}
int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
int cudaDeviceGetAttribute(int *value, int number, int device) { return *value = attribute(number), 0; }
int cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, 0; }
int cudaDeviceGetDefaultMemPool(void **pool, int device) { return *pool = (void *)16, 0; }
int cudaDeviceGetPCIBusId(char *id, int size, int device) { return snprintf(id, size, "0000:01:00.0"), 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "stand-in for an H200");
  p->totalGlobalMem = 150754820096UL;
  p->major = attribute(75);
  p->minor = attribute(76);
  p->multiProcessorCount = attribute(16);
  p->warpSize = attribute(10);
  p->maxThreadsPerBlock = attribute(1);
  p->maxThreadsPerMultiProcessor = attribute(39);
  p->maxBlocksPerMultiProcessor = attribute(106);
  for (int i = 0; i < 3; i++) p->maxThreadsDim[i] = attribute(2 + i), p->maxGridSize[i] = attribute(5 + i);
  p->regsPerBlock = attribute(12);
  p->regsPerMultiprocessor = attribute(82);
  p->sharedMemPerBlock = attribute(8);
  p->sharedMemPerBlockOptin = attribute(97);
  p->sharedMemPerMultiprocessor = attribute(81);
  p->reservedSharedMemPerBlock = attribute(111);
  p->l2CacheSize = attribute(38);
  p->memoryBusWidth = attribute(37);
  p->cooperativeLaunch = p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1;
  return 0;
}

// --- streams, events, graphs ---

static void *handle(void) {
  static long last = 0x1000;
  return (void *)__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED);
}
int cudaStreamCreate(Stream *s) { return *s = handle(), 0; }
int cudaStreamCreateWithPriority(Stream *s, unsigned flags, int priority) { return *s = handle(), 0; }
int cudaStreamGetPriority(Stream s, int *priority) { return *priority = 0, 0; }
int cudaStreamQuery(Stream s) { return is_capturing && s == capturing ? refused("cudaStreamQuery") : 0; }
int cudaStreamSynchronize(Stream s) {
  COUNT(WAITS);
  return is_capturing && s == capturing ? refused("cudaStreamSynchronize") : 0;
}
int cudaDeviceSynchronize(void) { return COUNT(WAITS), is_capturing ? refused("cudaDeviceSynchronize") : 0; }
int cudaEventSynchronize(void *event) { return COUNT(WAITS), is_capturing ? refused("cudaEventSynchronize") : 0; }
int cudaStreamAddCallback(Stream s, void (*call)(Stream, int, void *), void *data) { return call(s, 0, data), 0; }
int cudaLaunchHostFunc(Stream s, void (*call)(void *), void *data) { return call(data), 0; }
int cudaEventCreate(void **event) { return *event = handle(), 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return *event = handle(), 0; }
int cudaEventElapsedTime(float *milliseconds, void *start, void *end) { return *milliseconds = 1, 0; }
int cudaStreamBeginCapture(Stream s, int mode) {
  if (is_capturing) return refused("cudaStreamBeginCapture");
  return capturing = s, is_capturing = 1, 0;
}
int cudaStreamEndCapture(Stream s, void **graph) { return *graph = handle(), is_capturing = 0, 0; }
int cudaStreamIsCapturing(Stream s, int *status) { return *status = is_capturing && s == capturing, 0; }
int cudaStreamGetCaptureInfo(Stream s, int *status, unsigned long long *id, void **graph, void **nodes, void **edges,
                             size_t *num_nodes) {
  *status = is_capturing && s == capturing;
  if (id) *id = 1;
  if (graph) *graph = (void *)16;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (num_nodes) *num_nodes = 0;
  return 0;
}
int cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  return *executable = handle(), 0;
}
int cudaGraphGetNodes(void *graph, void **nodes, size_t *n) { return *n = 1, 0; }
int cudaGraphNodeGetDependencies(void *node, void **nodes, void *edges, size_t *n) { return *n = 0, 0; }
int cudaGraphLaunch(void *executable, Stream s) { return COUNT(GRAPH_LAUNCHES), 0; }

// --- kernels ---

static int launched(int what, Stream s) {
  COUNT(what);
  if (is_capturing && s != capturing) COUNT(OUTSIDE_CAPTURE);
  return 0;
}
typedef struct { unsigned x, y, z; } Size;
int cudaLaunchKernel(void *f, Size grid, Size block, void **arguments, size_t shared, Stream s) {
  return launched(LAUNCHES, s);
}
int __cudaLaunchKernel(void *f, Size grid, Size block, void **arguments, size_t shared, Stream s) {
  return launched(LAUNCHES, s);
}
int __cudaGetKernel(void **kernel, void *f) { return *kernel = f, 0; }
int cudaLaunchKernelExC(const cudaLaunchConfig_t *config, void *f, void **arguments) {
  return launched(LAUNCHES, config->stream);
}
int cudaFuncGetAttributes(struct cudaFuncAttributes *found, void *f) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  found->maxDynamicSharedSizeBytes = 49152;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, void *f, int block, size_t shared, unsigned flags) {
  return *n = 2, 0;
}

// --- the driver, as Triton, Inductor and PyTorch call it ---

int cuDeviceGet(int *device, int number) { return *device = number, 0; }
int cuDeviceGetAttribute(int *value, int number, int device) { return *value = attribute(number), 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)16, 0; }
int cuCtxGetCurrent(void **context) { return *context = (void *)16, 0; }
int cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "an error of the stand-in", 0; }
int cuModuleLoad(void **module, const char *path) { return *module = handle(), 0; }
int cuModuleLoadData(void **module, const void *image) { return *module = handle(), 0; }
int cuModuleGetFunction(void **f, void *module, const char *name) { return *f = handle(), 0; }
int cuFuncGetAttribute(int *value, int number, void *f) { return *value = number ? number == 4 ? 64 : 0 : 1024, 0; }
int cuOccupancyMaxActiveClusters(int *n, void *f, void *config) { return *n = 132, 0; }
typedef struct { unsigned grid[3], block[3], shared; Stream stream; } Launch;
int cuLaunchKernelEx(const Launch *config, void *f, void **arguments) {
  return launched(TRITON_LAUNCHES, config->stream);
}
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned x, unsigned y, unsigned z, unsigned shared,
                   Stream s) {
  return launched(TRITON_LAUNCHES, s);
}
static int yes(void) { return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                     int *status) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (!*f) *f = (void *)yes;
  if (status) *status = 0;
  return 0;
}

// --- cuBLAS ---

int cublasCreate_v2(void **p) { return *p = handle(), 0; }
int cublasLtMatmulDescCreate(void **p) { return *p = handle(), 0; }
int cublasLtMatrixLayoutCreate(void **p) { return *p = handle(), 0; }
int cublasLtMatmulPreferenceCreate(void **p) { return *p = handle(), 0; }
int cublasGetMathMode(void *blas, int *mode) { return *mode = 0, 0; }
int cublasGetPointerMode_v2(void *blas, int *mode) { return *mode = 0, 0; }
size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulAlgoGetHeuristic(void *blas, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int most, char *found, int *n) {
  return memset(found, 0, 128), *n = 1, 0;
}

// What else may be called: yes. run.sh adds those of cuBLAS.
#define YES(name) \
  int name() { return 0; }
YES(cudaSetDevice) YES(cudaGetLastError) YES(cudaPeekAtLastError) YES(cudaDeviceEnablePeerAccess)
YES(cudaMemcpyPeerAsync) YES(cudaMemcpyToSymbol) YES(cudaStreamDestroy) YES(cudaStreamWaitEvent) YES(cudaEventDestroy)
YES(cudaEventQuery) YES(cudaEventRecord) YES(cudaEventRecordWithFlags) YES(cudaThreadExchangeStreamCaptureMode)
YES(cudaGraphDestroy) YES(cudaGraphExecDestroy) YES(cudaGraphDebugDotPrint) YES(cudaProfilerStart)
YES(cudaProfilerStop) YES(cudaFuncSetAttribute) YES(cudaMemPoolGetAttribute) YES(cudaMemPoolSetAttribute) YES(cuInit)
YES(cuCtxSetCurrent) YES(cuCtxSetLimit) YES(cuModuleUnload) YES(cuFuncSetAttribute) YES(cuFuncSetCacheConfig)
YES(cuModuleGetLoadingMode) YES(cuTensorMapEncodeTiled) YES(cuStreamIsCapturing)
