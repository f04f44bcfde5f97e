/* Follows a plan whose parts are functions of addresses, without Python between two of them.

   A thread for each unit calls `crew_work`; who waits for a request may do the work of one unit
   meanwhile. How far a unit is in a request is known to who serves it alone; that a step is done is
   told to the others by the number of the request, which nothing has to reset. Who waits for a step
   spins for a short time and then sleeps. crew.py has the same structures and makes their memory;
   numbers of requests begin at 1 and may wrap. Where parts are on several devices, requests take
   different routes in turn; a step is the same part on each of them. */

#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A wait up to so long does not cost a wake-up, which takes tens of microseconds. Between two
   requests lies what Python does, for both. */
#define SPIN_NANOSECONDS 200000
#define IDLE_NANOSECONDS 1000000
#define CORE_WORDS 16

/* A value as TVM's functions take and give it, and the numbers of two kinds: an integer, and an
   address of whatever. */
struct value {
    int32_t kind, unused;
    int64_t content;
};
enum { INTEGER = 1, ADDRESS = 4 };

/* What a plan does at one point, for every request. */
struct step {
    /* It takes the address of a table and gives 0; else it has failed. */
    int (*function)(void *, const struct value *arguments, int32_t count, struct value *result);
    /* The steps of other units that it waits for, and the units that wait for it. */
    const int32_t *sources, *readers;
    int32_t source_count, reader_count;
};

/* A step in one request: a cache line, as another unit reads `done` of the next one meanwhile. */
struct state {
    int64_t table, start, finish, handed;
    /* The number of the request in which it has run. */
    _Atomic uint32_t done;
    char unused[28];
};

/* The memory of one request, and the route that it takes. */
struct slot {
    struct state *states;
    int32_t route;
    /* The units that have not run all of their steps. */
    _Atomic int32_t working;
    /* The step that failed, counted from 1, and what its function gave. */
    _Atomic int32_t failed;
    int32_t status;
    /* The unit that is served by who waits for the request, or -1. */
    int32_t host;
    /* The number of the last request that has ended; who sleeps until then says so. */
    _Atomic uint32_t ended, waiters;
};

/* The steps of one unit on one route. */
struct share {
    const int32_t *steps;
    int64_t count;
};

/* How far a unit is in a request; at LEFT it has no more to do there. */
struct progress {
    uint32_t number;
    int32_t position;
};
enum { LEFT = -1 };

struct unit {
    /* Others write to this cache line. The signal changes when a step may have become ready, the
       calls when the unit's own thread has to come. */
    _Atomic uint32_t signal, sleeping, calls, idle;
    char unused[48];
    /* Whether anybody serves the unit: one at a time. */
    _Atomic uint32_t taken;
    /* The oldest request of which it has steps to run. */
    uint32_t oldest;
    /* By route. */
    const struct share *shares;
    struct progress *progress;
    char line[40];
};

struct crew {
    /* Those of each route, behind each other. */
    const struct step *steps;
    struct unit *units;
    /* By the number of the request, modulo `most`. */
    struct slot **slots;
    /* Called with request and step on the thread where a step has failed. */
    void (*tell)(uint32_t number, int32_t index);
    int32_t step_count, unit_count, most;
    _Atomic uint32_t submitted, stopping;
};

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void sleep_while(_Atomic uint32_t *word, uint32_t value, int64_t nanoseconds)
{
    struct timespec most = {nanoseconds / 1000000000, nanoseconds % 1000000000};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nanoseconds < 0 ? NULL : &most);
}

static void wake(struct unit *unit)
{
    atomic_fetch_add(&unit->signal, 1);
    if (atomic_load(&unit->sleeping))
        syscall(SYS_futex, &unit->signal, FUTEX_WAKE_PRIVATE, 1);
}

/* Tells whoever serves the unit, and has its own thread come if nobody does. */
static void summon(struct unit *unit)
{
    wake(unit);
    atomic_fetch_add(&unit->calls, 1);
    if (atomic_load(&unit->idle))
        syscall(SYS_futex, &unit->calls, FUTEX_WAKE_PRIVATE, 1);
}

/* Whether `word` is soon no longer `seen`. To spin for longer, or to sleep first for as long as the
   last wait took, was measured to be no better, and sleeping first to be worse. */
static int changes(_Atomic uint32_t *word, uint32_t seen, int64_t nanoseconds)
{
    for (int64_t end = now() + nanoseconds; now() < end;)
        for (int turn = 0; turn < 16; turn++) {
            if (atomic_load_explicit(word, memory_order_acquire) != seen)
                return 1;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
        }
    return 0;
}

/* Until `signal` is no longer `seen`; spins, then sleeps. */
static void wait(struct unit *unit, uint32_t seen)
{
    if (changes(&unit->signal, seen, SPIN_NANOSECONDS))
        return;
    atomic_store(&unit->sleeping, 1);
    while (atomic_load(&unit->signal) == seen)
        sleep_while(&unit->signal, seen, -1);
    atomic_store(&unit->sleeping, 0);
}

static int call(const struct step *step, int64_t table)
{
    struct value argument = {ADDRESS, 0, table}, result = {0, 0, 0};
    int status = step->function(NULL, &argument, 1, &result);
    return status == 0 && result.kind == INTEGER ? (int)result.content : status;
}

static const struct step *step_of(const struct crew *crew, const struct slot *slot, int32_t index)
{
    return &crew->steps[slot->route * crew->step_count + index];
}

static int ready(const struct step *step, const struct slot *slot, uint32_t number)
{
    for (int32_t i = 0; i < step->source_count; i++)
        if (atomic_load(&slot->states[step->sources[i]].done) != number)
            return 0;
    return 1;
}

/* The unit has no more to do in the request. */
static void pass(struct crew *crew, struct unit *unit, uint32_t number)
{
    unit->progress[number % crew->most].position = LEFT;
    while (unit->oldest != atomic_load(&crew->submitted) + 1) {
        struct progress *progress = &unit->progress[unit->oldest % crew->most];
        if (progress->number != unit->oldest || progress->position != LEFT)
            break;
        unit->oldest++;
    }
}

/* The same for a request whose memory may have another use from now on. */
static void leave(struct crew *crew, struct unit *unit, struct slot *slot, uint32_t number)
{
    pass(crew, unit, number);
    if (atomic_fetch_sub(&slot->working, 1) == 1) {
        int32_t host = slot->host;
        atomic_store(&slot->ended, number);
        if (host >= 0)
            wake(&crew->units[host]);
        if (atomic_load(&slot->waiters))
            syscall(SYS_futex, &slot->ended, FUTEX_WAKE_PRIVATE, INT_MAX);
    }
}

static void run(struct crew *crew, struct unit *unit, struct slot *slot, uint32_t number)
{
    struct progress *progress = &unit->progress[number % crew->most];
    const struct share *share = &unit->shares[slot->route];
    int32_t index = share->steps[progress->position], none = 0, status;
    const struct step *step = step_of(crew, slot, index);
    struct state *state = &slot->states[index];
    state->start = now();
    status = call(step, state->table);
    state->finish = now();
    if (status) {
        crew->tell(number, index);
        if (atomic_compare_exchange_strong(&slot->failed, &none, index + 1))
            slot->status = status;
        for (int32_t other = 0; other < crew->unit_count; other++)
            wake(&crew->units[other]);
    } else {
        atomic_store(&state->done, number);
        for (int32_t i = 0; i < step->reader_count; i++)
            wake(&crew->units[step->readers[i]]);
    }
    state->handed = now();
    if (++progress->position == share->count || status)
        leave(crew, unit, slot, number);
}

/* Runs the first step that can run, of the oldest request that has one, or gives 0. */
static int advance(struct crew *crew, struct unit *unit)
{
    uint32_t end = atomic_load(&crew->submitted) + 1;
    for (uint32_t number = unit->oldest; number != end; number++) {
        struct progress *progress = &unit->progress[number % crew->most];
        struct slot *slot = crew->slots[number % crew->most];
        int32_t index;
        if (progress->number != number) {
            progress->number = number;
            progress->position = 0;
            if (!unit->shares[slot->route].count) {
                pass(crew, unit, number);
                return 1;
            }
        }
        if (progress->position == LEFT)
            continue;
        if (atomic_load(&slot->failed)) {
            leave(crew, unit, slot, number);
            return 1;
        }
        index = unit->shares[slot->route].steps[progress->position];
        if (ready(step_of(crew, slot, index), slot, number)) {
            run(crew, unit, slot, number);
            return 1;
        }
    }
    return 0;
}

static int has_ended(struct slot *slot, uint32_t number)
{
    return (int32_t)(atomic_load(&slot->ended) - number) >= 0;
}

static int has_work(struct crew *crew, struct unit *unit)
{
    return unit->oldest != atomic_load(&crew->submitted) + 1;
}

/* Runs the steps of a unit as long as there are any or, if given, until the request has ended. */
static void serve(struct crew *crew, struct unit *unit, struct slot *slot, uint32_t number)
{
    for (;;) {
        uint32_t seen = atomic_load(&unit->signal);
        if (slot ? has_ended(slot, number) : !has_work(crew, unit))
            return;
        if (!advance(crew, unit))
            wait(unit, seen);
    }
}

static int take(struct unit *unit)
{
    uint32_t none = 0;
    return atomic_compare_exchange_strong(&unit->taken, &none, 1);
}

/* Runs the steps of a unit until the crew stops and nothing is left to do. */
void crew_work(struct crew *crew, int32_t index)
{
    struct unit *unit = &crew->units[index];
    for (;;) {
        uint32_t calls = atomic_load(&unit->calls);
        int served = take(unit);
        if (served) {
            int stopping = atomic_load(&crew->stopping);
            serve(crew, unit, NULL, 0);
            atomic_store(&unit->taken, 0);
            if (stopping)
                return;
        }
        /* The next request is often there before a core that sleeps would be awake. */
        if (served && changes(&unit->calls, calls, IDLE_NANOSECONDS))
            continue;
        atomic_store(&unit->idle, 1);
        while (atomic_load(&unit->calls) == calls)
            sleep_while(&unit->calls, calls, -1);
        atomic_store(&unit->idle, 0);
    }
}

/* Begins a request in `slot`, of which nothing is in flight; its number. One thread at a time.

   Unless `host` is -1, the caller goes on with `crew_serve` for that unit. Units that are not on
   the route hear of the request with the next one of theirs: until then its memory has to stay, and
   no more than `most` may have begun. */
uint32_t crew_submit(struct crew *crew, struct slot *slot, int32_t host)
{
    uint32_t number = atomic_load(&crew->submitted) + 1;
    int32_t working = 0;
    for (int32_t index = 0; index < crew->unit_count; index++)
        working += crew->units[index].shares[slot->route].count > 0;
    atomic_store(&slot->working, working);
    atomic_store(&slot->failed, 0);
    slot->host = host;
    crew->slots[number % crew->most] = slot;
    atomic_store(&crew->submitted, number);
    for (int32_t index = 0; index < crew->unit_count; index++)
        if (index == host)
            wake(&crew->units[index]);
        else if (crew->units[index].shares[slot->route].count)
            summon(&crew->units[index]);
    return number;
}

/* Does the work of a unit, held on its cores, until the request has ended, unless another does it;
   then see `crew_wait`. Gives whether it has ended. A core is a bit of `cores`, which has no bit
   where any core will do. */
int crew_serve(struct crew *crew, int32_t index, struct slot *slot, uint32_t number,
               const uint64_t cores[CORE_WORDS])
{
    struct unit *unit = &crew->units[index];
    uint64_t before[CORE_WORDS] = {0};
    int any = 0, held = 0, ended;
    syscall(SYS_sched_getaffinity, 0, sizeof before, before);
    for (int word = 0; word < CORE_WORDS; word++) {
        any |= cores[word] != 0;
        held |= (before[word] & ~cores[word]) != 0;
    }
    held = any && held && !syscall(SYS_sched_setaffinity, 0, sizeof before, cores);
    if (take(unit)) {
        serve(crew, unit, slot, number);
        atomic_store(&unit->taken, 0);
    }
    if (held)
        syscall(SYS_sched_setaffinity, 0, sizeof before, before);
    /* Other requests may have come meanwhile, or the end. */
    ended = has_ended(slot, number);
    if (!ended || atomic_load(&crew->submitted) != number || atomic_load(&crew->stopping))
        summon(unit);
    return ended;
}

/* Whether the request has ended within `nanoseconds`. */
int crew_wait(struct slot *slot, uint32_t number, int64_t nanoseconds)
{
    int64_t end = now() + nanoseconds;
    atomic_fetch_add(&slot->waiters, 1);
    for (;;) {
        uint32_t ended = atomic_load(&slot->ended);
        int64_t left = end - now();
        if (has_ended(slot, number) || left <= 0)
            break;
        sleep_while(&slot->ended, ended, left);
    }
    atomic_fetch_sub(&slot->waiters, 1);
    return has_ended(slot, number);
}

/* The workers return when nothing is left to do. */
void crew_stop(struct crew *crew)
{
    atomic_store(&crew->stopping, 1);
    for (int32_t index = 0; index < crew->unit_count; index++)
        summon(&crew->units[index]);
}

/* Words of 8 bytes in a row of what is copied, and how many of them are copied at once. */
#define ROW_WORDS 624
#define STRIP_WORDS 16

/* A part that does nothing but read one tensor and write another, of equal length: to measure by.
   It takes strips of all rows, one after the other, as convolutions do: what caches fetch ahead is
   then of less use than in one go. The table has the number of their 8-byte words and both
   addresses. */
int crew_copy(void *self, const struct value *arguments, int32_t count, struct value *result)
{
    const int64_t *table = (const int64_t *)arguments[0].content;
    const int64_t *source = (const int64_t *)table[1];
    int64_t *sink = (int64_t *)table[2];
    (void)self, (void)count;
    for (int64_t strip = 0; strip < ROW_WORDS; strip += STRIP_WORDS)
        for (int64_t begin = strip; begin < table[0]; begin += ROW_WORDS) {
            int64_t end = begin + STRIP_WORDS < table[0] ? begin + STRIP_WORDS : table[0];
            for (int64_t word = begin; word < end; word++)
                sink[word] = source[word] + 1;
        }
    result->kind = INTEGER;
    result->content = 0;
    return 0;
}

/* A part that OpenCL computes: the calls of its library, by address, and what they are given. A
   tensor that lies in memory which OpenCL has allocated is given by its address; another lends its
   memory to a buffer for as long as the part runs. */
struct launch {
    void *kernel;
    int64_t axes;
    size_t global[3], local[3];
};

struct argument {
    void *kernel;
    int32_t number, tensor;
    int64_t start;
};

struct tensor {
    size_t nbytes;
    int64_t written;
};

struct program {
    int32_t (*set_memory)(void *kernel, uint32_t number, size_t size, const void *value);
    int32_t (*set_address)(void *kernel, uint32_t number, const void *address);
    int32_t (*enqueue)(void *queue, void *kernel, uint32_t axes, const size_t *offset,
                       const size_t *global, const size_t *local, uint32_t waits,
                       const void *events, void *event);
    void *(*lend)(void *context, uint64_t flags, size_t size, void *memory, int32_t *status);
    int32_t (*release)(void *buffer);
    void *(*map)(void *queue, void *buffer, uint32_t blocking, uint64_t flags, size_t offset,
                 size_t size, uint32_t waits, const void *events, void *event, int32_t *status);
    int32_t (*unmap)(void *queue, void *buffer, void *mapped, uint32_t waits, const void *events,
                     void *event);
    int32_t (*finish)(void *queue);
    /* Where only one thread at a time may enqueue, a lock that Python takes as well, else NULL. */
    int (*take)(void *turn), (*leave)(void *turn);
    void *turn;
    void *context, *queue;
    const struct launch *launches;
    const struct argument *arguments;
    const struct tensor *tensors;
    int32_t launch_count, argument_count, tensor_count, unused;
};

/* OpenCL's numbers: of a buffer that kernels write to, and read from, in memory that it is lent;
   of mapping to read. */
enum { WRITTEN = 1 | 8, READ = 4 | 8, TO_READ = 1 };

/* What a call needs for each tensor: its address, the buffer that it is lent to, if any, and where
   that is mapped. */
struct lent {
    char *address;
    void *buffer, *mapped;
};

/* The table: the program, begin and end of what OpenCL has allocated for the request, then for each
   tensor what a call needs. Gives the status of OpenCL, or 0. */
int crew_opencl(void *self, const struct value *arguments, int32_t count, struct value *result)
{
    const int64_t *table = (const int64_t *)arguments[0].content;
    const struct program *program = (const struct program *)table[0];
    const char *begin = (const char *)table[1], *end = (const char *)table[2];
    struct lent *tensors = (struct lent *)(table + 3);
    int32_t status = 0, last;
    (void)self, (void)count;
    for (int32_t i = 0; i < program->tensor_count; i++)
        tensors[i].buffer = tensors[i].mapped = NULL;
    for (int32_t i = 0; i < program->tensor_count && !status; i++)
        if (tensors[i].address < begin || tensors[i].address >= end)
            tensors[i].buffer =
                program->lend(program->context, program->tensors[i].written ? WRITTEN : READ,
                              program->tensors[i].nbytes, tensors[i].address, &status);
    for (int32_t i = 0; i < program->argument_count && !status; i++) {
        const struct argument *argument = &program->arguments[i];
        struct lent *tensor = &tensors[argument->tensor];
        if (tensor->buffer)
            status = program->set_memory(argument->kernel, argument->number, sizeof tensor->buffer,
                                         &tensor->buffer);
        else
            status = program->set_address(argument->kernel, argument->number,
                                          tensor->address + argument->start);
    }
    if (program->turn)
        program->take(program->turn);
    for (int32_t i = 0; i < program->launch_count && !status; i++) {
        const struct launch *launch = &program->launches[i];
        status = program->enqueue(program->queue, launch->kernel, launch->axes, NULL,
                                  launch->global, launch->local, 0, NULL, NULL);
    }
    for (int32_t i = 0; i < program->tensor_count && !status; i++)
        if (tensors[i].buffer && program->tensors[i].written)
            tensors[i].mapped =
                program->map(program->queue, tensors[i].buffer, 0, TO_READ, 0,
                             program->tensors[i].nbytes, 0, NULL, NULL, &status);
    /* Also after an error: what has been enqueued uses the memory. */
    last = program->finish(program->queue);
    status = status ? status : last;
    for (int32_t i = 0; i < program->tensor_count; i++) {
        if (tensors[i].mapped) {
            last = program->unmap(program->queue, tensors[i].buffer, tensors[i].mapped, 0, NULL,
                                  NULL);
            status = status ? status : last;
        }
        if (tensors[i].buffer)
            program->release(tensors[i].buffer);
    }
    if (program->turn)
        program->leave(program->turn);
    result->kind = INTEGER;
    result->content = status;
    return 0;
}
