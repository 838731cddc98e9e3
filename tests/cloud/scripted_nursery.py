"""Speaks like the nursery, but its workers only sleep, under the name that they are told; `{"exit": N}` ends them at once."""

import json
import os
import select
import signal
import sys
import time
from pathlib import Path


def say(**line: object) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def become_worker(options: dict[str, object]) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    Path("/proc/self/comm").write_text(str(options["name"]))
    if "exit" in options:
        os._exit(int(str(options["exit"])))
    time.sleep(60)
    os._exit(0)


def main() -> None:
    os.write(1, b"a library prints this\n")
    signal.set_wakeup_fd(-1)
    rest = b""
    while True:
        readable, _, _ = select.select([0], [], [], 0.01)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            say(pid=pid, exit_code=os.waitstatus_to_exitcode(status))
        if not readable:
            continue
        data = os.read(0, 65536)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            options = json.loads(line)["options"]
            if options.get("crash"):
                sys.exit(3)
            pid = os.fork()
            if pid == 0:
                become_worker(options)
            if "exit" in options:  # birth and death in one breath
                _, status = os.waitpid(pid, 0)
                say(pid=pid, instance_id=options["name"].removeprefix("spot:"))
                say(pid=pid, exit_code=os.waitstatus_to_exitcode(status))
            else:
                say(pid=pid, instance_id=options["name"].removeprefix("spot:"))


main()
