"""Who is served among signals and ACQUIREs that want the semaphores in the same cycles."""

from amaranth.sim import Simulator
from systolith_hdl.config import get_config
from systolith_hdl.semaphores import SemaphoreFile


def test_neither_signals_nor_acquires_starve() -> None:
    """With two signals and two ACQUIREs on offer in every cycle each is served every fourth."""
    file = SemaphoreFile(get_config("nano"), updates=3, waits=2)
    served: list[str] = []

    async def drive(ctx) -> None:
        for update in (file.update[0], file.update[2]):
            ctx.set(update.payload.value, 2)
            ctx.set(update.valid, 1)
        for wait in file.wait:
            ctx.set(wait.value, 1)
            ctx.set(wait.acquire, 1)
        for _ in range(400):
            now = [f"signal {i}" for i in range(3) if ctx.get(file.update[i].ready)]
            now += [f"acquire {i}" for i in range(2) if ctx.get(file.wait[i].taken)]
            assert len(now) == 1
            served.append(now[0])
            assert ctx.get(file.read.count) == 2 * sum(
                s.startswith("signal") for s in served[:-1]
            ) - sum(s.startswith("acquire") for s in served[:-1])
            await ctx.tick()

    simulator = Simulator(file)
    simulator.add_clock(1e-6)
    simulator.add_testbench(drive)
    simulator.run()
    # Until the first signal is applied there is nothing to acquire.
    order = ["signal 2", "acquire 0", "signal 0", "acquire 1"]
    assert served[:1] == ["signal 0"] and served[1:] == (order * 100)[:399]
