// Runs the Verilated board: clock, and a serial line, bit by bit.

#include <cstdint>
#include <deque>
#include <memory>

#include "Vtop.h"
#include "verilated.h"

namespace {

struct Sim {
    std::unique_ptr<VerilatedContext> context{new VerilatedContext};
    std::unique_ptr<Vtop> top;
    uint32_t divisor = 0;  // cycles per bit
    uint64_t cycle = 0;
    // To the board: bits to come, the lowest first, and cycles left of the one on the line.
    std::deque<uint8_t> to_send;
    uint32_t bits = 0, bits_left = 0, bit_time = 0;
    // From the board: bits got of the byte on the line, and cycles to the next sample.
    std::deque<uint8_t> received;
    uint32_t got = 0, samples_left = 0, sample_time = 0;
    uint64_t framing_errors = 0;
};

void drive(Sim& s) {
    if (s.bit_time != 0) {
        --s.bit_time;
        return;
    }
    if (s.bits_left == 0 && !s.to_send.empty()) {
        s.bits = (0x100u | s.to_send.front()) << 1;
        s.to_send.pop_front();
        s.bits_left = 10;
    }
    if (s.bits_left == 0) {
        s.top->rx = 1;
        return;
    }
    s.top->rx = s.bits & 1;
    s.bits >>= 1;
    --s.bits_left;
    s.bit_time = s.divisor - 1;
}

void sample(Sim& s) {
    bool line = s.top->tx;
    if (s.samples_left == 0) {
        if (!line) {
            s.samples_left = 9;
            s.sample_time = s.divisor + s.divisor / 2;
            s.got = 0;
        }
        return;
    }
    if (--s.sample_time != 0) return;
    s.sample_time = s.divisor;
    if (--s.samples_left != 0) {
        s.got = s.got >> 1 | (line ? 0x80u : 0u);
    } else if (line) {
        s.received.push_back(static_cast<uint8_t>(s.got));
    } else {
        ++s.framing_errors;
    }
}

void step(Sim& s) {
    drive(s);
    s.top->clk = 0;
    s.top->eval();
    sample(s);
    s.top->clk = 1;
    s.top->eval();
    ++s.cycle;
}

}  // namespace

extern "C" {

Sim* board_create(uint32_t divisor) {
    auto* s = new Sim;
    s->top.reset(new Vtop{s->context.get(), "board"});
    s->divisor = divisor;
    s->top->rx = 1;
    s->top->rst = 1;
    for (int i = 0; i < 4; ++i) step(*s);
    s->top->rst = 0;
    step(*s);
    s->received.clear();
    s->samples_left = 0;
    return s;
}

void board_destroy(Sim* s) {
    s->top->final();
    delete s;
}

uint64_t board_cycles(const Sim* s) { return s->cycle; }
uint64_t board_framing_errors(const Sim* s) { return s->framing_errors; }
int board_interrupt(const Sim* s) { return s->top->irq; }

// Puts bytes on the line, behind those that are not sent yet.
void board_send(Sim* s, const uint8_t* data, uint64_t count) {
    s->to_send.insert(s->to_send.end(), data, data + count);
}

// Runs until `count` bytes have come, or none for `patience` cycles after the last one was sent;
// returns how many there are, at most `count`, in `data`.
uint64_t board_receive(Sim* s, uint8_t* data, uint64_t count, uint64_t patience) {
    uint64_t quiet = 0;
    size_t had = s->received.size();
    while (s->received.size() < count && quiet < patience) {
        step(*s);
        bool busy = !s->to_send.empty() || s->bits_left != 0 || s->received.size() != had;
        quiet = busy ? 0 : quiet + 1;
        had = s->received.size();
    }
    uint64_t n = 0;
    for (; n < count && !s->received.empty(); ++n) {
        data[n] = s->received.front();
        s->received.pop_front();
    }
    return n;
}
}
