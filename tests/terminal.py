"""A pseudo-terminal with `dsv4 chat` at it, typed at and read by a test."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time


class Terminal:
    """`dsv4 chat` at a pseudo-terminal of its own, which makes a signal of Ctrl-C as a real one does."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
        environment.pop("NO_COLOR", None)

        def take() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # who is started in the background is deaf to it, and so we
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "dsv4.cli.main", "chat", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=take,
        )
        os.close(slave)
        self.text = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a read may end inside a character

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Wait for what matches, and give everything up to there; the rest stays for the next."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text, re.DOTALL)):
            ready, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            assert ready, f"no {pattern!r} in {self.text!r}"
            try:
                data = os.read(self.master, 65536)
            except OSError:  # what Linux says when nobody is at the other end any more
                data = b""
            assert data, f"ended without {pattern!r}: {self.text!r}"
            self.text += self.decoder.decode(data)
        taken, self.text = self.text[: found.end()], self.text[found.end() :]
        return taken

    def interrupt(self, pattern: str) -> str:
        """Ctrl-C until `pattern` comes: one between the prompt and the first look at the keys waits for the next."""
        for _ in range(60):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.expect(pattern, 1)
        raise AssertionError(f"no {pattern!r} in {self.text!r}")

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
