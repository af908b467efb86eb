// Clocks the design of loops.py with an array of random words and records its signatures.

#include <cstdint>
#include <memory>

#include "Vtop.h"
#include "verilated.h"

extern "C" void run_signatures(uint64_t cycles, const uint32_t* random, uint32_t* found) {
    VerilatedContext context;
    Vtop top{&context, "signatures"};
    for (uint64_t cycle = 0; cycle < cycles; ++cycle) {
        top.random = *random++;
        top.clk = 0;
        top.eval();
        top.clk = 1;
        top.eval();
        for (int i = 0; i < COMPONENTS; ++i) *found++ = top.marks[i];
    }
    top.final();
}
