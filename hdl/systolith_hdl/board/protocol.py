"""The protocol of the serial bridge: the only definition, for the gates and for the host.

The host asks, the bridge answers; one request at a time. Numbers are little-endian, but for the
checksums, which go high byte first.

request: SYNC, operation (1), address (4), count (2), checksum (2) of operation to count; WRITE_*
    goes on with `count` words (4 each) and the checksum (2) of those
answer: ANSWER, status (1), the words of READ_* and INFO if the status is OK, checksum (2) of status
    and words

8 data bits, no parity, one stop bit. Checksums are CRC-16/IBM-3740 (CCITT, initial value 0xFFFF).
"""

from amaranth.hdl import unsigned
from amaranth.lib import data, enum
from amaranth.lib.crc.catalog import CRC16_IBM_3740

SYNC = 0x5A  #: begins a request; other bytes between requests are ignored
ANSWER = 0xA5  #: begins an answer
VERSION = 1  #: of this protocol
CHECKSUM = CRC16_IBM_3740(data_width=8)


class Operation(enum.Enum, shape=8):
    """What a request asks for."""

    #: the `INFO_WORDS`; address and count do not matter
    INFO = 1
    #: the chip's 32-bit register at a byte address; count is 1
    READ_REGISTER = 2
    WRITE_REGISTER = 3
    #: `count` words of DRAM from a byte address that is a multiple of 4
    READ_DRAM = 4
    WRITE_DRAM = 5


class Status(enum.Enum, shape=8):
    """What became of a request. After all but OK nothing was read or written, except that
    WRITE_DRAM has written the words that came before BAD_DATA or INCOMPLETE."""

    OK = 0
    #: the header's checksum is wrong, or a byte of it had no stop bit
    BAD_HEADER = 1
    #: the checksum of the words is wrong, or a byte of them had no stop bit
    BAD_DATA = 2
    #: no `Operation`
    UNKNOWN_OPERATION = 3
    #: count is 0, the address is no multiple of 4, or there is no such DRAM or register space
    BAD_ADDRESS = 4
    #: the chip's host port answered with an error: there is no such register
    REFUSED = 5
    #: the line fell silent within the request
    INCOMPLETE = 6


#: answer to INFO, a word each
INFO_WORDS = ("version", "dram_bytes", "clock_hz")

HEADER = data.StructLayout(
    {"operation": unsigned(8), "address": unsigned(32), "count": unsigned(16)}
)
