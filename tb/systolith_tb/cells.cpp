// Clocks the design of cells.py through arrays of inputs and records its outputs.

#include <cstdint>
#include <memory>

#include "Vtop.h"
#include "verilated.h"

extern "C" void run_cells(uint64_t cycles, const uint32_t* inputs, uint32_t* outputs) {
    VerilatedContext context;
    Vtop top{&context, "cells"};
    for (uint64_t cycle = 0; cycle < cycles; ++cycle) {
        top.en = inputs[0] & 1;
        top.active = inputs[0] >> 1 & 1;
        top.pair = inputs[0] >> 2 & 3;
        top.mode = inputs[0] >> 4 & 7;
        top.a = inputs[1];
        top.b = inputs[2];
        top.mac_a = inputs[3];
        top.mac_w = inputs[4];
        top.acc = inputs[5];
        top.pair_a = inputs[6];
        top.pair_w = inputs[7];
        top.clk = 0;
        top.eval();
        outputs[0] = top.total;
        outputs[1] = top.product;
        outputs[2] = top.mac_o;
        outputs[3] = top.pair_o;
        outputs[4] = top.word;
        outputs[5] = top.total_short;
        top.clk = 1;
        top.eval();
        inputs += 8;
        outputs += 6;
    }
    top.final();
}
