/* The part of CANN's runtime that torch_npu needs: devices whose memory is host memory and whose streams are never behind. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, FAILED = 107000, NO_MEMORY = 207001 };

/* What the host and the device say to each other: records.TRAFFIC has the same order. */
enum { HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, STREAM_SYNCS, DEVICE_SYNCS, EVENT_SYNCS, COUNTERS };
static uint64_t counters[COUNTERS];
uint64_t *emulated_counters(void) { return counters; }
static __thread int last; /* what this thread counted last */
static int count(int what) { __atomic_add_fetch(&counters[last = what], 1, __ATOMIC_RELAXED); return OK; }
static void forget_sync_of_free(void)
{
    /* Without a cache of memory torch_npu waits for the device before it frees: not a wait that the program asked for. */
    if (last == DEVICE_SYNCS) __atomic_sub_fetch(&counters[DEVICE_SYNCS], 1, __ATOMIC_RELAXED);
    last = COUNTERS;
}

static char message[4096];
void emulated_set_message(const char *text) { snprintf(message, sizeof message, "%s", text); }
const char *aclGetRecentErrMsg(void) { return message; }
long emulated_missing(const char *symbol)
{
    snprintf(message, sizeof message, "the emulated CANN has no %s: extend tests/emulated_cann/runtime.c", symbol);
    fprintf(stderr, "%s\n", message);
    return FAILED;
}

int aclInit(const char *config) { return OK; }
int aclFinalize(void) { return OK; }
void aclAppLog(int level, ...) {}
const char *aclrtGetSocName(void) { return "Ascend910B1"; }
/* Of the time of the sources that the kernels were read from; before 8.5.0 torch_npu never asks for deterministic kernels. */
int aclsysGetVersionStr(const char *package, char *version) { strcpy(version, "8.5.0"); return OK; }
int aclsysGetCANNVersion(int package, char *version) { strcpy(version, "8.5.0"); return OK; }
int aclGetDeviceCapability(unsigned device, int what, int64_t *value) { *value = 24; return OK; }

/* Options that hold for the whole process; ACL_OPT_DETERMINISTIC is number 0. */
enum { SYSTEM_OPTIONS = 8 };
static int64_t system_options[SYSTEM_OPTIONS];
int64_t emulated_deterministic(void) { return system_options[0]; }
int aclrtSetSysParamOpt(int option, int64_t value)
{
    if (option < 0 || option >= SYSTEM_OPTIONS) return FAILED;
    system_options[option] = value;
    return OK;
}
int aclrtGetSysParamOpt(int option, int64_t *value)
{
    if (option < 0 || option >= SYSTEM_OPTIONS) return FAILED;
    *value = system_options[option];
    return OK;
}
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return aclrtSetSysParamOpt(option, value); }
int aclSetCompileopt(int option, const char *value) { return OK; }
int aclrtSetDeviceSatMode(int mode) { return OK; }
int aclrtSetOpExecuteTimeOut(unsigned seconds) { return OK; }
int aclrtSetOpWaitTimeout(unsigned seconds) { return OK; }

static __thread int device;
static int context;
int aclrtGetDeviceCount(unsigned *n)
{
    const char *wanted = getenv("EMULATED_CANN_DEVICES");
    if (!wanted) wanted = getenv("LOCAL_WORLD_SIZE"); /* torchrun: every rank has a device of its own */
    *n = wanted ? (unsigned)atoi(wanted) : 1;
    return OK;
}
int aclrtSetDevice(int id) { device = id; return OK; }
int aclrtGetDevice(int *id) { *id = device; return OK; }
int aclrtResetDevice(int id) { return OK; }
int aclrtGetCurrentContext(void **c) { *c = &context; return OK; }
int aclrtSetCurrentContext(void *c) { return OK; }
int aclrtDeviceCanAccessPeer(int *can, int from, int to) { *can = 0; return OK; }
int aclrtSynchronizeDevice(void) { return count(DEVICE_SYNCS); }
int aclrtSynchronizeDeviceWithTimeout(int milliseconds) { return count(DEVICE_SYNCS); }

/* Memory: fresh bytes are 0xFF, which reads as NaN in every floating type. */
int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total) { *free_bytes = *total = (size_t)64 << 30; return OK; }
int aclrtMalloc(void **p, size_t n, int policy)
{
    size_t rounded = (n + 511) & ~(size_t)511;
    *p = aligned_alloc(512, rounded);
    if (!*p) return NO_MEMORY;
    memset(*p, 0xFF, rounded);
    return OK;
}
int aclrtMallocAlign32(void **p, size_t n, int policy) { return aclrtMalloc(p, n, policy); }
int aclrtMallocHost(void **p, size_t n) { return aclrtMalloc(p, n, 0); }
int aclrtFree(void *p) { forget_sync_of_free(); free(p); return OK; }
int aclrtFreeHost(void *p) { free(p); return OK; }

enum { HOST_TO_HOST_KIND, HOST_TO_DEVICE_KIND, DEVICE_TO_HOST_KIND, DEVICE_TO_DEVICE_KIND };
int aclrtMemcpy(void *to, size_t room, const void *from, size_t n, int kind)
{
    if (n > room) return FAILED;
    if (kind == HOST_TO_DEVICE_KIND) count(HOST_TO_DEVICE);
    if (kind == DEVICE_TO_HOST_KIND) count(DEVICE_TO_HOST);
    if (kind == DEVICE_TO_DEVICE_KIND) count(DEVICE_TO_DEVICE);
    memcpy(to, from, n);
    return OK;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t n, int kind, void *stream)
{
    return aclrtMemcpy(to, room, from, n, kind);
}
int aclrtMemset(void *p, size_t room, int value, size_t n) { memset(p, value, n); return OK; }
int aclrtMemsetAsync(void *p, size_t room, int value, size_t n, void *stream) { memset(p, value, n); return OK; }

/* Streams and events: everything has run before the call that launches it returns. */
static intptr_t handles = 1;
static int new_handle(void **h) { *h = (void *)__atomic_add_fetch(&handles, 1, __ATOMIC_RELAXED); return OK; }
int aclrtCreateStream(void **s) { return new_handle(s); }
int aclrtCreateStreamWithConfig(void **s, unsigned priority, unsigned flags) { return new_handle(s); }
int aclrtDestroyStream(void *s) { return OK; }
int aclrtDestroyStreamForce(void *s) { return OK; }
int aclrtSetStreamFailureMode(void *s, uint64_t mode) { return OK; }
int aclrtSynchronizeStream(void *s) { return count(STREAM_SYNCS); }
int aclrtSynchronizeStreamWithTimeout(void *s, int milliseconds) { return count(STREAM_SYNCS); }
int aclrtStreamQuery(void *s, int *status) { *status = 1; return OK; }
int aclrtStreamWaitEvent(void *s, void *e) { return OK; }
int aclrtCreateEventWithFlag(void **e, unsigned flags) { return new_handle(e); }
int aclrtCreateEventExWithFlag(void **e, unsigned flags) { return new_handle(e); }
int aclrtDestroyEvent(void *e) { return OK; }
int aclrtRecordEvent(void *e, void *s) { return OK; }
int aclrtSynchronizeEvent(void *e) { return count(EVENT_SYNCS); }
int aclrtQueryEventStatus(void *e, int *status) { *status = 1; return OK; }
int aclrtQueryEventWaitStatus(void *e, int *status) { *status = 1; return OK; }
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = 0; return OK; }
int aclrtSubscribeReport(uint64_t thread, void *s) { return OK; }
int aclrtUnSubscribeReport(uint64_t thread, void *s) { return OK; }
int aclrtProcessReport(int milliseconds) { return OK; }

/* Called by torch_npu without a look at the answer, or for nothing that is emulated. */
void *aclCreateTensorDesc(int type, int n, const int64_t *dims, int format) { return 0; }
void *aclCreateDataBuffer(void *p, size_t n) { return 0; }
void *aclopCreateAttr(void) { return 0; }
void aclDestroyTensorDesc(const void *d) {}
int aclDestroyDataBuffer(const void *b) { return OK; }
void aclopDestroyAttr(const void *a) {}
int HcclSetConfig(int option, ...) { return OK; }
int aclmdlFinalizeDump(void) { return OK; }
int rtFunctionRegister(void) { return OK; }
int MsprofRegisterCallback(unsigned module, void *f) { return OK; }
int MsprofReportApi(unsigned aging, const void *api) { return OK; }
int MsprofReportCompactInfo(unsigned aging, const void *data, unsigned n) { return OK; }
int MsprofReportAdditionalInfo(unsigned aging, const void *data, unsigned n) { return OK; }
uint64_t MsprofGetHashId(const char *text, size_t n) { return 0; }
uint64_t MsprofSysCycleTime(void) { return 0; }
