/* Counts the bytes of the heap, to be loaded before all else (LD_PRELOAD). For glibc. */

#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_memalign(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void __libc_free(void *);

static _Atomic long long live, peak;

static void *added(void *block)
{
    long long now, most = atomic_load(&peak);
    if (block) {
        long long size = (long long)malloc_usable_size(block);
        now = atomic_fetch_add(&live, size) + size;
        while (now > most && !atomic_compare_exchange_weak(&peak, &most, now))
            ;
    }
    return block;
}

static void removed(void *block)
{
    if (block)
        atomic_fetch_sub(&live, (long long)malloc_usable_size(block));
}

/* The bytes that are in use. */
long long heap_live(void) { return atomic_load(&live); }

/* The most that were in use since the last call, which is also asked for by the first one. */
long long heap_peak(void) { return atomic_exchange(&peak, atomic_load(&live)); }

void *malloc(size_t size) { return added(__libc_malloc(size)); }
void *calloc(size_t count, size_t size) { return added(__libc_calloc(count, size)); }
void *memalign(size_t step, size_t size) { return added(__libc_memalign(step, size)); }
void *aligned_alloc(size_t step, size_t size) { return memalign(step, size); }

int posix_memalign(void **block, size_t step, size_t size)
{
    *block = memalign(step, size);
    return *block ? 0 : ENOMEM;
}

void *realloc(void *block, size_t size)
{
    void *moved;
    long long before = block ? (long long)malloc_usable_size(block) : 0;
    atomic_fetch_sub(&live, before);
    moved = __libc_realloc(block, size);
    if (!moved && size) {
        atomic_fetch_add(&live, before);
        return moved;
    }
    return added(moved);
}

void free(void *block)
{
    removed(block);
    __libc_free(block);
}
