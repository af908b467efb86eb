// Runs the Verilated chip: clock, an AXI4 DRAM model, and AXI4-Lite accesses.
//
// The DRAM is the caller's memory: numpy and the chip see the same bytes, nothing is copied.
// Model: bursts are answered in order, the first beat `latency` cycles after its address was taken;
// each direction moves at most `bytes_per_cycle` (AXI4 has a read and a write channel); an address
// outside the DRAM is answered DECERR.

#include <cfenv>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>

#include "Vtop.h"
#include "verilated.h"

namespace {

constexpr uint8_t kOkay = 0, kDecodeError = 3;
constexpr size_t kMaxBursts = 64;

struct Burst {
    uint64_t address;
    uint64_t due;  // first cycle in which data may move (read) or the response is given (write)
    uint32_t id;
    uint32_t beats;
    uint32_t size;  // bytes of a beat
    uint8_t response;
};

struct Sim {
    std::unique_ptr<VerilatedContext> context{new VerilatedContext};
    std::unique_ptr<Vtop> top;
    uint8_t* dram = nullptr;
    uint64_t dram_bytes = 0;
    uint64_t latency = 0;
    uint64_t bytes_per_cycle = 0;
    uint64_t cycle = 0;
    uint64_t read_credit = 0, write_credit = 0;
    uint64_t read_bytes = 0, written_bytes = 0;
    std::deque<Burst> reads, writes, responses;
};

// While it lives, floating point rounds to nearest and keeps subnormals, whatever the caller's
// thread was set to: the cells of `rtl-fast` compute with it.
class DefaultFloat {
public:
    DefaultFloat() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloat() { std::fesetenv(&saved_); }
    DefaultFloat(const DefaultFloat&) = delete;
    DefaultFloat& operator=(const DefaultFloat&) = delete;

private:
    std::fenv_t saved_;
};

template <typename T>
uint8_t* bytes(T& port) {
    return reinterpret_cast<uint8_t*>(&port);
}

bool inside(const Sim& s, uint64_t address, uint32_t size) {
    return address <= s.dram_bytes && size <= s.dram_bytes - address;
}

// Ends a clock cycle: what moved in it is seen, the inputs of the next one are set, then the edge.
void step(Sim& s) {
    Vtop& t = *s.top;
    constexpr uint32_t bus = SYSTOLITH_AXI_BYTES;
    constexpr uint64_t cap = 2 * bus;

    if (t.m_axi_rvalid && t.m_axi_rready) {
        Burst& burst = s.reads.front();
        s.read_credit -= burst.size;
        s.read_bytes += burst.size;
        burst.address = (burst.address & ~static_cast<uint64_t>(burst.size - 1)) + burst.size;
        if (--burst.beats == 0) s.reads.pop_front();
    }
    if (t.m_axi_wvalid && t.m_axi_wready) {
        Burst& burst = s.writes.front();
        s.write_credit -= burst.size;
        uint64_t base = burst.address & ~static_cast<uint64_t>(bus - 1);
        const uint8_t* data = bytes(t.m_axi_wdata);
        for (uint32_t i = 0; i < bus; ++i) {
            if (!((t.m_axi_wstrb >> i) & 1)) continue;
            if (inside(s, base + i, 1)) {
                s.dram[base + i] = data[i];
                ++s.written_bytes;
            } else {
                burst.response = kDecodeError;
            }
        }
        burst.address = (burst.address & ~static_cast<uint64_t>(burst.size - 1)) + burst.size;
        if (--burst.beats == 0) {
            burst.due = s.cycle + 1 + s.latency;
            s.responses.push_back(burst);
            s.writes.pop_front();
        }
    }
    if (t.m_axi_bvalid && t.m_axi_bready) s.responses.pop_front();
    if (t.m_axi_arvalid && t.m_axi_arready) {
        s.reads.push_back({t.m_axi_araddr, s.cycle + 1 + s.latency, t.m_axi_arid,
                           t.m_axi_arlen + 1u, 1u << t.m_axi_arsize, kOkay});
    }
    if (t.m_axi_awvalid && t.m_axi_awready) {
        s.writes.push_back({t.m_axi_awaddr, 0, t.m_axi_awid, t.m_axi_awlen + 1u,
                            1u << t.m_axi_awsize, kOkay});
    }

    ++s.cycle;
    s.read_credit = s.read_credit + s.bytes_per_cycle;
    if (s.read_credit > cap + s.bytes_per_cycle) s.read_credit = cap + s.bytes_per_cycle;
    s.write_credit = s.write_credit + s.bytes_per_cycle;
    if (s.write_credit > cap + s.bytes_per_cycle) s.write_credit = cap + s.bytes_per_cycle;

    t.m_axi_rvalid = !s.reads.empty() && s.cycle >= s.reads.front().due &&
                     s.read_credit >= s.reads.front().size;
    if (t.m_axi_rvalid) {
        Burst& b = s.reads.front();
        // A beat carries `size` bytes at their place in the bus.
        uint64_t base = b.address & ~static_cast<uint64_t>(bus - 1);
        uint32_t offset = static_cast<uint32_t>(b.address - base) & ~(b.size - 1);
        bool ok = inside(s, base + offset, b.size);
        std::memset(bytes(t.m_axi_rdata), 0, bus);
        if (ok) std::memcpy(bytes(t.m_axi_rdata) + offset, s.dram + base + offset, b.size);
        t.m_axi_rid = b.id;
        t.m_axi_rresp = ok ? kOkay : kDecodeError;
        t.m_axi_rlast = b.beats == 1;
    }
    t.m_axi_arready = s.reads.size() < kMaxBursts;
    t.m_axi_awready = s.writes.size() < kMaxBursts && s.responses.size() < kMaxBursts;
    t.m_axi_wready = !s.writes.empty() && s.write_credit >= s.writes.front().size;
    t.m_axi_bvalid = !s.responses.empty() && s.cycle >= s.responses.front().due;
    if (t.m_axi_bvalid) {
        t.m_axi_bid = s.responses.front().id;
        t.m_axi_bresp = s.responses.front().response;
    }

    t.clk = 1;
    t.eval();
    t.clk = 0;  // the clock gates open or close
    t.eval();
}

}  // namespace

extern "C" {

Sim* sim_create(uint8_t* dram, uint64_t dram_bytes, uint64_t latency, uint64_t bytes_per_cycle) {
    DefaultFloat environment;
    auto* s = new Sim;
    s->top.reset(new Vtop{s->context.get(), "chip"});
    s->dram = dram;
    s->dram_bytes = dram_bytes;
    s->latency = latency;
    s->bytes_per_cycle = bytes_per_cycle;
    s->top->eval();
    s->top->rst = 1;
    for (int i = 0; i < 4; ++i) step(*s);
    s->top->rst = 0;
    return s;
}

void sim_destroy(Sim* s) {
    s->top->final();
    delete s;
}

uint64_t sim_cycles(const Sim* s) { return s->cycle; }
uint64_t sim_read_bytes(const Sim* s) { return s->read_bytes; }
uint64_t sim_written_bytes(const Sim* s) { return s->written_bytes; }

// Runs until the interrupt is high or `max_cycles` have passed; returns whether it is high.
int sim_run(Sim* s, uint64_t max_cycles) {
    DefaultFloat environment;
    for (uint64_t i = 0; i < max_cycles; ++i) {
        if (s->top->irq) return 1;
        step(*s);
    }
    return s->top->irq;
}

// AXI4-Lite accesses. Return the response code, or -1 if the chip did not answer. A handshake is
// seen in its cycle; what follows from it counts from the next one on.
int sim_write(Sim* s, uint32_t address, uint32_t data) {
    DefaultFloat environment;
    Vtop& t = *s->top;
    t.s_axil_awaddr = address;
    t.s_axil_awvalid = 1;
    t.s_axil_wdata = data;
    t.s_axil_wstrb = 15;
    t.s_axil_wvalid = 1;
    t.s_axil_bready = 1;
    for (int i = 0; i < 1000; ++i) {
        step(*s);
        if (t.s_axil_awready) t.s_axil_awvalid = 0;
        if (t.s_axil_wready) t.s_axil_wvalid = 0;
        if (t.s_axil_bvalid) {
            t.s_axil_bready = 0;
            return t.s_axil_bresp;
        }
    }
    return -1;
}

int sim_read(Sim* s, uint32_t address, uint32_t* data) {
    DefaultFloat environment;
    Vtop& t = *s->top;
    t.s_axil_araddr = address;
    t.s_axil_arvalid = 1;
    t.s_axil_rready = 1;
    for (int i = 0; i < 1000; ++i) {
        step(*s);
        if (t.s_axil_arready) t.s_axil_arvalid = 0;
        if (t.s_axil_rvalid) {
            t.s_axil_rready = 0;
            *data = t.s_axil_rdata;
            return t.s_axil_rresp;
        }
    }
    return -1;
}
}
