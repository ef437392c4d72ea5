/* Sees the file operations of the process under one folder: records them, or lets the n-th fail.
 * Of what a process asks the system for (memory, threads, libraries, open files) the n-th fails too.
 *
 * Loaded with LD_PRELOAD, it does nothing until a function that begins with faults_ is called. One
 * mutex orders the operations: the record is the order in which they took place. What is written
 * through a mapping is not seen. Errors, short writes and deaths are injected once. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))

/* Kinds of operation; the numbers are those of tests/faults/shim.py. */
enum {
    WRITE = 1, TRUNCATE, SYNC, CREATE, RENAME, UNLINK, MKDIR, RMDIR, NOTE, LINK,
    MMAP, MEMFD, FALLOCATE, THREAD, LIBRARY, OPEN, MEMORY
};
/* Faults. */
enum { FAIL = 1, SHORT, TORN, KILL };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX];
static size_t folder_length;
static int record = -1;
static int fault, fault_kinds, fault_errno, fault_hit;
static long fault_at, seen;
static int fault_for_good; /* all from the n-th on */

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

API void faults_watch(const char *path, int handle)
{
    snprintf(folder, sizeof folder, "%s", path);
    folder_length = strlen(folder);
    record = handle;
}

API void faults_arm(int what, int kinds, long at, int number)
{
    fault = what, fault_kinds = kinds, fault_at = at, fault_errno = number;
    seen = fault_hit = fault_for_good = 0;
}

API void faults_for_good(void) { fault_for_good = 1; }
API long faults_seen(void) { return seen; }

/* In a program that can't call: FAULTS has kind, number, error of one call to fail, and a word of
 * the command line that tells the process. */
__attribute__((constructor)) static void arm_by_environment(int count, char **words)
{
    const char *told = getenv("FAULTS");
    int kind, number;
    long at;
    char word[64];
    if (!told || sscanf(told, "%d %ld %d %63s", &kind, &at, &number, word) != 4)
        return;
    for (int i = 1; i < count; i++)
        if (!strcmp(words[i], word))
            faults_arm(FAIL, 1 << kind, at, number);
}

API int faults_was_hit(void) { return fault_hit; }

static int watched(const char *path)
{
    return folder_length && !strncmp(path, folder, folder_length) &&
           (path[folder_length] == '/' || !path[folder_length]);
}

static int path_of(int handle, char *path)
{
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(name, path, PATH_MAX - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return watched(path);
}

static int path_at(int directory, const char *name, char *path)
{
    if (name[0] == '/')
        snprintf(path, PATH_MAX, "%s", name);
    else {
        if (directory == AT_FDCWD ? !getcwd(path, PATH_MAX) : !path_of(directory, path))
            return 0;
        size_t length = strlen(path);
        snprintf(path + length, PATH_MAX - length, "/%s", name);
    }
    return watched(path);
}

static void put(const void *data, size_t size)
{
    REAL(write);
    while (size) {
        ssize_t wrote = real(record, data, size);
        if (wrote <= 0)
            abort(); /* a record with a hole would prove nothing */
        data = (const char *)data + wrote, size -= wrote;
    }
}

/* kind, identity of the file, offset, lengths of path, other path and data; then those three. */
static void note(int kind, uint64_t file, uint64_t offset, const char *path, const char *other,
                 const void *data, size_t size)
{
    if (record < 0)
        return;
    uint64_t head[6] = {kind, file, offset, strlen(path), other ? strlen(other) : 0, size};
    put(head, sizeof head);
    put(path, head[3]);
    if (other)
        put(other, head[4]);
    if (size)
        put(data, size);
}

API void faults_note(const char *text)
{
    pthread_mutex_lock(&mutex);
    note(NOTE, 0, 0, text, NULL, NULL, 0);
    pthread_mutex_unlock(&mutex);
}

static uint64_t identity(int handle)
{
    struct stat status;
    return fstat(handle, &status) ? 0 : status.st_ino;
}

/* Whether this operation is to go wrong; the mutex is held. */
static int due(int kind)
{
    if (!fault || !(fault_kinds >> kind & 1))
        return 0;
    if (++seen != fault_at && !(fault_for_good && seen > fault_at))
        return 0;
    fault_hit = 1;
    if (fault == KILL)
        kill(getpid(), SIGKILL);
    errno = fault_errno;
    return fault;
}

/* Whether the system refuses this request; sets errno. */
static int refused(int kind)
{
    if (!fault || !(fault_kinds >> kind & 1))
        return 0;
    pthread_mutex_lock(&mutex);
    int what = due(kind);
    pthread_mutex_unlock(&mutex);
    return what == FAIL;
}

static ssize_t do_write(int handle, const void *data, size_t size, off_t offset, int positioned)
{
    REAL(pwrite);
    __typeof__(write) *plain = dlsym(RTLD_NEXT, "write");
    char path[PATH_MAX];
    if (!folder_length || handle == record || !path_of(handle, path))
        return positioned ? real(handle, data, size, offset) : plain(handle, data, size);
    pthread_mutex_lock(&mutex);
    ssize_t wrote = -1;
    int what = due(WRITE);
    if (what != FAIL) {
        if (what && size > 1)
            size /= 2;
        if (!positioned)
            offset = lseek(handle, 0, SEEK_CUR);
        wrote = positioned ? real(handle, data, size, offset) : plain(handle, data, size);
        if (what == TORN)
            kill(getpid(), SIGKILL);
        if (wrote > 0)
            note(WRITE, identity(handle), offset, path, NULL, data, wrote);
    }
    pthread_mutex_unlock(&mutex);
    return wrote;
}

API ssize_t write(int h, const void *d, size_t s) { return do_write(h, d, s, 0, 0); }
API ssize_t pwrite(int h, const void *d, size_t s, off_t o) { return do_write(h, d, s, o, 1); }
API ssize_t pwrite64(int h, const void *d, size_t s, off64_t o) { return do_write(h, d, s, o, 1); }

static int do_sync(int handle, int (*real)(int))
{
    char path[PATH_MAX];
    if (!folder_length || !path_of(handle, path))
        return real(handle);
    pthread_mutex_lock(&mutex);
    int failed = due(SYNC) ? -1 : real(handle), number = failed ? errno : 0;
    struct stat status;
    int directory = !fstat(handle, &status) && S_ISDIR(status.st_mode);
    note(SYNC, status.st_ino, number, path, directory ? "directory" : NULL, NULL, 0);
    errno = number;
    pthread_mutex_unlock(&mutex);
    return failed;
}

API int fsync(int handle) { REAL(fsync); return do_sync(handle, real); }
API int fdatasync(int handle) { REAL(fdatasync); return do_sync(handle, real); }

static int do_truncate(int handle, off_t size)
{
    REAL(ftruncate);
    char path[PATH_MAX];
    if (!folder_length || !path_of(handle, path))
        return real(handle, size);
    pthread_mutex_lock(&mutex);
    int failed = due(TRUNCATE) ? -1 : real(handle, size);
    if (!failed)
        note(TRUNCATE, identity(handle), size, path, NULL, NULL, 0);
    pthread_mutex_unlock(&mutex);
    return failed;
}

API int ftruncate(int handle, off_t size) { return do_truncate(handle, size); }
API int ftruncate64(int handle, off64_t size) { return do_truncate(handle, size); }

static int do_open(int directory, const char *name, int flags, mode_t mode)
{
    REAL(openat);
    char path[PATH_MAX];
    if (refused(OPEN))
        return -1;
    if (!folder_length || !(flags & (O_CREAT | O_TRUNC)) || !path_at(directory, name, path))
        return real(directory, name, flags, mode);
    pthread_mutex_lock(&mutex);
    int handle = -1, existed = !faccessat(directory, name, F_OK, 0);
    if (existed || !due(CREATE))
        handle = real(directory, name, flags, mode);
    if (handle >= 0 && !existed)
        note(CREATE, identity(handle), 0, path, NULL, NULL, 0);
    else if (handle >= 0 && flags & O_TRUNC)
        note(TRUNCATE, identity(handle), 0, path, NULL, NULL, 0);
    pthread_mutex_unlock(&mutex);
    return handle;
}

#define MODE(last) va_list list; va_start(list, last); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; va_end(list)

API int open(const char *p, int flags, ...) { MODE(flags); return do_open(AT_FDCWD, p, flags, mode); }
API int open64(const char *p, int flags, ...)
{
    MODE(flags);
    return do_open(AT_FDCWD, p, flags, mode);
}
API int openat(int d, const char *p, int flags, ...) { MODE(flags); return do_open(d, p, flags, mode); }
API int openat64(int d, const char *p, int flags, ...)
{
    MODE(flags);
    return do_open(d, p, flags, mode);
}

static int do_rename(int from, const char *old, int to, const char *new)
{
    REAL(renameat);
    char path[PATH_MAX], other[PATH_MAX];
    if (!folder_length || !path_at(from, old, path) || !path_at(to, new, other))
        return real(from, old, to, new);
    pthread_mutex_lock(&mutex);
    int failed = due(RENAME) ? -1 : real(from, old, to, new);
    if (!failed)
        note(RENAME, 0, 0, path, other, NULL, 0);
    pthread_mutex_unlock(&mutex);
    return failed;
}

API int rename(const char *a, const char *b) { return do_rename(AT_FDCWD, a, AT_FDCWD, b); }
API int renameat(int f, const char *a, int t, const char *b) { return do_rename(f, a, t, b); }

API int link(const char *old, const char *new)
{
    REAL(link);
    char path[PATH_MAX], other[PATH_MAX];
    if (!folder_length || !path_at(AT_FDCWD, old, path) || !path_at(AT_FDCWD, new, other))
        return real(old, new);
    pthread_mutex_lock(&mutex);
    int failed = due(LINK) ? -1 : real(old, new);
    if (!failed)
        note(LINK, 0, 0, path, other, NULL, 0);
    pthread_mutex_unlock(&mutex);
    return failed;
}

static int do_unlink(int directory, const char *name, int flags)
{
    REAL(unlinkat);
    char path[PATH_MAX];
    int kind = flags & AT_REMOVEDIR ? RMDIR : UNLINK;
    if (!folder_length || !path_at(directory, name, path))
        return real(directory, name, flags);
    pthread_mutex_lock(&mutex);
    int failed = due(kind) ? -1 : real(directory, name, flags);
    if (!failed)
        note(kind, 0, 0, path, NULL, NULL, 0);
    pthread_mutex_unlock(&mutex);
    return failed;
}

API int unlink(const char *name) { return do_unlink(AT_FDCWD, name, 0); }
API int rmdir(const char *name) { return do_unlink(AT_FDCWD, name, AT_REMOVEDIR); }
API int unlinkat(int directory, const char *name, int f) { return do_unlink(directory, name, f); }

API int mkdir(const char *name, mode_t mode)
{
    REAL(mkdir);
    char path[PATH_MAX];
    if (!folder_length || !path_at(AT_FDCWD, name, path))
        return real(name, mode);
    pthread_mutex_lock(&mutex);
    int failed = due(MKDIR) ? -1 : real(name, mode);
    if (!failed)
        note(MKDIR, 0, 0, path, NULL, NULL, 0);
    pthread_mutex_unlock(&mutex);
    return failed;
}

API void *mmap(void *at, size_t size, int access, int flags, int handle, off_t offset)
{
    REAL(mmap);
    return refused(MMAP) ? MAP_FAILED : real(at, size, access, flags, handle, offset);
}

API void *mmap64(void *at, size_t size, int access, int flags, int handle, off64_t offset)
{
    return mmap(at, size, access, flags, handle, offset);
}

API int memfd_create(const char *name, unsigned flags)
{
    REAL(memfd_create);
    return refused(MEMFD) ? -1 : real(name, flags);
}

API int fallocate(int handle, int mode, off_t offset, off_t size)
{
    REAL(fallocate);
    return refused(FALLOCATE) ? -1 : real(handle, mode, offset, size);
}

API int fallocate64(int handle, int mode, off64_t offset, off64_t size)
{
    return fallocate(handle, mode, offset, size);
}

API int posix_fallocate(int handle, off_t offset, off_t size)
{
    REAL(posix_fallocate);
    return refused(FALLOCATE) ? errno : real(handle, offset, size);
}

API int posix_fallocate64(int handle, off64_t offset, off64_t size)
{
    return posix_fallocate(handle, offset, size);
}

API int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *of)
{
    REAL(pthread_create);
    return refused(THREAD) ? errno : real(thread, how, run, of);
}

API void *dlopen(const char *name, int flags)
{
    REAL(dlopen);
    /* A name that is not there leaves words for dlerror. */
    return real(name && refused(LIBRARY) ? "/refused/library.so" : name, flags);
}

/* What torch makes tensors of, and blocks for which the C library maps memory. */
extern void *__libc_malloc(size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);

API int posix_memalign(void **block, size_t alignment, size_t size)
{
    if (refused(MEMORY))
        return errno;
    void *found = __libc_memalign(alignment, size);
    if (!found)
        return ENOMEM;
    *block = found;
    return 0;
}

API void *malloc(size_t size)
{
    return size >= 128 << 10 && refused(MEMORY) ? NULL : __libc_malloc(size);
}
