// The reference of test_formal.py: floating-point addition by definition. Two magnitudes are whole
// numbers of one small unit, added exactly in as many bits as that takes and rounded to nearest
// even. Nothing is aligned, normalised or kept as a sticky bit.

// Sum of two numbers; `UNIT` of the least significant bits are below the smallest subnormal.
module exact_sum #(parameter E = 4, F = 3, UNIT = 0, W = 20) (
  input sign_a, input [W-1:0] a, input infinite_a,
  input sign_b, input [W-1:0] b, input infinite_b,
  input nan, output reg [E+F:0] o
);
  localparam [E+F:0] INFINITY = {1'b0, {E{1'b1}}, {F{1'b0}}};
  wire same = sign_a == sign_b;
  wire less = a < b;
  wire [W:0] sum = same ? a + b : less ? b - a : a - b;
  wire sign = sum == 0 ? sign_a & sign_b : !same && less ? sign_b : sign_a;
  integer top, lost;
  reg [W:0] kept, below, half;
  always @* begin
    // The rounding of a number whose highest bit is `top`, for every `top` there is.
    kept = sum >> UNIT;
    below = UNIT == 0 ? 0 : sum & ((1 << UNIT) - 1);
    half = UNIT == 0 ? 1 : 1 << UNIT - 1;
    lost = UNIT;
    for (top = F + UNIT + 1; top <= W; top = top + 1)
      if (sum[top]) begin
        lost = top - F;
        kept = sum >> lost;
        below = sum & ~({W+1{1'b1}} << lost);
        half = {{W{1'b0}}, 1'b1} << lost - 1;
      end
    if (below > half || below == half && kept[0]) kept = kept + 1;
    // A leading one in `kept` adds 1 to the exponent's field; so does its rounding up to the next.
    kept = kept + ((lost - UNIT) << F);
    if (kept >= INFINITY) kept = INFINITY;
    o = {sign, kept[E+F-1:0]};
    if (infinite_a) o = INFINITY | sign_a << E + F;
    if (infinite_b) o = INFINITY | sign_b << E + F;
    if (nan || infinite_a && infinite_b && !same) o = INFINITY | 1 << F - 1;
  end
endmodule

// Magnitude of a word in units of the smallest subnormal.
module magnitude #(parameter E = 4, F = 3, W = 20) (
  input [E+F:0] word, output [W-1:0] o, output infinite, output nan
);
  wire [E-1:0] field = word[E+F-1:F];
  wire [F-1:0] fraction = word[F-1:0];
  assign infinite = &field && fraction == 0;
  assign nan = &field && fraction != 0;
  assign o = field == 0 ? fraction : {1'b1, fraction} << field - 1;
endmodule

// `different` is high if `adder`, which takes LATENCY cycles, 2 or 3, gives another sum of two words.
module adder_miter #(parameter E = 4, F = 3, LATENCY = 3) (
  input clk, input [E+F:0] a, input [E+F:0] b, output different
);
  localparam W = F + (1 << E);
  wire [W-1:0] magnitude_a, magnitude_b;
  wire infinite_a, infinite_b, nan_a, nan_b;
  magnitude #(E, F, W) value_a (a, magnitude_a, infinite_a, nan_a);
  magnitude #(E, F, W) value_b (b, magnitude_b, infinite_b, nan_b);
  wire [E+F:0] wanted, got;
  exact_sum #(E, F, 0, W) sum (
    a[E+F], magnitude_a, infinite_a, b[E+F], magnitude_b, infinite_b, nan_a | nan_b, wanted
  );
  adder dut (.clk(clk), .rst(1'b0), .en(1'b1), .a(a), .b(b), .o(got));
  reg [E+F:0] wanted_1, wanted_2, wanted_3;
  always @(posedge clk) {wanted_3, wanted_2, wanted_1} <= {wanted_2, wanted_1, wanted};
  assign different = got != (LATENCY == 2 ? wanted_2 : wanted_3);
endmodule

// The same of `accumulator`, the adder as a MAC uses it, in four cycles: `b` is a product, unrounded,
// with an exponent that may lie outside the encoding and one leading zero at most; more of them only
// at exponents of the subnormal range and below it, down to where nothing of it but stickiness is
// left.
module accumulator_miter #(parameter E = 4, F = 3) (
  input clk, input [E+F:0] a, input sign_b, input signed [E+1:0] exponent_b,
  input [F:0] significand_b, input infinite_b, input nan_b, output different
);
  localparam signed LARGEST = 3 * (1 << E - 1) - 2;  // of a product of two numbers
  localparam signed LOWEST = -F - 5;
  // Bits below the smallest subnormal.
  localparam UNIT = 1 - LOWEST, W = F + 1 + LARGEST - LOWEST;
  wire legal = infinite_b || exponent_b >= LOWEST && exponent_b <= LARGEST
    && (exponent_b <= 1 || significand_b[F] || significand_b[F-1]);
  wire [W-1:0] magnitude_a;
  wire infinite_a, nan_a;
  magnitude #(E, F, W) value_a (a, magnitude_a, infinite_a, nan_a);
  wire [E+1:0] above = exponent_b - LOWEST;
  wire [W-1:0] magnitude_b = significand_b << above;
  wire [E+F:0] wanted, got;
  exact_sum #(E, F, UNIT, W) sum (
    a[E+F], magnitude_a << UNIT, infinite_a, sign_b, magnitude_b, infinite_b, nan_a | nan_b, wanted
  );
  accumulator dut (
    .clk(clk), .rst(1'b0), .a(a), .sign(sign_b), .exponent(exponent_b),
    .significand(significand_b), .inf(infinite_b), .nan(nan_b), .o(got)
  );
  reg [E+F:0] wanted_1, wanted_2, wanted_3, wanted_4;
  reg legal_1, legal_2, legal_3, legal_4;
  always @(posedge clk) begin
    {wanted_4, wanted_3, wanted_2, wanted_1} <= {wanted_3, wanted_2, wanted_1, wanted};
    {legal_4, legal_3, legal_2, legal_1} <= {legal_3, legal_2, legal_1, legal};
  end
  assign different = legal_4 && got != wanted_4;
endmodule
