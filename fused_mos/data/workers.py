"""Maps a function over items in worker processes, which end when their parent does, even if it is killed."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import TypeVar

from ..runtime import signals
from .corpus import CorpusError

Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Yields (item, result) as they finish. Raises CorpusError if a worker is killed, and what `function` raises."""
    # a fork server imports this package once for all workers; with spawn, each worker imports it
    context = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    multiprocessing.set_forkserver_preload(["fused_mos.data.corpus"])
    ours, theirs = context.Pipe()
    with ours, ProcessPoolExecutor(workers, context, _start_worker, (theirs,)) as pool:
        try:
            futures = {pool.submit(function, item): item for item in items}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise CorpusError(
                "a worker process was killed, perhaps for lack of memory; run the same command to continue"
            ) from None
        except (KeyboardInterrupt, signals.Stopped, GeneratorExit):
            ours.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(pipe: Connection) -> None:
    """Leaves Ctrl-C to the parent. When the parent stops or is killed, its end of the pipe closes, and the worker
    exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: pipe.poll(None) and os._exit(1), daemon=True).start()
