/* Counts the bytes of the heap, to be loaded before all else (LD_PRELOAD). For glibc. */

#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_memalign(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void __libc_free(void *);

/* Where the code of the libraries is whose blocks count by themselves: their owners. */
#define MOST_OWNERS 64
static struct {
    size_t start, end;
} owners[MOST_OWNERS];
static _Atomic int owner_count;

/* The blocks of the owners, by their address: a table that is never full enough to be slow. */
#define PLACES (1u << 20)
static void *blocks[PLACES];
static atomic_flag busy = ATOMIC_FLAG_INIT;

static _Atomic long long live, peak, owned, owned_peak;

static void count(_Atomic long long *now, _Atomic long long *most, long long size)
{
    long long sum = atomic_fetch_add(now, size) + size, before = atomic_load(most);
    while (sum > before && !atomic_compare_exchange_weak(most, &before, sum))
        ;
}

static size_t place_of(void *block) { return ((size_t)block >> 4) * 2654435761u % PLACES; }

static void enter(void)
{
    while (atomic_flag_test_and_set(&busy))
        ;
}

static void leave(void) { atomic_flag_clear(&busy); }

static void keep(void *block)
{
    size_t place = place_of(block);
    enter();
    while (blocks[place])
        place = (place + 1) % PLACES;
    blocks[place] = block;
    leave();
}

/* Whether the block was an owner's, which is forgotten. */
static int forget(void *block)
{
    size_t place = place_of(block), gap;
    int found;
    enter();
    while (blocks[place] && blocks[place] != block)
        place = (place + 1) % PLACES;
    found = blocks[place] != NULL;
    if (found) {
        /* What follows moves up, unless it would come before its own place. */
        blocks[gap = place] = NULL;
        for (;;) {
            size_t wanted;
            place = (place + 1) % PLACES;
            if (!blocks[place])
                break;
            wanted = place_of(blocks[place]);
            if ((place - wanted) % PLACES >= (place - gap) % PLACES) {
                blocks[gap] = blocks[place];
                blocks[gap = place] = NULL;
            }
        }
    }
    leave();
    return found;
}

static void *added(void *block, void *caller)
{
    if (block) {
        long long size = (long long)malloc_usable_size(block);
        int index, last = atomic_load(&owner_count);
        count(&live, &peak, size);
        for (index = 0; index < last; index++)
            if ((size_t)caller >= owners[index].start && (size_t)caller < owners[index].end) {
                keep(block);
                count(&owned, &owned_peak, size);
                break;
            }
    }
    return block;
}

/* Whether the block was an owner's. */
static int removed(void *block)
{
    long long size;
    int own;
    if (!block)
        return 0;
    size = (long long)malloc_usable_size(block);
    own = atomic_load(&owner_count) && forget(block);
    atomic_fetch_sub(&live, size);
    if (own)
        atomic_fetch_sub(&owned, size);
    return own;
}

/* From now on, what the code between two addresses asks for counts by itself too. */
void heap_owner(size_t start, size_t end)
{
    int index = atomic_load(&owner_count);
    if (index < MOST_OWNERS) {
        owners[index].start = start;
        owners[index].end = end;
        atomic_store(&owner_count, index + 1);
    }
}

/* The bytes that are in use: all, and those of the owners. */
long long heap_live(void) { return atomic_load(&live); }
long long heap_owned(void) { return atomic_load(&owned); }

/* The most that were in use since the last call, which is also asked for by the first one. */
long long heap_peak(void) { return atomic_exchange(&peak, atomic_load(&live)); }
long long heap_owned_peak(void) { return atomic_exchange(&owned_peak, atomic_load(&owned)); }

#define CALLER __builtin_return_address(0)

void *malloc(size_t size) { return added(__libc_malloc(size), CALLER); }
void *calloc(size_t count, size_t size) { return added(__libc_calloc(count, size), CALLER); }
void *memalign(size_t step, size_t size) { return added(__libc_memalign(step, size), CALLER); }
void *aligned_alloc(size_t step, size_t size) { return added(__libc_memalign(step, size), CALLER); }

int posix_memalign(void **block, size_t step, size_t size)
{
    *block = added(__libc_memalign(step, size), CALLER);
    return *block ? 0 : ENOMEM;
}

void *realloc(void *block, size_t size)
{
    /* Forgotten first: another thread may get the address as soon as it is free. */
    int own = removed(block);
    void *moved = __libc_realloc(block, size);
    if (!moved && size && block) {
        /* It stays as it was. */
        count(&live, &peak, (long long)malloc_usable_size(block));
        if (own) {
            keep(block);
            count(&owned, &owned_peak, (long long)malloc_usable_size(block));
        }
        return NULL;
    }
    return added(moved, CALLER);
}

void free(void *block)
{
    removed(block);
    __libc_free(block);
}
