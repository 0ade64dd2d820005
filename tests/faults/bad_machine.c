/* A machine on which things go wrong, for the processes that load this before all else (LD_PRELOAD).
 *
 * What is wrong is said by files in the folder $BAD_MACHINE, which may come and go while the processes run:
 *
 *     readonly   nothing can be made, opened for writing or renamed below $BAD_MACHINE_PATHS (EROFS)
 *     slow       there, the first write to a file and every flush take as many seconds as the file says
 *     back       the clock is as many seconds behind as the file says; the monotonic one is as always
 *
 * $BAD_MACHINE_PATHS: parts of paths, with colons between them. The kernel's clock is not touched: calls that wait until
 * a time of day are given the kernel's time for it, so that they wait as long as they would on a machine whose clock was
 * set back. What the kernel itself notes (the times of files) is not set back.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define LOOK_EVERY_NS 20000000LL
#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

enum { READONLY, SLOW, BACK, FAULTS };
static const char *const NAMES[FAULTS] = {"readonly", "slow", "back"};

static int real_clock(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    return real(clock, now);
}

/* The number in a fault's file: 0 where there is no such file, at least 1 where there is. Looked at again now and then. */
static long fault(int which) {
    static const char *folder;
    static _Atomic long long looked_at[FAULTS];
    static _Atomic long value[FAULTS];
    if (!folder && !(folder = getenv("BAD_MACHINE"))) return 0;
    struct timespec now;
    real_clock(CLOCK_MONOTONIC_COARSE, &now);
    long long now_ns = now.tv_sec * 1000000000LL + now.tv_nsec;
    if (looked_at[which] && now_ns - looked_at[which] < LOOK_EVERY_NS) return value[which];
    char path[4096], text[32] = "";
    int kept = errno;
    snprintf(path, sizeof path, "%s/%s", folder, NAMES[which]);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        if (read(fd, text, sizeof text - 1) < 0) text[0] = 0;
        close(fd);
    }
    value[which] = fd < 0 ? 0 : atol(text) > 0 ? atol(text) : 1;
    looked_at[which] = now_ns;
    errno = kept;
    return value[which];
}

/* Whether a path is below one of $BAD_MACHINE_PATHS. */
static int is_meant(const char *path) {
    const char *part = getenv("BAD_MACHINE_PATHS");
    while (path && part && *part) {
        size_t length = strcspn(part, ":");
        if (length && memmem(path, strlen(path), part, length)) return 1;
        part += length + (part[length] == ':');
    }
    return 0;
}

static int is_open_on_meant(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_meant(path);
}

static int is_refused(const char *path) {
    if (!fault(READONLY) || !is_meant(path)) return 0;
    errno = EROFS;
    return 1;
}

static int opens_to_write(int flags) {
    return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
}

/* --- a folder that cannot be written */

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        REAL(name); \
        return opens_to_write(flags) && is_refused(path) ? -1 : real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        REAL(name); \
        return opens_to_write(flags) && is_refused(path) ? -1 : real(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        return strpbrk(mode, "wa+") && is_refused(path) ? NULL : real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    struct stat found;
    if (lstat(path, &found) && is_refused(path)) return -1; /* one that is there is EEXIST, also on such a disk */
    return real(path, mode);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return is_refused(to) ? -1 : real(from, to);
}

int symlink(const char *target, const char *path) {
    REAL(symlink);
    return is_refused(path) ? -1 : real(target, path);
}

int unlink(const char *path) {
    REAL(unlink);
    return is_refused(path) ? -1 : real(path);
}

/* --- a disk that is slow */

static void drag(int fd) {
    long seconds = fault(SLOW);
    if (!seconds || !is_open_on_meant(fd)) return;
    int kept = errno;
    struct timespec left = {seconds, 0};
    while (nanosleep(&left, &left) && errno == EINTR) {
    }
    errno = kept;
}

ssize_t write(int fd, const void *bytes, size_t count) {
    REAL(write);
    if (fd > 2 && fault(SLOW) && lseek(fd, 0, SEEK_CUR) == 0) drag(fd);
    return real(fd, bytes, count);
}

int fsync(int fd) {
    REAL(fsync);
    drag(fd);
    return real(fd);
}

int fdatasync(int fd) {
    REAL(fdatasync);
    drag(fd);
    return real(fd);
}

/* --- a clock that was set back */

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = real_clock(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec -= fault(BACK);
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    REAL(gettimeofday);
    int failed = real(now, zone);
    if (!failed) now->tv_sec -= fault(BACK);
    return failed;
}

time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}

/* The kernel's time for a time of day that is waited for. A monotonic time, which counts from the start of the machine,
 * stays what it is: the two cannot be taken for each other. */
static struct timespec kernels(const struct timespec *until) {
    struct timespec end = *until;
    if (end.tv_sec > 1000000000) end.tv_sec += fault(BACK);
    return end;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    REAL(pthread_cond_timedwait);
    struct timespec end = kernels(until);
    return real(condition, mutex, &end);
}

int pthread_cond_clockwait(
    pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until
) {
    REAL(pthread_cond_clockwait);
    struct timespec end = kernels(until);
    return real(condition, mutex, clock, &end);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    REAL(sem_timedwait);
    struct timespec end = kernels(until);
    return real(semaphore, &end);
}

int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *until) {
    REAL(sem_clockwait);
    struct timespec end = kernels(until);
    return real(semaphore, clock, &end);
}

long syscall(long number, ...) {
    long a[6];
    va_list more;
    va_start(more, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(more, long);
    va_end(more);
    REAL(syscall);
    struct timespec end;
    if (number == SYS_futex && a[1] & FUTEX_CLOCK_REALTIME && a[3]) {
        end = kernels((const struct timespec *)a[3]);
        a[3] = (long)&end;
    }
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
