/* A libnvidia-ml.so.1 that plays a trace: the functions that tlt_verl calls through pynvml, and no others.
 *
 * NVML_SIM_TRACE names the trace, NVML_SIM_MOMENT a file with the number of the moment that is now (from 0), and
 * NVML_SIM_CALLS a file to which each call's name is appended. All are read at every call. A line of the trace is one of
 *
 *   moment                                            the next moment begins, with no devices
 *   device UUID [name=A] [free=GiB] [util=PERCENT] [mig=1] [lost=1]
 *   instance UUID gi=N ci=N [free=GiB]                a MIG instance of the device above it
 *   process PID [mem=GiB] [sm=PERCENT] [at=US]        of the device or instance above it; mem=-1: not told;
 *                                                     at: of its sample, without it every moment has a new one
 *   error FUNCTION CODE                               what the function returns
 *
 * A handle is a place in the list of this moment, so that one that is kept over a change of indices is another device:
 * worse than the real library, where it stays what it was.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS, UNINITIALIZED, INVALID, NOT_SUPPORTED, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };
enum { DEVICES = 16, PROCESSES = 16, ERRORS = 16, SAMPLES = 100 };
#define GIB (1024.0 * 1024 * 1024)

typedef struct { unsigned gpu, memory; } Utilisation;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } ProcessInfo;
typedef struct { unsigned pid; unsigned long long at; unsigned sm, mem, enc, dec; } UtilisationSample;
_Static_assert(sizeof(ProcessInfo) == 24 && sizeof(UtilisationSample) == 32, "layouts of nvml.h");

typedef struct { unsigned pid, sm; double mem; unsigned long long at; } Process;
typedef struct {
    char uuid[96], name[64];
    double free;
    unsigned util, gi, ci;
    int mig, lost, parent, count;
    Process processes[PROCESSES];
} Device;
typedef struct { char function[64]; int code; } Error;

static Device devices[DEVICES];
static Error errors[ERRORS];
static int device_count, error_count, sessions;

static double value(const char *line, const char *key, double otherwise) {
    const char *found = strstr(line, key);
    return found ? atof(found + strlen(key)) : otherwise;
}

static long now(void) {
    long moment = 0;
    FILE *file = fopen(getenv("NVML_SIM_MOMENT"), "r");
    if (file) {
        if (fscanf(file, "%ld", &moment) != 1) moment = 0;
        fclose(file);
    }
    return moment;
}

static void add_device(const char *line, int parent) {
    Device *device = &devices[device_count++];
    memset(device, 0, sizeof *device);
    sscanf(line, "%*s %95s", device->uuid);
    strcpy(device->name, "Simulated A");
    const char *name = strstr(line, "name=");
    if (name) sscanf(name, "name=%63s", device->name);
    device->free = value(line, "free=", 80), device->util = (unsigned)value(line, "util=", 0);
    device->gi = (unsigned)value(line, "gi=", 0), device->ci = (unsigned)value(line, "ci=", 0);
    device->mig = (int)value(line, "mig=", 0), device->lost = (int)value(line, "lost=", 0), device->parent = parent;
}

static void add_process(const char *line, long moment) {
    Device *device = &devices[device_count - 1];
    Process *process = &device->processes[device->count++];
    sscanf(line, "%*s %u", &process->pid);
    process->mem = value(line, "mem=", 1), process->sm = (unsigned)value(line, "sm=", 0);
    process->at = (unsigned long long)value(line, "at=", 1e6 * (double)(moment + 1));
}

static void load(void) {
    char line[256], word[16];
    long wanted = now(), moment = -1;
    int parent = -1;
    FILE *file = fopen(getenv("NVML_SIM_TRACE"), "r");
    device_count = error_count = 0;
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "%15s", word) != 1) continue;
        if (!strcmp(word, "moment")) moment++;
        if (moment != wanted) continue;
        if (!strcmp(word, "device")) add_device(line, -1), parent = device_count - 1;
        if (!strcmp(word, "instance")) add_device(line, parent);
        if (!strcmp(word, "process")) add_process(line, moment);
        if (!strcmp(word, "error")) {
            Error *error = &errors[error_count++];
            sscanf(line, "%*s %63s %d", error->function, &error->code);
        }
    }
    if (file) fclose(file);
}

/* What every function does first: note the call, read the trace, and fail where the trace or the session says so. */
static int begin(const char *function) {
    FILE *calls = fopen(getenv("NVML_SIM_CALLS"), "a");
    if (calls) fprintf(calls, "%s\n", function), fclose(calls);
    load();
    for (int i = 0; i < error_count; i++)
        if (!strcmp(errors[i].function, function)) return errors[i].code;
    return sessions || !strcmp(function, "nvmlInitWithFlags") ? SUCCESS : UNINITIALIZED;
}

#define BEGIN                         \
    do {                              \
        int code = begin(__func__);   \
        if (code) return code;        \
    } while (0)

#define DEVICE(handle)                                                                        \
    BEGIN;                                                                                    \
    if ((uintptr_t)(handle) < 1 || (uintptr_t)(handle) > (uintptr_t)device_count) return INVALID; \
    Device *device = &devices[(uintptr_t)(handle)-1];                                         \
    if (device->lost) return GPU_IS_LOST

static void *handle_of(int place) { return (void *)(uintptr_t)(place + 1); }

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    BEGIN;
    sessions++;
    return SUCCESS;
}

int nvmlShutdown(void) {
    BEGIN;
    sessions--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    (void)code;
    return "an error without a name";
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    BEGIN;
    snprintf(version, size, "580.65.06");
    return SUCCESS;
}

/* The place of the index-th device (of = -1), or of the index-th instance of a device; device_count where there is none. */
static int place(unsigned index, int of) {
    int i = 0;
    for (; i < device_count; i++)
        if (devices[i].parent == of && index-- == 0) break;
    return i;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    BEGIN;
    for (*count = 0; place(*count, -1) < device_count;) ++*count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    BEGIN;
    int found = place(index, -1);
    if (found == device_count) return INVALID;
    *handle = handle_of(found);
    return devices[found].lost ? GPU_IS_LOST : SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    BEGIN;
    for (int i = 0; i < device_count; i++)
        if (!strcmp(devices[i].uuid, uuid)) {
            *handle = handle_of(i);
            return devices[i].lost ? GPU_IS_LOST : SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size) {
    DEVICE(handle);
    snprintf(uuid, size, "%s", device->uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned size) {
    DEVICE(handle);
    snprintf(name, size, "%s", device->name);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    DEVICE(handle);
    *current = *pending = (unsigned)device->mig;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
    DEVICE(handle);
    *count = device->mig ? 7 : 0;
    return SUCCESS;
}

/* The first place is free, as it is after an instance was removed. */
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **instance) {
    DEVICE(handle);
    int found = index ? place(index - 1, (int)(device - devices)) : device_count;
    if (found == device_count) return NOT_FOUND;
    *instance = handle_of(found);
    return SUCCESS;
}

int nvmlDeviceGetGpuInstanceId(void *handle, unsigned *id) {
    DEVICE(handle);
    *id = device->gi;
    return device->parent < 0 ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetComputeInstanceId(void *handle, unsigned *id) {
    DEVICE(handle);
    *id = device->ci;
    return device->parent < 0 ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *handle, Utilisation *rates) {
    DEVICE(handle);
    rates->gpu = device->util, rates->memory = 0;
    return device->parent < 0 ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    DEVICE(handle);
    memory->total = (unsigned long long)(80 * GIB), memory->free = (unsigned long long)(device->free * GIB);
    memory->used = memory->total - memory->free;
    return SUCCESS;
}

static int processes(const Device *device, unsigned *count, ProcessInfo *infos) {
    unsigned room = *count;
    *count = (unsigned)device->count;
    if (room < *count) return INSUFFICIENT_SIZE;
    for (int i = 0; i < device->count; i++) {
        const Process *process = &device->processes[i];
        unsigned long long used = process->mem < 0 ? ~0ULL : (unsigned long long)(process->mem * GIB);
        infos[i] = (ProcessInfo){process->pid, used, device->gi, device->ci};
    }
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, ProcessInfo *infos) {
    DEVICE(handle);
    return processes(device, count, infos);
}

/* Of drivers before 510, with the same layout. */
int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, ProcessInfo *infos) {
    DEVICE(handle);
    return processes(device, count, infos);
}

/* As the driver does: room for a hundred is asked for, unless nobody is there, and only what is newer and not 0 is told. */
int nvmlDeviceGetProcessUtilization(void *handle, UtilisationSample *samples, unsigned *count, unsigned long long since) {
    DEVICE(handle);
    if (device->parent >= 0) return NOT_SUPPORTED;
    if (!samples) {
        *count = device->count ? SAMPLES : 0;
        return device->count ? INSUFFICIENT_SIZE : SUCCESS;
    }
    *count = 0;
    for (int i = 0; i < device->count; i++) {
        const Process *process = &device->processes[i];
        if (process->sm && process->at > since)
            samples[(*count)++] = (UtilisationSample){process->pid, process->at, process->sm, 0, 0, 0};
    }
    return *count ? SUCCESS : NOT_FOUND;
}
