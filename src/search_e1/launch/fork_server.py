"""A process that has imported what the processes of all stages need, and forks each of them off itself.

What ``python -m search_e1.launch.fork_server MODULE`` runs; ``processes.ForkServer`` is its client. It starts no thread of
Python's own and uses no accelerator, so that its copies may do both. On its standard input, a socket, it is asked for a
process with a message of its environment, and handed the process's standard input, log and pipe; it tells the number of each
process that it starts, and the status of each that has ended. It ends when the socket does.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from types import ModuleType
from typing import Any

PIPE = "SEARCH_E1_PIPE"
"""Variable that tells a group's first process the number of its pipe."""
_SIGNALS = {signal.SIGINT, signal.SIGTERM}
LARGEST = 1 << 18
"""Bytes of a message: mostly the environment."""


def main() -> None:
    """Serve, and in a process that was asked for: run ``main`` of the module."""
    # Its client decides when to end, also where a signal goes to all. What comes to a copy too early waits until that can act.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    with socket.socket(fileno=os.dup(0)) as client:
        try:
            module = importlib.import_module(sys.argv[1])
            problem = _unsafe()
        except Exception as error:
            module, problem = ModuleType(""), f"{type(error).__name__}: {error}"
        _tell(client, {"problem": problem})
        asked = not problem and _serve(client)
    if asked:
        module.main()  # and end in the usual way, as a process of its own


def _unsafe() -> str:
    """Why a copy of this process would not work, if so."""
    torch: Any = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return "importing has used an accelerator"
    # Threads of libraries that say themselves what becomes of them in a copy (OpenBLAS, jemalloc) do not count.
    return "importing has started threads" if threading.active_count() > 1 else ""


def _serve(client: socket.socket) -> bool:
    """Until the client is gone; ``True`` in a process that was asked for."""
    gc.collect()
    gc.freeze()  # a collection in a copy would write to, and so take for itself, all that it shares with the others
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([client.fileno(), *running], [], [])
        for ended in running.keys() & ready:
            pid, status, used = os.wait4(running.pop(ended), 0)
            os.close(ended)
            seconds = used.ru_utime + used.ru_stime
            _tell(client, {"ended": pid, "status": os.waitstatus_to_exitcode(status), "seconds": seconds})
        if client.fileno() in ready:
            data, handed, _, _ = socket.recv_fds(client, LARGEST, 3)
            if not data:
                return False
            pid = os.fork()
            if not pid:
                _become(json.loads(data), handed)
                for descriptor in running:
                    os.close(descriptor)
                return True
            running[os.pidfd_open(pid)] = pid
            for descriptor in handed:
                os.close(descriptor)
            _tell(client, {"started": pid})


def _become(environment: Mapping[str, str], handed: list[int]) -> None:
    """What starting a process anew would have done."""
    os.setsid()  # a terminal's Ctrl-C comes to the one that waits, which passes it on
    stdin, log, *pipe = handed
    for there, here in ((stdin, 0), (log, 1), (log, 2)):
        os.dup2(there, here)
    for descriptor in (stdin, log):
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if pipe:
        os.environ[PIPE] = str(pipe[0])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _tell(client: socket.socket, told: Mapping[str, Any]) -> None:
    try:
        client.send(json.dumps(told).encode())
    except OSError:
        os._exit(1)  # it is gone


if __name__ == "__main__":
    main()
