// The core's simulator behind a C interface, with a memory at its ports: the same for Verilator
// (the default) and CXXRTL (-DCXXRTL).

#include <cstdint>
#include <cstring>
#include <vector>

#ifdef CXXRTL
#include "top.cc"
#else
#include "Vtop.h"
#include "Vtop___024root.h"
#include "verilated.h"
#endif

namespace {

#ifdef CXXRTL
template <size_t bits>
uint64_t number(const cxxrtl::value<bits> &port) {
    uint64_t low = port.data[0];
    if constexpr (bits > 32) low |= (uint64_t)port.data[1] << 32;
    return low;
}
template <size_t bits>
uint64_t number(const cxxrtl::wire<bits> &port) {
    return number(port.curr);
}
template <size_t bits>
void assign(cxxrtl::value<bits> &port, uint64_t value) {
    port.data[0] = (uint32_t)value;
    if constexpr (bits > 32) port.data[1] = (uint32_t)(value >> 32);
}
// CXXRTL writes an underscore of a name as two.
#define GET(unit, name) number(top.p_##unit##__##name)
#define SET(unit, name, value) assign(top.p_##unit##__##name, value)
#define GET1(name) number(top.p_##name)
#define SET1(name, value) assign(top.p_##name, value)
#else
#define GET(unit, name) ((uint64_t)top.unit##_##name)
#define SET(unit, name, value) (top.unit##_##name = (value))
#define GET1(name) ((uint64_t)top.name)
#define SET1(name, value) (top.name = (value))
#endif

constexpr int COUNTERS = 6;

struct Simulator {
#ifdef CXXRTL
    cxxrtl_design::p_top top;
#else
    VerilatedContext context;
    Vtop top{&context};
#endif

    void edge() {
#ifdef CXXRTL
        // The falling edge lets what follows from the registers settle.
        top.p_clk.set(1u);
        top.step();
        top.p_clk.set(0u);
        top.step();
#else
        // Nothing happens at the falling edge: it is only noted.
        top.rootp->__Vtrigprevexpr___TOP__clk__0 = 0;
        top.clk = 1;
        top.eval();
#endif
    }

    Simulator() {
        SET(i, valid, 0);
        SET(r, ready, 0);
        SET(d, valid, 0);
        SET(w, ready, 0);
        for (int cycle = 0; cycle < 4; cycle++) edge();
    }

    void count(uint32_t *counters) {
        counters[0] = GET1(cycles);
        counters[1] = GET1(macs);
        counters[2] = GET(stall, load);
        counters[3] = GET(stall, store);
        counters[4] = GET(load, cycles);
        counters[5] = GET(store, cycles);
    }
};

struct Read {
    uint64_t due;
    uint64_t data;
};

}  // namespace

// What a launch did, in the order of `Launch` in engine.py.
struct Report {
    uint64_t cycles, macs, stall_load, stall_store, load_cycles, store_cycles;
    uint64_t simulated, reads, writes, place;
};

enum Outcome { DONE, STUCK, OUTSIDE };

extern "C" {

void *overlay_new() { return new Simulator; }

void overlay_free(void *simulator) { delete (Simulator *)simulator; }

// Runs `count` beats of instructions to their end. Memory gives what is read `latency` cycles
// later, and takes `beats` beats, reads and writes together, in `period` cycles. Gives up where
// nothing moves for `patience` cycles, or an address is outside of memory.
int overlay_run(void *simulator, const uint64_t *instructions, uint64_t count, uint8_t *memory,
                uint64_t nbytes, uint32_t latency, uint32_t beats, uint32_t period,
                uint64_t patience, Report *report) {
    Simulator &self = *(Simulator *)simulator;
    auto &top = self.top;
    uint32_t before[COUNTERS], after[COUNTERS];
    self.count(before);
    uint64_t now = 0, next = 0, moved = 0, reads = 0, writes = 0, credit = 0, arrived = 0;
    uint64_t capacity = 1;
    while (capacity < latency + 2) capacity *= 2;
    std::vector<Read> under_way(capacity);
    bool write_next = false;
    uint32_t seen = before[1];
    Outcome outcome = DONE;
    for (;; now++) {
        bool offers = next < count, gives = offers && GET(i, ready);
        SET(i, valid, offers);
        if (offers) SET(i, data, instructions[next]);
        credit += beats;
        bool reading = GET(r, valid), writing = GET(w, valid);
        // One beat in a cycle at most; who was not served is first.
        bool ready = credit >= period;
        bool read = ready && reading && !(writing && write_next);
        bool write = ready && writing && !read;
        if (reading && writing && ready) write_next = read;
        if (read || write)
            credit -= period;
        else if (credit > period)
            credit = period;
        SET(r, ready, read);
        SET(w, ready, write);
        if (read || write) {
            uint64_t address = read ? GET(r, address) : GET(w, address);
            if (address + 8 > nbytes) {
                report->place = address;
                outcome = OUTSIDE;
                break;
            }
            if (read) {
                Read &slot = under_way[reads++ & (capacity - 1)];
                slot.due = now + latency;
                memcpy(&slot.data, memory + address, 8);
            } else {
                uint64_t data = GET(w, data);
                memcpy(memory + address, &data, 8);
                writes++;
            }
        }
        const Read &oldest = under_way[arrived & (capacity - 1)];
        bool arrives = arrived < reads && oldest.due <= now;
        SET(d, valid, arrives);
        if (arrives) {
            SET(d, data, oldest.data);
            arrived++;
        }
        self.edge();
        if (gives) next++;
        uint32_t macs = (uint32_t)GET1(macs);
        if (gives || read || write || arrives || macs != seen) {
            moved = now;
            seen = macs;
        }
        // `busy` tells of a beat two cycles after it was taken.
        if (next == count && !GET1(busy) && now > moved + 2) break;
        if (now > moved + patience) {
            outcome = STUCK;
            break;
        }
    }
    self.count(after);
    uint64_t *counters = &report->cycles;
    for (int i = 0; i < COUNTERS; i++) counters[i] = after[i] - before[i];
    report->simulated = now + 1;
    report->reads = reads;
    report->writes = writes;
    SET(i, valid, 0);
    SET(r, ready, 0);
    SET(w, ready, 0);
    SET(d, valid, 0);
    return outcome;
}
}
