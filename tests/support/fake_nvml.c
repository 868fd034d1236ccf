/* A stand-in for libnvidia-ml.so.1: GPUs whose power follows a script with a known integral, with Hopper's habits
 * (instant power over 25 of every 100 ms, a 1 s average, an energy counter that moves every 100 ms, a buffer of 119
 * samples 20 ms apart). The real nvidia-ml-py loads it by name through LD_LIBRARY_PATH; fake_nvml.py builds it.
 *
 * Environment: FAKE_NVML_GPUS=2  FAKE_NVML_POWER_0="PERIOD_S T:W T:W ..." (straight lines between points, repeated)
 *   FAKE_NVML_CLOCK=scripted|real  FAKE_NVML_ENERGY_READ_US=2400  FAKE_NVML_RESET_S=T  FAKE_NVML_MIG=1  FAKE_NVML_CLAMP_MHZ=1830
 *   FAKE_NVML_FAIL="GPU:FUNCTION:CODE[:FROM_S] ..."  (FUNCTION without "nvml", * for all, -1 for every GPU)
 *   FAKE_NVML_PROCESSES="GPU:PID ..."  FAKE_NVML_LINKS="switch:COUNT" or "GPU-GPU:COUNT ..."  FAKE_NVML_TOPOLOGY=LEVEL
 *   FAKE_NVML_STATE=FILE (clock locks, limits and zero, shared by processes)  FAKE_NVML_NAME="NVIDIA GH200 480GB"
 *   FAKE_NVML_SCOPES="1:1.5 2:0.1" (power scope: its power as a multiple of the GPU's; "all": a driver that knows no scopes)
 *   FAKE_NVML_STILL_S=T (the energy counter stands still from then on)  FAKE_NVML_JUMP="T:J" (it gets that much more at once)
 *   FAKE_NVML_HANG="FUNCTION:T:S" (the first call after T does not answer for S seconds; of the real clock, every such call)
 *   FAKE_NVML_REFRESH_S=2 (the energy counter moves so rarely)
 *   FAKE_NVML_CLOCK_POWER="A B C" (instead of a script: A + B x^2 + C / x watts at x times the highest clock)
 *   FAKE_NVML_STEP="T:S" (the wall clock, not the scripted monotonic one, is set ahead by S seconds at T; negative: back)
 *   FAKE_NVML_LOST="GPU:FILE" (it is lost once there is such a file)
 *   FAKE_NVML_PERSISTENCE=1  FAKE_NVML_ECC=1  FAKE_NVML_LOCKED_MHZ=1410 (by somebody, before)
 *   FAKE_NVML_REASONS=4 (clock event reasons)  FAKE_NVML_LIMIT_W=500 (of a default of 700)
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define GPUS 8
#define POINTS 64
#define EXPORT __attribute__((visibility("default")))
typedef unsigned long long u64;
typedef union { double d; unsigned u; u64 ull; } value_t;
typedef struct { unsigned field, scope; long long stamp, latency; int type, result; value_t value; } field_t;
typedef struct { u64 stamp; value_t value; } sample_t;
typedef struct { unsigned pid; u64 memory; unsigned instances[2]; } process_t;
typedef struct { char legacy[16]; unsigned domain, bus, device, pci, subsystem; char id[32]; } pci_t;
typedef struct { double period; int count; double t[POINTS], w[POINTS]; } wave_t;
typedef struct { u64 zero_us, now_us; unsigned ready, locked_mhz[GPUS], limit_mw[GPUS]; double moved_s[GPUS], moved_j[GPUS]; } state_t;

static state_t private_state, *state = &private_state;
static wave_t waves[GPUS];
static int gpus, scripted;
static unsigned clamp_mhz;
static double reset_s = -1;
static u64 energy_read_us;
static const u64 EPOCH_US = 1700000000000000ull;

static double number(const char *name, double otherwise) {
    const char *text = getenv(name);
    return text ? atof(text) : otherwise;
}

/* How much the wall clock is ahead of the steady one at `t`. */
static long long step_us(double t) {
    double at, seconds;
    const char *text = getenv("FAKE_NVML_STEP");
    return text && sscanf(text, "%lf:%lf", &at, &seconds) == 2 && t >= at ? (long long)(seconds * 1e6) : 0;
}
static u64 steady_us(void) {
    struct timespec now;
    if (scripted) return EPOCH_US + state->now_us;
    clock_gettime(CLOCK_REALTIME, &now);
    return now.tv_sec * 1000000ull + now.tv_nsec / 1000;
}
static double now_s(void) { return (double)(steady_us() - state->zero_us) / 1e6; }
static u64 unix_us(void) { return steady_us() + step_us(now_s()); }
static void spend(u64 us) {
    if (scripted) state->now_us += us;
    else if (us > 50) usleep(us);
}

EXPORT u64 fake_unix_us(void) { return unix_us(); }
EXPORT u64 fake_steady_us(void) { return steady_us(); }
EXPORT u64 fake_zero_us(void) { return state->zero_us; }
EXPORT void fake_advance_us(u64 us) { state->now_us += us; }
EXPORT unsigned fake_locked_mhz(int gpu) { return state->locked_mhz[gpu]; }

__attribute__((constructor)) static void load(void) {
    const char *path = getenv("FAKE_NVML_STATE"), *clock = getenv("FAKE_NVML_CLOCK");
    gpus = (int)number("FAKE_NVML_GPUS", 1);
    scripted = clock && !strcmp(clock, "scripted");
    clamp_mhz = (unsigned)number("FAKE_NVML_CLAMP_MHZ", 1980);
    reset_s = number("FAKE_NVML_RESET_S", -1);
    energy_read_us = (u64)number("FAKE_NVML_ENERGY_READ_US", 2400);
    if (path) {
        int file = open(path, O_RDWR | O_CREAT, 0600);
        if (file >= 0 && !ftruncate(file, sizeof(state_t))) {
            void *shared = mmap(0, sizeof(state_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
            if (shared != MAP_FAILED) state = shared;
        }
        if (file >= 0) close(file);
    }
    if (!state->ready) {
        for (int i = 0; i < GPUS; i++) state->limit_mw[i] = (unsigned)(1000 * number("FAKE_NVML_LIMIT_W", 700));
        for (int i = 0; i < GPUS; i++) state->locked_mhz[i] = (unsigned)number("FAKE_NVML_LOCKED_MHZ", 0);
        state->zero_us = steady_us();
        state->ready = 1;
    }
    for (int i = 0; i < GPUS; i++) {
        char name[32], copy[4096];
        snprintf(name, sizeof name, "FAKE_NVML_POWER_%d", i);
        snprintf(copy, sizeof copy, "%s", getenv(name) ? getenv(name) : "1 0:100 1:100");
        char *word = strtok(copy, " ");
        waves[i].period = atof(word);
        while ((word = strtok(0, " ")) && waves[i].count < POINTS) {
            sscanf(word, "%lf:%lf", &waves[i].t[waves[i].count], &waves[i].w[waves[i].count]);
            waves[i].count++;
        }
    }
}

/* Joules from the start of a period to `t` inside it. */
static double area(const wave_t *wave, double t) {
    double sum = 0;
    for (int i = 0; i + 1 < wave->count && wave->t[i] < t; i++) {
        double end = wave->t[i + 1] < t ? wave->t[i + 1] : t, length = wave->t[i + 1] - wave->t[i];
        double slope = length > 0 ? (wave->w[i + 1] - wave->w[i]) / length : 0, part = end - wave->t[i];
        sum += part * (wave->w[i] + slope * part / 2);
    }
    return sum;
}
/* Watts at a GPU's clock; 0 where power follows a script. The energy until the clock last moved is in the state. */
static double clock_w(int gpu) {
    double a, b, c, x = (state->locked_mhz[gpu] ? state->locked_mhz[gpu] : 1980) / 1980.0;
    const char *text = getenv("FAKE_NVML_CLOCK_POWER");
    return text && sscanf(text, "%lf %lf %lf", &a, &b, &c) == 3 ? a + b * x * x + c / x : 0;
}
static double joules(int gpu, double t) {
    double watts = clock_w(gpu);
    if (watts > 0) return state->moved_j[gpu] + watts * (t - state->moved_s[gpu]);
    const wave_t *wave = &waves[gpu];
    long rounds = (long)(t / wave->period) - (t < 0);
    return rounds * area(wave, wave->period) + area(wave, t - rounds * wave->period);
}
static void move_clock(int gpu, unsigned mhz) {
    double now = now_s();
    state->moved_j[gpu] = joules(gpu, now);
    state->moved_s[gpu] = now;
    state->locked_mhz[gpu] = mhz;
}
static double mean_w(int gpu, double end, double length) { return (joules(gpu, end) - joules(gpu, end - length)) / length; }
static unsigned watts_to_mw(double watts) { return (unsigned)(1000 * watts + 0.5); }
/* Every GPU refreshes at instants of its own. */
static double last_tick(int gpu, double every) {
    double phase = 0.037 + 0.013 * gpu;
    return (long)((now_s() - phase + 100 * every) / every) * every - 100 * every + phase;
}

static int fails(int gpu, const char *function) {
    char copy[1024], name[64];
    snprintf(copy, sizeof copy, "%s", getenv("FAKE_NVML_FAIL") ? getenv("FAKE_NVML_FAIL") : "");
    spend(2);
    static int hung;
    double hangs_from, hangs_s;
    const char *hang = getenv("FAKE_NVML_HANG");
    if (hang && sscanf(hang, "%63[^:]:%lf:%lf", name, &hangs_from, &hangs_s) == 3 && (!scripted || !hung) && now_s() >= hangs_from && !strcmp(name, function)) {
        hung = 1;
        spend((u64)(hangs_s * 1e6));
    }
    const char *lost = getenv("FAKE_NVML_LOST"), *file = lost ? strchr(lost, ':') : 0;
    if (file && atoi(lost) == gpu && !access(file + 1, F_OK)) return 15;
    for (char *rest, *word = strtok_r(copy, " ", &rest); word; word = strtok_r(0, " ", &rest)) {
        int which, code;
        double from = -1;
        if (sscanf(word, "%d:%63[^:]:%d:%lf", &which, name, &code, &from) < 3) continue;
        if ((which == gpu || which == -1) && (!strcmp(name, "*") || !strcmp(name, function)) && now_s() >= from) return code;
    }
    return 0;
}
#define GPU(device) ((int)(long)(device)-1)
#define TRY(name) do { int code = fails(GPU(device), name); if (code) return code; } while (0)

EXPORT int nvmlInitWithFlags(unsigned flags) { (void)flags; return fails(-2, "Init"); }
EXPORT int nvmlInit_v2(void) { return 0; }
EXPORT int nvmlShutdown(void) { return 0; }
EXPORT int nvmlDeviceGetCount_v2(unsigned *count) { fails(-2, "DeviceGetCount"); *count = gpus; return 0; }
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)(long)(index + 1);
    return index < (unsigned)gpus ? 0 : 2;
}
EXPORT const char *nvmlErrorString(int code) {
    return code == 3 ? "Not Supported" : code == 4 ? "Insufficient Permissions" : code == 15 ? "GPU is lost" : "Some Error";
}
EXPORT int nvmlDeviceGetName(void *device, char *name, unsigned size) {
    (void)device;
    snprintf(name, size, "%s", getenv("FAKE_NVML_NAME") ? getenv("FAKE_NVML_NAME") : "Scripted GPU");
    return 0;
}
EXPORT int nvmlDeviceGetUUID(void *device, char *uuid, unsigned size) {
    TRY("DeviceGetUUID");
    snprintf(uuid, size, "GPU-%df00", GPU(device));
    return 0;
}
EXPORT int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "580.0"); return 0; }
EXPORT int nvmlDeviceGetArchitecture(void *device, unsigned *kind) { (void)device; *kind = 9; return 0; }

/* A scope's power as a multiple of the GPU's; 0 where the board has no such meter. */
static double scope_factor(unsigned scope) {
    const char *text = getenv("FAKE_NVML_SCOPES") ? getenv("FAKE_NVML_SCOPES") : "";
    char copy[256];
    unsigned which;
    double factor;
    if (scope == 0 || !strcmp(text, "all")) return 1;
    snprintf(copy, sizeof copy, "%s", text);
    for (char *rest, *word = strtok_r(copy, " ", &rest); word; word = strtok_r(0, " ", &rest))
        if (sscanf(word, "%u:%lf", &which, &factor) == 2 && which == scope) return factor;
    return 0;
}
EXPORT int nvmlDeviceGetFieldValues(void *device, int count, field_t *fields) {
    TRY("DeviceGetFieldValues");
    for (int i = 0; i < count; i++) {
        char name[32];
        double tick = last_tick(GPU(device), 0.1), length = fields[i].field == 186 ? 0.025 : 1.0;
        snprintf(name, sizeof name, "Field%u", fields[i].field);
        double factor = scope_factor(fields[i].scope);
        fields[i].result = (fields[i].field == 185 || fields[i].field == 186) && factor > 0 ? fails(GPU(device), name) : 3;
        fields[i].type = 1;
        fields[i].stamp = unix_us();
        fields[i].value.ull = 0;
        fields[i].value.u = watts_to_mw(factor * mean_w(GPU(device), tick, length));
    }
    return 0;
}
EXPORT int nvmlDeviceGetPowerUsage(void *device, unsigned *mw) {
    TRY("DeviceGetPowerUsage");
    double over_s = number("FAKE_NVML_CAPABILITY", 90) > 80 ? 1.0 : 0.001; // GA100 and older: an instant
    *mw = watts_to_mw(mean_w(GPU(device), last_tick(GPU(device), 0.1), over_s));
    return 0;
}
EXPORT int nvmlDeviceGetTotalEnergyConsumption(void *device, u64 *mj) {
    TRY("DeviceGetTotalEnergyConsumption");
    double tick = last_tick(GPU(device), number("FAKE_NVML_REFRESH_S", 0.1)), still_s = number("FAKE_NVML_STILL_S", 1e9), jump_s = 1e9, jump_j = 0;
    if (tick > still_s) tick = still_s;
    if (getenv("FAKE_NVML_JUMP")) sscanf(getenv("FAKE_NVML_JUMP"), "%lf:%lf", &jump_s, &jump_j);
    double from = reset_s >= 0 && tick >= reset_s ? reset_s : -1000;
    *mj = (u64)(0.5 + 1000 * (joules(GPU(device), tick) - joules(GPU(device), from) + (tick >= jump_s ? jump_j : 0)));
    spend(energy_read_us);
    return 0;
}
EXPORT int nvmlDeviceGetSamples(void *device, int kind, u64 since, int *type, unsigned *count, sample_t *samples) {
    TRY("DeviceGetSamples");
    double last = last_tick(GPU(device), 0.02);
    unsigned found = 0, room = *count;
    if (kind != 0) return 3;
    *type = 1;
    for (int i = 118; i >= 0; i--) {
        double at = last - i * 0.02;
        u64 stamp = state->zero_us + (long long)(at * 1e6) + step_us(at);
        if (stamp <= since || at <= 0) continue;
        if (samples && found < room) {
            samples[found].stamp = stamp;
            samples[found].value.ull = 0;
            samples[found].value.u = watts_to_mw(mean_w(GPU(device), at, 0.02));
        }
        found++;
    }
    *count = samples && found > room ? room : found;
    return found ? 0 : 6;
}
EXPORT int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *mhz) {
    TRY("DeviceGetClockInfo");
    unsigned locked = state->locked_mhz[GPU(device)];
    *mhz = kind == 2 ? 3201 : locked ? locked : 1980;
    return 0;
}
EXPORT int nvmlDeviceGetMaxClockInfo(void *device, int kind, unsigned *mhz) { (void)device; *mhz = kind == 2 ? 3201 : 1980; return 0; }
EXPORT int nvmlDeviceGetPersistenceMode(void *device, unsigned *mode) {
    TRY("DeviceGetPersistenceMode");
    *mode = (unsigned)number("FAKE_NVML_PERSISTENCE", 1);
    return 0;
}
EXPORT int nvmlDeviceGetEccMode(void *device, unsigned *current, unsigned *pending) {
    TRY("DeviceGetEccMode");
    *current = (unsigned)number("FAKE_NVML_ECC", 1), *pending = 1;
    return 0;
}
EXPORT int nvmlDeviceGetUtilizationRates(void *device, unsigned rates[2]) {
    TRY("DeviceGetUtilizationRates");
    rates[0] = (unsigned)(mean_w(GPU(device), last_tick(GPU(device), 0.2), 0.2) / 7);
    rates[1] = rates[0] / 2;
    return 0;
}
EXPORT int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
    (void)sensor;
    TRY("DeviceGetTemperature");
    *celsius = 40;
    return 0;
}
EXPORT int nvmlDeviceGetTemperatureV(void *device, unsigned *query) {
    TRY("DeviceGetTemperature");
    query[2] = 40;
    return 0;
}
EXPORT int nvmlDeviceGetMemoryInfo(void *device, u64 memory[3]) {
    TRY("DeviceGetMemoryInfo");
    memory[0] = 141ull << 30, memory[2] = 64ull << 30, memory[1] = memory[0] - memory[2];
    return 0;
}
EXPORT int nvmlDeviceGetCurrentClocksEventReasons(void *device, u64 *reasons) {
    TRY("DeviceGetCurrentClocksEventReasons");
    *reasons = (state->locked_mhz[GPU(device)] ? 2 : 0) | (u64)number("FAKE_NVML_REASONS", 0);
    return 0;
}
EXPORT int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *mw) { TRY("DeviceGetEnforcedPowerLimit"); *mw = state->limit_mw[GPU(device)]; return 0; }
EXPORT int nvmlDeviceGetPowerManagementDefaultLimit(void *device, unsigned *mw) { TRY("DeviceGetPowerManagementDefaultLimit"); *mw = 700000; return 0; }
EXPORT int nvmlDeviceGetPowerManagementLimit(void *device, unsigned *mw) { *mw = state->limit_mw[GPU(device)]; return 0; }
EXPORT int nvmlDeviceGetPowerManagementLimitConstraints(void *device, unsigned *low, unsigned *high) { (void)device; *low = 200000, *high = 700000; return 0; }
EXPORT int nvmlDeviceSetPowerManagementLimit(void *device, unsigned mw) {
    TRY("DeviceSetPowerManagementLimit");
    state->limit_mw[GPU(device)] = mw;
    return 0;
}
EXPORT int nvmlDeviceSetGpuLockedClocks(void *device, unsigned low, unsigned high) {
    (void)low;
    TRY("DeviceSetGpuLockedClocks");
    move_clock(GPU(device), high < clamp_mhz ? high : clamp_mhz);
    return 0;
}
EXPORT int nvmlDeviceResetGpuLockedClocks(void *device) {
    TRY("DeviceResetGpuLockedClocks");
    move_clock(GPU(device), 0);
    return 0;
}
EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process_t *processes) {
    char copy[1024];
    unsigned found = 0, room = *count, pid;
    int gpu;
    TRY("DeviceGetComputeRunningProcesses");
    snprintf(copy, sizeof copy, "%s", getenv("FAKE_NVML_PROCESSES") ? getenv("FAKE_NVML_PROCESSES") : "");
    for (char *rest, *word = strtok_r(copy, " ", &rest); word; word = strtok_r(0, " ", &rest)) {
        if (sscanf(word, "%d:%u", &gpu, &pid) < 2 || gpu != GPU(device)) continue;
        if (processes && found < room) processes[found] = (process_t){.pid = pid, .memory = 1ull << 30};
        found++;
    }
    *count = found;
    return found > room ? 7 : 0;
}
/* Where a link ends: at a GPU, at a switch (-1), or there is no such link (-2). */
static int link_end(int gpu, unsigned link) {
    char copy[1024];
    unsigned count, first = 0;
    int a, b;
    snprintf(copy, sizeof copy, "%s", getenv("FAKE_NVML_LINKS") ? getenv("FAKE_NVML_LINKS") : "");
    for (char *rest, *word = strtok_r(copy, " ", &rest); word; word = strtok_r(0, " ", &rest)) {
        if (sscanf(word, "switch:%u", &count) == 1) return link < count ? -1 : -2;
        if (sscanf(word, "%d-%d:%u", &a, &b, &count) < 3 || (a != gpu && b != gpu)) continue;
        if (link - first < count) return a == gpu ? b : a;
        first += count;
    }
    return -2;
}
static void bus_id(int gpu, pci_t *info) {
    memset(info, 0, sizeof *info);
    if (gpu < 0) snprintf(info->id, sizeof info->id, "FFFFFFFF:FF:FF.0");
    else snprintf(info->id, sizeof info->id, "00000000:%02X:00.0", 6 + gpu);
}
EXPORT int nvmlDeviceGetPciInfo_v3(void *device, pci_t *info) { bus_id(GPU(device), info); return 0; }
EXPORT int nvmlDeviceGetNvLinkState(void *device, unsigned link, unsigned *active) {
    TRY("DeviceGetNvLinkState");
    *active = 1;
    return link_end(GPU(device), link) == -2 ? 2 : 0;
}
EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, pci_t *info) {
    bus_id(link_end(GPU(device), link), info);
    return 0;
}
EXPORT int nvmlDeviceGetTopologyCommonAncestor(void *device, void *peer, unsigned *level) {
    (void)peer;
    TRY("DeviceGetTopologyCommonAncestor");
    *level = (unsigned)number("FAKE_NVML_TOPOLOGY", 50);
    return 0;
}
EXPORT int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    (void)device;
    *major = (int)number("FAKE_NVML_CAPABILITY", 90) / 10, *minor = (int)number("FAKE_NVML_CAPABILITY", 90) % 10;
    return 0;
}
EXPORT int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    (void)device;
    *current = *pending = (unsigned)number("FAKE_NVML_MIG", 0);
    return 0;
}
