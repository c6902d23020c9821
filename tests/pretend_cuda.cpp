// A libcuda.so.1 without a GPU: what cuda-core's bindings and our launcher ask of the driver, answered and written down.
// The structures are spelt out from CUDA's reference of the driver API, so that the bindings' own layout is judged too.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

struct Attribute {
  unsigned id;
  char pad[4];
  unsigned value[16];
};
struct Config {
  unsigned grid[3], block[3], shared;
  void *stream;
  Attribute *attributes;
  unsigned count;
};
struct Kernel {
  char name[64];
};
enum { OK, INVALID_VALUE, NO_BINARY_FOR_GPU = 209 };

// One line of the book, whole whatever other threads write.
static int noted(const char *line, int result = OK) {
  static FILE *book = fopen(getenv("PRETEND_BOOK"), "a");
  fprintf(book, "%s\n", line);
  fflush(book);
  return result;
}

extern "C" {
int cuGetProcAddress_v2(const char *name, void **found, int, unsigned long long, int *status) {
  static void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  *found = dlsym(self, name);
  if (status) *status = *found ? 0 : 1;
  return OK;
}
int cuInit(unsigned) { return OK; }
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuGetErrorString(int error, const char **words) {
  *words = error == INVALID_VALUE ? "invalid argument" : "no such luck";
  return OK;
}
int cuThreadExchangeStreamCaptureMode(int *mode) {
  static thread_local int now = 0;
  char line[64];
  sprintf(line, "capture %d to %d", now, *mode);
  int before = now;
  now = *mode;
  *mode = before;
  return noted(line);
}
int cuLibraryLoadData(void **library, const void *code, void *, void *, unsigned, void *, void *, unsigned) {
  *library = (void *)1;
  return noted("load", memcmp(code, "\x7f" "ELF", 4) || getenv("PRETEND_OLD") ? NO_BINARY_FOR_GPU : OK);
}
int cuLibraryGetKernel(Kernel **kernel, void *, const char *name) {
  *kernel = new Kernel;
  strncpy((*kernel)->name, name, 63);
  return OK;
}
int cuKernelGetFunction(Kernel **function, Kernel *kernel) { *function = kernel; return OK; }
static thread_local void *context = nullptr;
int cuCtxGetCurrent(void **found) { *found = context; return OK; }
int cuDevicePrimaryCtxRetain(void **found, int device) { *found = (void *)(100l + device); return OK; }
int cuCtxSetCurrent(void *given) {
  context = given;
  char line[64];
  sprintf(line, "context %ld", (long)given);
  return noted(line);
}
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int) { *value = attribute == 97 ? 232448 : 0; return OK; }
int cuFuncGetAttribute(int *value, int attribute, Kernel *) {
  *value = attribute == 0 ? 512 : attribute == 1 ? 1024 : 0;  // threads of a block, static shared memory
  return OK;
}
int cuFuncSetAttribute(Kernel *, int attribute, int value) {
  char line[64];
  sprintf(line, "set %d to %d", attribute, value);
  return noted(line);
}
// Parameters of each kernel here: long long, float, pointer, int, pointer.
int cuLaunchKernelEx(const Config *config, Kernel *function, void **arguments, void **) {
  const unsigned *g = config->grid, *b = config->block;
  if (g[0] == 66666) return INVALID_VALUE;
  char line[512], *end = line;
  end += sprintf(end, "launch %s grid %u %u %u block %u %u %u shared %u stream %p", function->name, g[0], g[1], g[2],
                 b[0], b[1], b[2], config->shared, config->stream);
  for (unsigned n = 0; n < config->count; n++)
    end += sprintf(end, " attribute %u=%u", config->attributes[n].id, config->attributes[n].value[0]);
  sprintf(end, " with %lld %g %p %d %p", *(long long *)arguments[0], *(float *)arguments[1], *(void **)arguments[2],
          *(int *)arguments[3], *(void **)arguments[4]);
  return noted(line);
}
}
