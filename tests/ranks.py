"""Runs a function of a test file on some processes that see each other through gloo.

python tests/ranks.py FILE FUNCTION FOLDER      (one rank; `start` starts them all)
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = 300.0


def start(count: int, file: str, function: str, folder: Path, *arguments: str, seconds: float = SECONDS) -> None:
    """Call `function(folder, *arguments)` of a file on each rank; an `AssertionError` shows what failed ranks said.

    A rank that waits for one that has failed is ended.
    """
    from ports import free_port  # a rank does not have it on its path

    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    common |= {"LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    common |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DFT_CACHE": str(folder / "cache")}
    command = [sys.executable, str(HERE / "ranks.py"), file, function, str(folder), *arguments]
    processes = []
    for rank in range(count):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = (folder / f"rank-{rank}.log").open("w")
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    failed = _wait(processes, seconds)
    said = "\n".join((folder / f"rank-{rank}.log").read_text()[-3000:] for rank in failed)
    assert not failed, f"ranks {failed} of {count} failed:\n{said}"


def _wait(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """Which failed, the first of them first."""
    end, failed = time.monotonic() + seconds, []
    while any(process.poll() is None for process in processes):
        failed += [n for n, process in enumerate(processes) if process.poll() and n not in failed]
        if failed or time.monotonic() > end:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return failed + [n for n, process in enumerate(processes) if process.wait() and n not in failed]


def main() -> None:
    file, function, folder, *arguments = sys.argv[1:]
    sys.path[:0] = [str(HERE), str(Path(file).parent)]
    specification = importlib.util.spec_from_file_location("case", file)
    module = importlib.util.module_from_spec(specification)
    sys.modules["case"] = module
    specification.loader.exec_module(module)
    getattr(module, function)(Path(folder), *arguments)


if __name__ == "__main__":
    main()
