// The floating-point cells of the `rtl-fast` device: ports, latency and bits of the gates, the
// arithmetic in C++. The modules fast_* stand for the functions of that name in fast_cells.h;
// verilog.py gives them their bodies.

module fp32_add(
    input clk,
    input rst,
    input en,
    input [31:0] a,
    input [31:0] b,
    output reg [31:0] o = 0
);
    wire [31:0] sum;
    reg [31:0] stage_1 = 0, stage_2 = 0;
    fast_add add(.a(a), .b(b), .o(sum));
    always @(posedge clk)
        if (en) begin
            stage_1 <= sum;
            stage_2 <= stage_1;
            o <= stage_2;
        end
endmodule

module fp32_add_short(
    input clk,
    input rst,
    input en,
    input [31:0] a,
    input [31:0] b,
    output reg [31:0] o = 0
);
    wire [31:0] sum;
    reg [31:0] stage_1 = 0;
    fast_add add(.a(a), .b(b), .o(sum));
    always @(posedge clk)
        if (en) begin
            stage_1 <= sum;
            o <= stage_1;
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
    wire [31:0] product;
    reg [31:0] stage_1 = 0, stage_2 = 0;
    fast_mul mul(.a(a), .b(b), .o(product));
    always @(posedge clk)
        if (en) begin
            stage_1 <= product;
            stage_2 <= stage_1;
            o <= stage_2;
        end
endmodule

module word_mul(
    input clk,
    input rst,
    input en,
    input [31:0] a,
    input [31:0] b,
    input [2:0] mode,
    output reg [31:0] o = 0
);
    wire [31:0] product;
    reg [31:0] stage_1 = 0, stage_2 = 0;
    fast_word_mul mul(.a(a), .b(b), .mode({29'b0, mode}), .o(product));
    always @(posedge clk)
        if (en) begin
            stage_1 <= product;
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
    wire [63:0] product;  // a double
    wire [31:0] sum;
    reg [63:0] addend = 0;
    reg [31:0] stage_1 = 0, stage_2 = 0, stage_3 = 0;
    fast_product multiply(.a({9'b0, a}), .w({9'b0, w}), .o(product));
    fast_accumulate accumulate(.acc(acc), .addend(addend), .o(sum));
    always @(posedge clk) begin
        // Adding -0 changes nothing, not even -0.
        addend <= active ? product : 64'h8000000000000000;
        stage_1 <= sum;
        stage_2 <= stage_1;
        stage_3 <= stage_2;
        o <= stage_3;
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
    wire [63:0] product;  // a double
    wire [31:0] sum;
    reg [63:0] product_1 = 0, product_2 = 0, addend = 0;
    reg [31:0] stage_1 = 0, stage_2 = 0, stage_3 = 0;
    fast_product_fp8x2 multiply(.a({7'b0, a}), .w({7'b0, w}), .o(product));
    fast_accumulate accumulate(.acc(acc), .addend(addend), .o(sum));
    always @(posedge clk) begin
        // Adding -0 changes nothing, not even -0.
        product_1 <= active ? product : 64'h8000000000000000;
        product_2 <= product_1;
        addend <= product_2;
        stage_1 <= sum;
        stage_2 <= stage_1;
        stage_3 <= stage_2;
        o <= stage_3;
    end
endmodule

module fast_add(input [31:0] a, input [31:0] b, output [31:0] o);
endmodule

module fast_mul(input [31:0] a, input [31:0] b, output [31:0] o);
endmodule

module fast_word_mul(input [31:0] a, input [31:0] b, input [31:0] mode, output [31:0] o);
endmodule

module fast_product(input [31:0] a, input [31:0] w, output [63:0] o);
endmodule

module fast_product_fp8x2(input [31:0] a, input [31:0] w, output [63:0] o);
endmodule

module fast_accumulate(input [31:0] acc, input [63:0] addend, output [31:0] o);
endmodule
