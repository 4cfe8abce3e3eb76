#!/usr/bin/env python3
"""Ctrl-C in the examples, at a terminal of 80 columns: `scripts/terminal.py target/release/examples`.

Each is run at a pseudo terminal, and stopped while a bar is drawn, while it answers, or where it asks. It has to be gone
then, with the bar taken away and the terminal as it was. The model is smollm2, which the examples fetch.
"""

import os
import pty
import re
import select
import struct
import sys
import termios
import time
from fcntl import ioctl

COLUMNS = 80
CTRL_C = b"\x03"


class Terminal:
    """A program at a terminal of its own, and all that it has written there."""

    def __init__(self, *command, **environment):
        self.name, self.written = f"{os.path.basename(command[0])} {command[1:]} {environment}", b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.pop("NO_COLOR", None)
            os.environ.update(environment, TERM="xterm-256color")
            ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 24, COLUMNS, 0, 0))
            os.execv(command[0], command)

    def read(self, until=None, seconds=120):
        """What it writes up to a pattern, or to its end."""
        start, end = len(self.written), time.monotonic() + seconds
        while time.monotonic() < end:
            if until and re.search(until, self.written[start:]):
                return self.written[start:]
            if not select.select([self.fd], [], [], 0.1)[0]:
                continue
            try:
                self.written += os.read(self.fd, 1 << 16)
            except OSError:  # Linux says so where nobody has the terminal open any more.
                assert until is None, f"{self.name}: ended without {until}: {self.written}"
                return self.written[start:]
        raise AssertionError(f"{self.name}: {seconds} s without {until or 'an end'}: {self.written[-500:]}")

    def send(self, keys):
        os.write(self.fd, keys)

    def ends_with(self, code):
        rest = self.read(seconds=20)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert status == code, f"{self.name}: exit code {status}, expected {code}"
        shown = re.findall(rb"\x1b\[\?25([hl])", self.written)
        assert shown[-1:] != [b"l"], f"{self.name}: leaves no cursor"
        local = termios.tcgetattr(self.fd)[3]
        assert local & termios.ECHO and local & termios.ICANON, f"{self.name}: leaves a terminal without echo or lines"
        print(f"ok: {self.name}")
        return rest


def lines(drawn):
    """The text of what was drawn, without escapes."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", drawn.decode()))


def stop_at_bar(pattern, *command):
    terminal = Terminal(*command)
    drawn = terminal.read(pattern) + terminal.read("█".encode())
    terminal.send(CTRL_C)
    rest = terminal.ends_with(130)
    drawn += rest.partition(b"^C")[0]
    longest = max(map(len, lines(drawn)))
    assert longest + len("^C") <= COLUMNS, f"{command}: a bar of {longest} columns leaves no room for ^C"
    assert b"\x1b[2K" in rest.partition(b"^C")[2], f"{command}: the bar stays: {rest}"


def stop_answer(ask, document):
    terminal = Terminal(ask, document, "--sample-len", "2000")
    terminal.read(rb"\? ")
    terminal.send(b"Tell a very long story about all of this.\r")
    terminal.read(rb"\n.*\w+ \w+ ")
    terminal.send(CTRL_C)
    # It says what the part cost, and asks again.
    terminal.read(rb"(?s)tokens/s over.*\? ", 20)
    terminal.send(CTRL_C)
    terminal.ends_with(0)


def main(directory):
    example = lambda name: os.path.join(directory, name)
    document = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "LICENSE-MIT")
    stop_at_bar(b"prefill", example("generate"))
    stop_at_bar(b"prefill", example("ask"), document.replace("MIT", "APACHE"))
    stop_at_bar(b"needles at", example("needle"))
    stop_at_bar(b"dense attention", example("fidelity"))
    small = ["--prompt-tokens", "512", "--eval-tokens", "256", "--methods", "ours"]
    stop_at_bar(b"on residuals", example("fidelity"), *small)
    stop_answer(example("ask"), document)
    for colours, environment in [(True, {}), (False, {"NO_COLOR": "1"})]:
        terminal = Terminal(example("ask"), document, "-q", "Who?", "--sample-len", "2", **environment)
        terminal.read(rb"document at hand")
        terminal.ends_with(0)
        assert (b"\x1b[2m" in terminal.written) == colours, f"{environment}: {terminal.written}"


main(*sys.argv[1:])
