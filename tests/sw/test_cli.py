"""The systolith command."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import systolith
from systolith import cli


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.console, "width", 100)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["systolith", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as exit:
            status = exit.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_train_digits(run, tmp_path):
    status, out, _ = run("train", "digits", "--device", "golden", "--config", "small",
                         "--epochs", "2")  # fmt: skip
    assert status == 0 and "test accuracy" in out and "epoch   2/2" in out
    folder = tmp_path / "reports" / "digits-golden-small"
    report = json.loads((folder / "report.json").read_text())
    assert report["test_accuracy"] > 0.9
    steps = 2 * (1437 // 32)
    assert len(report["losses"]) == steps
    products = 2 * 64 * 32 + 3 * 32 * 10
    assert report["macs"] == steps * 32 * products + 2 * 360 * (64 * 32 + 32 * 10)
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_report_folder(run, tmp_path):
    status, _, _ = run("train", "digits", "--device", "golden", "--config", "nano", "--epochs", "1",
                       "--batch", "45", "--report", "here/and there")  # fmt: skip
    assert status == 0
    assert json.loads((tmp_path / "here" / "and there" / "report.json").read_text())["batch"] == 45


def test_info(run):
    status, out, _ = run("info")
    assert status == 0
    for word in ("nano", "trn", "verilator", "jax", "28,672 KiB"):
        assert word in out
    status, out, _ = run("info", "--config", "small")
    assert status == 0 and "small" in out and "nano" not in out


def test_disasm(run, tmp_path):
    with systolith.Device("golden", config="nano") as device:
        fn = systolith.jit(lambda x: jnp.tanh(x @ x), device=device)
        fn(np.ones((3, 3), np.float32))
        fn.program.save(tmp_path / "program")
    status, out, _ = run("disasm", "program")
    assert status == 0 and "MATMUL" in out and "TANH" in out and "config nano" in out


@pytest.mark.parametrize(
    "arguments,status,words",
    [
        (("disasm", "missing"), 1, "missing"),
        (("disasm", "damaged"), 1, "truncated"),
        (("info", "--config", "huge"), 2, "huge"),
        (("train", "digits", "--config", "huge"), 2, "huge"),
        (("train", "digits", "--device", "fpga"), 2, "fpga"),
        (("train", "digits", "--epochs", "0"), 2, "epochs"),
        (("train", "digits", "--batch", "9999"), 2, "batch"),
        (("fly",), 2, "fly"),
    ],
)
def test_bad_input_is_a_message_and_a_status(run, tmp_path, arguments, status, words):
    (tmp_path / "damaged").write_bytes(b"SYST")
    got, _, err = run(*arguments)
    assert got == status and words in err and "Traceback" not in err


def test_missing_compiler(run, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    status, out, err = run("train", "digits", "--device", "rtl", "--config", "nano")
    assert status == 1 and "no-such-compiler" in err and "Traceback" not in err
    status, out, _ = run("info")
    assert status == 0 and "no-such-compiler" in out
