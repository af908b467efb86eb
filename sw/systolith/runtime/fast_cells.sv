// The floating-point cells of the `rtl-fast` device: ports, latency and bits of the gates, the
// arithmetic in C++ (fast_cells.h), called once per clock edge. ADD_LATENCY is defined by verilog.py.

import "DPI-C" pure function int unsigned fast_add(input int unsigned a, input int unsigned b);
import "DPI-C" pure function int unsigned fast_mul(input int unsigned a, input int unsigned b);
import "DPI-C" pure function real fast_product(input int unsigned a, input int unsigned w);
import "DPI-C" pure function real fast_product_fp8x2(input int unsigned a, input int unsigned w);
import "DPI-C" pure function int unsigned fast_accumulate(input int unsigned acc, input real addend);

module fp32_add(
    input clk,
    input rst,
    input en,
    input [31:0] a,
    input [31:0] b,
    output reg [31:0] o = 0
);
    reg [31:0] stage_1 = 0, stage_2 = 0;
    always @(posedge clk)
        if (en) begin
            stage_1 <= fast_add(a, b);
            stage_2 <= stage_1;
            o <= stage_2;
        end
endmodule

module fp32_mul(
    input clk,
    input rst,
    input en,
    input [31:0] a,
    input [31:0] b,
    output reg [31:0] o = 0
);
    reg [31:0] stage_1 = 0, stage_2 = 0;
    always @(posedge clk)
        if (en) begin
            stage_1 <= fast_mul(a, b);
            stage_2 <= stage_1;
            o <= stage_2;
        end
endmodule

module mac_narrow(
    input clk,
    input rst,
    input [22:0] a,
    input [22:0] w,
    input active,
    input [31:0] acc,
    output reg [31:0] o = 0
);
    // Adding -0 changes nothing, not even -0.
    real addend = 0.0;
    reg [32 * (`ADD_LATENCY - 1) - 1:0] stages = 0;
    always @(posedge clk) begin
        addend <= active ? fast_product({9'b0, a}, {9'b0, w}) : -0.0;
        {o, stages} <= {stages, fast_accumulate(acc, addend)};
    end
endmodule

module mac_fp8x2(
    input clk,
    input rst,
    input [24:0] a,
    input [24:0] w,
    input active,
    input [31:0] acc,
    output reg [31:0] o = 0
);
    // Adding -0 changes nothing, not even -0.
    real product = 0.0, product_2 = 0.0, addend = 0.0;
    reg [32 * (`ADD_LATENCY - 1) - 1:0] stages = 0;
    always @(posedge clk) begin
        product <= active ? fast_product_fp8x2({7'b0, a}, {7'b0, w}) : -0.0;
        product_2 <= product;
        addend <= product_2;
        {o, stages} <= {stages, fast_accumulate(acc, addend)};
    end
endmodule
