/* libopapi: descriptors with a layout that device.py can read, and the two calls of every aclnn operator.

   `prepare` packs the arguments into an executor; `run` hands them to Python. The entries themselves are generated. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, BAD_PARAMETER = 161002 };

typedef struct { uint64_t ndim; int64_t dtype, offset, *shape, *stride; char *data; int64_t storage_size; } Tensor;
typedef struct { uint64_t size; int64_t *values; } IntArray;
typedef union { const void *p; int64_t i; double d; } Argument;
typedef struct { const char *name; Argument arguments[MAX_ARGUMENTS]; } Executor;
typedef int (*Callback)(const char *name, const Argument *arguments);

static Callback callback;
int emulated_set_callback(Callback f) { int first = callback == 0; callback = f; return first; }

static int64_t *copied(const int64_t *values, uint64_t n)
{
    int64_t *copy = malloc(8 * (n + 1));
    memcpy(copy, values, 8 * n);
    return copy;
}

void *aclCreateTensor(const int64_t *shape, uint64_t ndim, int dtype, const int64_t *stride, int64_t offset, int format,
                      const int64_t *storage_shape, uint64_t storage_ndim, void *data)
{
    Tensor *t = malloc(sizeof *t);
    *t = (Tensor){ndim, dtype, offset, copied(shape, ndim), copied(stride, ndim), data, 1};
    for (uint64_t i = 0; i < storage_ndim; i++) t->storage_size *= storage_shape[i];
    return t;
}
int aclDestroyTensor(Tensor *t)
{
    if (t) { free(t->shape); free(t->stride); free(t); }
    return OK;
}
void *aclCreateIntArray(const int64_t *values, uint64_t n)
{
    IntArray *a = malloc(sizeof *a);
    *a = (IntArray){n, copied(values, n)};
    return a;
}
int aclDestroyIntArray(IntArray *a)
{
    if (a) { free(a->values); free(a); }
    return OK;
}

static int prepare(const char *name, const Argument *arguments, int n, uint64_t *workspace_size, void **executor)
{
    Executor *e = malloc(sizeof *e);
    e->name = name;
    memcpy(e->arguments, arguments, n * sizeof *arguments);
    *workspace_size = 0;
    *executor = e;
    return OK;
}
static int run(Executor *e)
{
    int status = callback ? callback(e->name, e->arguments) : BAD_PARAMETER;
    free(e);
    return status;
}

