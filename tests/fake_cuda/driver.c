/* A CUDA driver without a GPU: the calls of virtual memory management over mmap and a memfd, with
 * the driver's rules, so that allocator/cuda.py and the real cuda.bindings run on any Linux machine.
 *
 * Addresses are ordinary memory of the process. What the real driver leaves undefined or forgives
 * is an error here: a call without a current context, or with another device's; a page is filled
 * with 0xff (NaN) when it is created. Where the documentation speaks of the minimum granularity,
 * sizes and addresses are held to it.
 *
 * Each call takes a time, which is counted and not spent.
 *
 * Environment: FAKE_CUDA_GRANULARITY, FAKE_CUDA_MEMORY (bytes of a device), FAKE_CUDA_ADDRESSES
 * (bytes that can be reserved, in all), FAKE_CUDA_DEVICES, FAKE_CUDA_VERSION, FAKE_CUDA_WITHOUT (a function that this driver is too old for), FAKE_CUDA_VMM
 * (0: devices without virtual memory management), FAKE_CUDA_INIT (the error of cuInit).
 * Functions for tests: fake_fail, fake_calls, fake_nanoseconds, fake_others_take, fake_committed, fake_mappings,
 * fake_reservations, fake_contexts. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define MAX_DEVICES 4

typedef enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100,
    INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_FOUND = 500, CONTEXT_IS_DESTROYED = 709,
    NOT_SUPPORTED = 801, SYSTEM_DRIVER_MISMATCH = 803, ILLEGAL_ADDRESS = 700
} Result;

static const struct { Result code; const char *name, *text; } errors[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {SYSTEM_DRIVER_MISMATCH, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
     "system has unsupported display driver / cuda driver combination"},
};

/* The layout of cuda.h. */
typedef struct { int type, id; } Location;
typedef struct {
    int type, handle_types;
    Location location;
    void *win32;
    unsigned char compression, rdma;
    unsigned short usage;
    unsigned char reserved[4];
} Properties;
typedef struct { Location location; int flags; } Access;
enum { PINNED = 1, ON_DEVICE = 1, READ = 1, READ_WRITE = 3, ATTRIBUTE_VMM = 102 };

typedef struct { int device, references; } Context; /* a device's primary one */
typedef struct Reservation { uintptr_t at; size_t size; struct Reservation *next; } Reservation;
typedef struct Allocation { /* freed when it is released and mapped nowhere */
    int device, released, mappings;
    size_t offset, size; /* in the device's memfd */
} Allocation;
typedef struct Mapping {
    uintptr_t at; size_t size; Allocation *allocation; int access; struct Mapping *next;
} Mapping;
typedef struct { int fd; unsigned char *used; size_t committed, others; } Device;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread Context *current;
static int ready, num_devices, vmm;
static size_t granularity, memory, pages, addresses, reserved;
static Device devices[MAX_DEVICES];
static Context contexts[MAX_DEVICES];
static Reservation *reservations;
static Mapping *mappings;
static Allocation **allocations; /* a handle is an index, plus one */
static size_t num_allocations;

static size_t setting(const char *name, size_t otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 0) : otherwise;
}

/* Nanoseconds of a call, as vAttention (arXiv 2405.04437) and kvcached measured them on an A100; the
 * calls that are not here take 100. */
static const struct { const char *name; long nanoseconds; } costs[] = {
    {"cuMemMap", 1500}, {"cuMemSetAccess", 38000}, {"cuMemUnmap", 30000}, {"cuMemCreate", 60000},
    {"cuMemRelease", 30000}, {"cuMemAddressReserve", 2000}, {"cuMemAddressFree", 2000},
    {"cuMemGetInfo_v2", 10000},
};

/* Counted calls, and the one that is to fail. */
static struct { char name[48]; long calls, cost, fails_at; Result code; } counts[64];
static long nanoseconds, calls;

static int count_of(const char *name) {
    int i = 0;
    while (counts[i].name[0] && strcmp(counts[i].name, name)) i++;
    if (counts[i].name[0]) return i;
    snprintf(counts[i].name, sizeof counts[i].name, "%s", name);
    counts[i].cost = 100;
    for (size_t j = 0; j < sizeof costs / sizeof *costs; j++)
        if (!strcmp(costs[j].name, name)) counts[i].cost = costs[j].nanoseconds;
    return i;
}

static Result enter(const char *name) {
    pthread_mutex_lock(&lock);
    int i = count_of(name);
    counts[i].calls++;
    calls++;
    nanoseconds += counts[i].cost;
    if (counts[i].fails_at && !--counts[i].fails_at) return counts[i].code;
    return ready ? SUCCESS : NOT_INITIALIZED;
}

static Result leave(Result result) {
    pthread_mutex_unlock(&lock);
    return result;
}

#define ENTER do { Result r_ = enter(__func__); if (r_) return leave(r_); } while (0)
#define CHECK(condition, error) do { if (!(condition)) return leave(error); } while (0)
#define WHOLE(x) ((x) % granularity == 0)

static Result context_error(void) {
    if (!current) return INVALID_CONTEXT;
    return current->references ? SUCCESS : CONTEXT_IS_DESTROYED;
}
#define CONTEXT CHECK(!context_error(), context_error())

/* Functions for tests. The n-th next call of a function fails with `code`; 0 takes that back.
 * Returns which next call was to fail until now; 0 is none. */
API long fake_fail(const char *name, long n, int code) {
    pthread_mutex_lock(&lock);
    int i = count_of(name);
    long before = counts[i].fails_at;
    counts[i].fails_at = n;
    counts[i].code = (Result)code;
    pthread_mutex_unlock(&lock);
    return before;
}
API long fake_calls(const char *name) { return name ? counts[count_of(name)].calls : calls; }
API long fake_nanoseconds(void) { return nanoseconds; }
API void fake_others_take(size_t bytes) { devices[0].others = bytes; }
API size_t fake_committed(void) { return devices[0].committed; }
API int fake_contexts(void) { return contexts[0].references; }
API long fake_mappings(void) {
    long n = 0;
    for (Mapping *m = mappings; m; m = m->next) n++;
    return n;
}
API long fake_reservations(void) {
    long n = 0;
    for (Reservation *r = reservations; r; r = r->next) n++;
    return n;
}

API Result cuInit(unsigned flags) {
    pthread_mutex_lock(&lock);
    CHECK(!flags, INVALID_VALUE);
    CHECK(!setting("FAKE_CUDA_INIT", 0), (Result)setting("FAKE_CUDA_INIT", 0));
    if (ready) return leave(SUCCESS);
    num_devices = (int)setting("FAKE_CUDA_DEVICES", 1);
    CHECK(num_devices > 0 && num_devices <= MAX_DEVICES, NO_DEVICE);
    granularity = setting("FAKE_CUDA_GRANULARITY", 2 << 20);
    memory = setting("FAKE_CUDA_MEMORY", (size_t)4 << 30);
    pages = memory / granularity;
    addresses = setting("FAKE_CUDA_ADDRESSES", (size_t)1 << 47);
    vmm = (int)setting("FAKE_CUDA_VMM", 1);
    for (int i = 0; i < num_devices; i++) {
        devices[i].fd = memfd_create("fake-cuda", MFD_CLOEXEC);
        devices[i].used = calloc(pages, 1);
        contexts[i].device = i;
        CHECK(devices[i].fd >= 0 && !ftruncate(devices[i].fd, (off_t)memory), OUT_OF_MEMORY);
    }
    ready = 1;
    return leave(SUCCESS);
}

API Result cuDriverGetVersion(int *version) {
    *version = (int)setting("FAKE_CUDA_VERSION", 13000);
    return SUCCESS;
}

API Result cuDeviceGetCount(int *count) {
    ENTER;
    *count = num_devices;
    return leave(SUCCESS);
}

API Result cuDeviceGet(int *device, int ordinal) {
    ENTER;
    CHECK(ordinal >= 0 && ordinal < num_devices, INVALID_DEVICE);
    *device = ordinal;
    return leave(SUCCESS);
}

API Result cuDeviceGetName(char *name, int size, int device) {
    ENTER;
    CHECK(device >= 0 && device < num_devices, INVALID_DEVICE);
    snprintf(name, (size_t)size, "Fake CUDA device");
    return leave(SUCCESS);
}

API Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER;
    CHECK(device >= 0 && device < num_devices, INVALID_DEVICE);
    CHECK(attribute == ATTRIBUTE_VMM, INVALID_VALUE);
    *value = vmm;
    return leave(SUCCESS);
}

API Result cuDevicePrimaryCtxRetain(Context **context, int device) {
    ENTER;
    CHECK(device >= 0 && device < num_devices, INVALID_DEVICE);
    *context = &contexts[device];
    contexts[device].references++;
    return leave(SUCCESS);
}

API Result cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER;
    CHECK(device >= 0 && device < num_devices, INVALID_DEVICE);
    CHECK(contexts[device].references, INVALID_CONTEXT);
    contexts[device].references--;
    return leave(SUCCESS);
}

API Result cuCtxGetCurrent(Context **context) {
    ENTER;
    *context = current;
    return leave(SUCCESS);
}

API Result cuCtxSetCurrent(Context *context) {
    ENTER;
    CHECK(!context || context->references, CONTEXT_IS_DESTROYED);
    current = context;
    return leave(SUCCESS);
}

API Result cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER;
    CONTEXT;
    Device *device = &devices[current->device];
    size_t taken = device->committed + device->others;
    *free_bytes = taken < memory ? memory - taken : 0;
    *total = memory;
    return leave(SUCCESS);
}

static Result properties_error(const Properties *p) {
    if (!p || p->type != PINNED || p->location.type != ON_DEVICE || p->handle_types)
        return INVALID_VALUE;
    return p->location.id >= 0 && p->location.id < num_devices ? SUCCESS : INVALID_DEVICE;
}

API Result cuMemGetAllocationGranularity(size_t *size, const Properties *properties, int option) {
    ENTER;
    CHECK(!properties_error(properties), properties_error(properties));
    CHECK(option == 0 || option == 1, INVALID_VALUE);
    *size = option ? 4 * granularity : granularity; /* 1: the recommended one */
    return leave(SUCCESS);
}

/* Address space: what is not mapped faults. */
static int hide(uintptr_t at, size_t size) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    return mmap((void *)at, size, PROT_NONE, flags, -1, 0) != MAP_FAILED;
}

API Result cuMemAddressReserve(
    uintptr_t *at, size_t size, size_t alignment, uintptr_t hint, unsigned long long flags
) {
    ENTER;
    CONTEXT;
    (void)hint;
    CHECK(size && WHOLE(size) && !flags && !(alignment & (alignment - 1)), INVALID_VALUE);
    CHECK(size <= addresses - reserved, OUT_OF_MEMORY);
    size_t step = alignment > granularity ? alignment : granularity;
    int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *got = mmap(NULL, size + step, PROT_NONE, kind, -1, 0);
    CHECK(got != MAP_FAILED, OUT_OF_MEMORY);
    uintptr_t begin = ((uintptr_t)got + step - 1) / step * step, end = begin + size;
    if (begin > (uintptr_t)got) munmap(got, begin - (uintptr_t)got);
    if ((uintptr_t)got + size + step > end) munmap((void *)end, (uintptr_t)got + step + size - end);
    Reservation *r = malloc(sizeof *r);
    *r = (Reservation){begin, size, reservations};
    reservations = r;
    reserved += size;
    *at = begin;
    return leave(SUCCESS);
}

static int overlaps(Mapping *m, uintptr_t at, size_t size) {
    return m->at < at + size && at < m->at + m->size;
}

API Result cuMemAddressFree(uintptr_t at, size_t size) {
    ENTER;
    CONTEXT;
    Reservation **link = &reservations;
    while (*link && (*link)->at != at) link = &(*link)->next;
    CHECK(*link && (*link)->size == size, INVALID_VALUE);
    for (Mapping *m = mappings; m; m = m->next) CHECK(!overlaps(m, at, size), INVALID_VALUE);
    Reservation *gone = *link;
    *link = gone->next;
    free(gone);
    reserved -= size;
    munmap((void *)at, size);
    return leave(SUCCESS);
}

API Result cuMemCreate(
    uint64_t *handle, size_t size, const Properties *properties, unsigned long long flags
) {
    ENTER;
    CONTEXT;
    CHECK(!properties_error(properties), properties_error(properties));
    CHECK(size && WHOLE(size) && !flags, INVALID_VALUE);
    CHECK(current->device == properties->location.id, INVALID_CONTEXT);
    Device *device = &devices[current->device];
    CHECK(device->committed + device->others + size <= memory, OUT_OF_MEMORY);
    size_t wanted = size / granularity, run = 0, page = 0;
    for (; page < pages && run < wanted; page++) run = device->used[page] ? 0 : run + 1;
    CHECK(run == wanted, OUT_OF_MEMORY);
    page -= wanted;
    memset(device->used + page, 1, wanted);
    device->committed += size;
    off_t offset = (off_t)(page * granularity);
    void *bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, device->fd, offset);
    CHECK(bytes != MAP_FAILED, OUT_OF_MEMORY);
    memset(bytes, 0xff, size);
    munmap(bytes, size);
    Allocation *a = malloc(sizeof *a);
    *a = (Allocation){current->device, 0, 0, (size_t)offset, size};
    allocations = realloc(allocations, (num_allocations + 1) * sizeof *allocations);
    allocations[num_allocations++] = a;
    *handle = num_allocations;
    return leave(SUCCESS);
}

static Allocation *allocation_of(uint64_t handle) {
    if (!handle || handle > num_allocations) return NULL;
    Allocation *a = allocations[handle - 1];
    return a && !a->released ? a : NULL;
}

static void free_if_unused(Allocation *a) {
    if (!a->released || a->mappings) return;
    Device *device = &devices[a->device];
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    if (fallocate(device->fd, mode, (off_t)a->offset, (off_t)a->size)) abort();
    memset(device->used + a->offset / granularity, 0, a->size / granularity);
    device->committed -= a->size;
    free(a);
}

API Result cuMemRelease(uint64_t handle) {
    ENTER;
    CONTEXT;
    Allocation *a = allocation_of(handle);
    CHECK(a, INVALID_VALUE);
    a->released = 1;
    allocations[handle - 1] = NULL;
    free_if_unused(a);
    return leave(SUCCESS);
}

API Result cuMemMap(
    uintptr_t at, size_t size, size_t offset, uint64_t handle, unsigned long long flags
) {
    ENTER;
    CONTEXT;
    Allocation *a = allocation_of(handle);
    CHECK(a && size && WHOLE(at) && WHOLE(size) && !offset && !flags, INVALID_VALUE);
    CHECK(size <= a->size, INVALID_VALUE);
    CHECK(current->device == a->device, INVALID_CONTEXT);
    Reservation *r = reservations;
    while (r && !(r->at <= at && at + size <= r->at + r->size)) r = r->next;
    CHECK(r, INVALID_VALUE);
    for (Mapping *m = mappings; m; m = m->next) CHECK(!overlaps(m, at, size), INVALID_VALUE);
    int fd = devices[a->device].fd;
    void *got = mmap(
        (void *)at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, fd, (off_t)a->offset);
    CHECK(got != MAP_FAILED, OUT_OF_MEMORY);
    Mapping *m = malloc(sizeof *m);
    *m = (Mapping){at, size, a, 0, mappings};
    mappings = m;
    a->mappings++;
    return leave(SUCCESS);
}

/* Bytes of a range that are mapped, or 0 where a mapping lies partly in it. */
static size_t mapped_in(uintptr_t at, size_t size) {
    size_t bytes = 0;
    for (Mapping *m = mappings; m; m = m->next) {
        if (!overlaps(m, at, size)) continue;
        if (m->at < at || m->at + m->size > at + size) return 0;
        bytes += m->size;
    }
    return bytes;
}

API Result cuMemUnmap(uintptr_t at, size_t size) {
    ENTER;
    CONTEXT;
    CHECK(size && WHOLE(at) && WHOLE(size) && mapped_in(at, size) == size, INVALID_VALUE);
    if (!hide(at, size)) abort();
    for (Mapping **link = &mappings; *link;) {
        Mapping *m = *link;
        if (!overlaps(m, at, size)) { link = &m->next; continue; }
        *link = m->next;
        m->allocation->mappings--;
        free_if_unused(m->allocation);
        free(m);
    }
    return leave(SUCCESS);
}

API Result cuMemSetAccess(uintptr_t at, size_t size, const Access *access, size_t count) {
    ENTER;
    CONTEXT;
    CHECK(size && WHOLE(at) && WHOLE(size) && mapped_in(at, size) == size, INVALID_VALUE);
    CHECK(count == 1 && access->location.type == ON_DEVICE, INVALID_VALUE);
    CHECK(access->location.id == current->device, INVALID_DEVICE);
    int flags = access->flags;
    CHECK(!flags || flags == READ || flags == READ_WRITE, INVALID_VALUE);
    int protection = flags == READ_WRITE ? PROT_READ | PROT_WRITE : flags ? PROT_READ : PROT_NONE;
    CHECK(!mprotect((void *)at, size, protection), OUT_OF_MEMORY);
    for (Mapping *m = mappings; m; m = m->next)
        if (overlaps(m, at, size)) m->access = flags;
    return leave(SUCCESS);
}

/* Whether every byte of a range may be touched with an access of at least `flags`. */
static int accessible(uintptr_t at, size_t size, int flags) {
    size_t bytes = 0;
    for (Mapping *m = mappings; m; m = m->next) {
        if (!overlaps(m, at, size) || m->access < flags) continue;
        uintptr_t begin = m->at > at ? m->at : at, end = m->at + m->size;
        bytes += (end < at + size ? end : at + size) - begin;
    }
    return bytes == size;
}

API Result cuMemcpyDtoH_v2(void *to, uintptr_t from, size_t size) {
    ENTER;
    CONTEXT;
    CHECK(accessible(from, size, READ), INVALID_VALUE);
    memcpy(to, (void *)from, size);
    return leave(SUCCESS);
}

API Result cuMemcpyHtoD_v2(uintptr_t to, const void *from, size_t size) {
    ENTER;
    CONTEXT;
    CHECK(accessible(to, size, READ_WRITE), INVALID_VALUE);
    memcpy((void *)to, from, size);
    return leave(SUCCESS);
}

static Result describe(Result error, const char **text, int name) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == error) {
            *text = name ? errors[i].name : errors[i].text;
            return SUCCESS;
        }
    *text = NULL;
    return INVALID_VALUE;
}
API Result cuGetErrorName(Result error, const char **text) { return describe(error, text, 1); }
API Result cuGetErrorString(Result error, const char **text) { return describe(error, text, 0); }

#define FUNCTION(name) {#name, (void *)name}
#define FUNCTION_V2(name) {#name, (void *)name##_v2}
static const struct { const char *name; void *function; } functions[] = {
    FUNCTION(cuInit), FUNCTION(cuDriverGetVersion), FUNCTION(cuDeviceGet),
    FUNCTION(cuDeviceGetCount), FUNCTION(cuDeviceGetName), FUNCTION(cuDeviceGetAttribute),
    FUNCTION(cuDevicePrimaryCtxRetain),
    FUNCTION_V2(cuDevicePrimaryCtxRelease), FUNCTION(cuCtxGetCurrent), FUNCTION(cuCtxSetCurrent),
    FUNCTION_V2(cuMemGetInfo), FUNCTION(cuMemGetAllocationGranularity),
    FUNCTION(cuMemAddressReserve), FUNCTION(cuMemAddressFree), FUNCTION(cuMemCreate),
    FUNCTION(cuMemRelease), FUNCTION(cuMemMap), FUNCTION(cuMemUnmap), FUNCTION(cuMemSetAccess),
    FUNCTION_V2(cuMemcpyDtoH), FUNCTION_V2(cuMemcpyHtoD), FUNCTION(cuGetErrorName), FUNCTION(cuGetErrorString),
};

API Result cuGetProcAddress_v2(
    const char *name, void **function, int version, uint64_t flags, int *status
) {
    (void)version, (void)flags;
    const char *without = getenv("FAKE_CUDA_WITHOUT");
    *function = NULL;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (!strcmp(name, functions[i].name) && !(without && !strcmp(name, without)))
            *function = functions[i].function;
    if (status) *status = *function ? 0 : 1; /* CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND */
    return *function ? SUCCESS : NOT_FOUND;
}
