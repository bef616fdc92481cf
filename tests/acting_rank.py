"""Stands in for ``search_e1.worker``: a process of a group that does what its task says, without importing torch."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from search_e1 import errors
from search_e1.launch import fork_server, group


def main() -> None:
    task = json.loads(sys.stdin.buffer.raw.readline())  # type: ignore[attr-defined]
    rank = int(os.environ["RANK"])
    logs = Path(task["logs"])

    def tell(**told: object) -> None:
        os.write(int(os.environ[fork_server.PIPE]), (json.dumps(told) + "\n").encode())

    def end() -> None:
        while os.read(0, 1):
            pass
        (logs / f"alone-{rank}").touch()
        os._exit(1)

    def stop(*_: object) -> None:
        (logs / f"saved-{rank}").touch()
        os._exit(75)

    threading.Thread(target=end, daemon=True).start()
    signal.signal(signal.SIGTERM, stop)
    (logs / f"pid-{rank}").write_text(str(os.getpid()))
    print(f"rank {rank} of {os.environ['WORLD_SIZE']}, here {os.environ['LOCAL_RANK']}")
    sys.stdout.flush()
    match task["act"][rank]:
        case "work":
            if rank == 0:
                tell(done=1, total=2, figure="half")
                tell(done=2, total=2, figure="all")
                tell(result={"made": [1, 2], "at": os.environ["MASTER_PORT"]})
        case "fail":
            group.note(logs, rank, errors.RetrievalError("http://nowhere: no answer"))
            os._exit(2)
        case "fall over":
            group.note(logs, rank, KeyError("missing"))
            os._exit(1)
        case "follow":  # as one whose peer is gone
            while not any(logs.glob("rank-*.json")):
                time.sleep(0.01)
            time.sleep(0.05)
            group.note(logs, rank, RuntimeError("Connection closed by peer"))
            os._exit(1)
        case "notice":
            time.sleep(0.3)
            group.note(logs, rank, RuntimeError("Connection closed by peer"))
            os._exit(1)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "vanish":
            os._exit(3)
        case "wait":
            if rank == 0:
                while not (logs / "pid-1").exists():
                    time.sleep(0.01)
                tell(done=1, total=2, figure="waits")
            time.sleep(600)


if __name__ == "__main__":
    main()
